"""What training says to wrong input, in one line and with status 2; a bug keeps its traceback and ends with 1."""
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from helpers.image_files import DAMAGED, png, write_images, write_parquet
from helpers.training import FAST, error_lines, few_digits, fork, history, join, read, run
from timm.models import save_for_hf

from timm_ddnn import EKDLoss
from timm_ddnn.data.loader import LoaderError, create_loader, loading
from timm_ddnn.evaluation import batches
from timm_ddnn.train.loop import LossMeter
from timm_ddnn_cli.main import main

pytestmark = pytest.mark.usefixtures('surroundings')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Wrong data sets, and models of which none goes with digits."""
    folder = tmp_path_factory.mktemp('files')
    (folder / 'file').write_text('neither a folder nor weights')
    (folder / 'empty').mkdir()
    save_for_hf(timm.create_model('test_resnet', num_classes=3), folder / 'stock')
    save_for_hf(timm.create_model('test_vit', num_classes=10), folder / 'vit', model_args=dict(dynamic_img_size=False))
    for split in ('train', 'test'):
        (folder / 'text' / split / 'a').mkdir(parents=True)
        (folder / 'text' / split / 'a' / 'a.txt').write_text('no image')
        (folder / 'noparquet').mkdir(exist_ok=True)
        (folder / 'noparquet' / f'{split}.parquet').write_text('text')
        write_parquet(folder / 'labels' / f'{split}.parquet', range(4), labels=[0, 11, 2, 3])
        write_parquet(folder / 'damaged' / f'{split}.parquet', range(4), files=[png(0), png(1), png(2), DAMAGED])
    return folder


WRONG = [
    ('--model ddnn_resnet21', 'dynamic-depth model such as .*ddnn_resnet20.*, got .ddnn_resnet21'),
    ('--model vgg11', 'nets of several depths are made of CifarResNet, .*, not of VGG'),
    ('--model local-dir:nowhere', "'local-dir:nowhere' cannot be created: nowhere is not the folder of a model"),
    ('--pretrained --model ddnn_resnet110', 'No pretrained weights exist for ddnn_resnet110'),
    ('--model-kwargs foo=1', 'arguments of DynamicDepthCifarResNet must be of .* got .*foo'),
    ('--opt adahessian', '--opt must be an optimizer of first order, got adahessian'),
    ('--opt foo', '--opt foo: Optimizer foo'),
    ('--scale 0.9 0.1', '--scale must be a lower and an upper bound, got 0.9 0.1'),
    ('--scale 0.5 1', "scale must be for a crop mode such as 'rrc', got 'pad'"),
    ('-b 1 --model ddnn_resnet18 --img-size 32', '--batch-size must be at least 2 for images of 32 px'),
    ('--model-kwargs drop_rate=0.1', 'other arguments than .*drop_rate.* options of their own, got drop_rate'),
    ('--model-kwargs foo', "KEY=VALUE .*, got 'foo'"),
    ('--model-kwargs in_chans=5', 'in_chans must be 1 or 3, got 5'),
    ('--subnets 1,1', r'3 integers, from 1 up to \(3, 3, 3\), got \(1, 1\)'),
    ('--subnets two', "blocks per stage such as '2,2,2,2', got 'two'"),
    ('--initial-checkpoint nowhere.pth', "must be a file, got 'nowhere.pth'"),
    ('--initial-checkpoint file', "cannot be created with the weights in 'file': file is not a file of weights"),
    ('--model output/nowhere', "must be a folder of a model, 'hf-hub:OWNER/NAME' or a name, got 'output/nowhere'"),
    ('--num-classes 5', '--num-classes must be at least 10 for this data set, got 5'),
    ('--evaluate', '--evaluate needs weights'),
    ('--ema-teacher', '--ema-teacher needs the average: --model-ema'),
    ('--model-ema --ema-teacher --teacher some', '--teacher: not allowed with argument --ema-teacher'),
    ('--teacher nowhere', "--teacher nowhere: model 'nowhere' cannot be created: Unknown model"),
    ('--teacher stock', '--teacher stock: data must have the 3 classes of the model, .* got 10'),
    ('--teacher vit --beta 0', '--teacher vit: teacher does not take images of .3, 32, 32.: Input height'),
    ('--teacher ddnn_resnet20.ekd_cifar10',
     "--teacher .*: 10 classes are called otherwise in the data than in the model, the first '0' and 'airplane'"),
    ('--dataset nowhere', "no data set 'nowhere': not a folder here, not 'digits', and not an id OWNER/NAME of"),
    ('--dataset labels/nowhere', "no data set 'labels/nowhere': not a folder here, "),
    ('--dataset ../nowhere', "no data set '../nowhere': not a folder here, "),
    ('--dataset file', "no data set 'file': a file, "),
    ('--dataset some/data', "no data set 'some/data': not a folder here, and not read from the Hub"),
    ('--dataset empty', "empty' holds no data set: a folder must hold SPLIT/CLASS/IMAGE or"),
    ('--dataset labels --val-split test --val-fraction 0.1', '--val-split and --val-fraction must not be given both'),
    ('--class-weights --bce-loss', '--class-weights are of cross-entropy, got --bce-loss'),
    ('--dataset text', "1 files in .*text/train/a are not images that can be read here, the first is 'a.txt'"),
    ('--dataset noparquet', "data set 'noparquet' cannot be read: Parquet file size"),
    ('--dataset labels', r"0\.\.9 for 10 classes, got 11 in row 1 of split 'train'"),
    ('--dataset labels --target-key foo', r"--target-key must be one of the columns .*, got 'foo'"),
    ('--dataset damaged -b 2', r'row 3 of split .train. \(no file name\) cannot be read: unknown format'),
    ('--dataset damaged -b 2 -j 2', r'row 3 of split .train. \(no file name\) cannot be read: unknown format'),
    ('--val-split foo', r"--val-split must be one of the splits \['train', 'validation'\], got 'foo'"),
    ('--output file', '--output must be a folder, got the file file'),
    ('--output file/out', r"Not a directory: 'file/out/checkpoints'"),
    ('--batch-size 0', "batch-size: must be an integer from 1 to .*, got '0'"),
    ('--batch-size 899', '--batch-size must be at most 898 for 898 images, got 899'),
    ('--batch-size 7 --mixup 0.2', '--batch-size must be even for .*, got 7'),
    ('--epochs x', "must be an integer from 1 to .*, got 'x'"),
    ('--lr nan', "must be a number from 0 to 3.4e.38, got 'nan'"),
    ('--lr 1e308', "must be a number from 0 to 3.4e.38, got '1e308'"),
    ('--workers 1000', "must be an integer from 0 to .*, got '1000'"),
    (f'--epochs 1{"0" * 400}', "must be an integer from 1 to 2147483647, got '1000"),
    ('--lr 1e30 --log-interval 1', 'loss is not finite in epoch 1'),
    ('--drop 1.5', "must be a number from 0 to 1, got '1.5'"),
    ('--weights 14', "DEPTH=WEIGHT .*, got '14'"),
    ('--weights 20=1', r'sub-nets of \(14, 8\), got \[20\]'),
    ('--weights 8=-1', r'weight of depth 8 must be a number from 0 .*, got -1'),
    ('--frozen-teacher', '--frozen-teacher needs trained weights: --full-net-epochs, --pretrained or --initial-check'),
    ('--full-net-epochs 1 --frozen-teacher --teacher some', '--frozen-teacher must be the only teacher, got some'),
    ('--full-net-epochs 1 --frozen-teacher --alpha 0 --beta 0', '--frozen-teacher: a teacher needs alpha or'),
    ('--full-net-epochs 1 --weights 20=1', r'sub-nets of \(14, 8\), got \[20\]'),
    ('--model ddnn_resnet20 --pretrained --frozen-teacher',
     '--frozen-teacher: 10 classes are called otherwise in the data than in the model'),
    ('--private foo', "invalid choice: 'foo' .*classifier"),
    ('--private final_norm', "private must be of what this net has, DynamicDepthCifarResNet has no 'final_norm'"),
    ('--best-by 26', r'--best-by must be one of the depths \(20, 14, 8\), got 26'),
    ('--temperature 0', 'temperature must be a number from 0.01 .*, got 0'),
    ('--alpha nan', 'alpha must be a number from 0 .*, got nan'),
    ('--stages 3', r'stages must be from -3 to 2, got \[3\]'),
    ('--attention foo', "invalid choice: 'foo' .*energy"),
    ('--aa foo', '--aa foo: Unknown AA policy foo'),
    ('--torchcompile foo', '--torchcompile must be a backend such as .*inductor.*, got foo'),
    ('--mixed-precision fp16', "on a CPU there are 'no' and 'bf16'"),
    ('--foo', 'unrecognized arguments: --foo'),
    ('--in-memory --aa rand-m9', 'got --aa rand-m9'),
    ('--in-memory --train-crop-mode rrc', 'got --train-crop-mode rrc'),
    ('--in-memory --reprob 0.2', 'got --reprob 0.2'),
]


@pytest.mark.parametrize('arguments, message', WRONG, ids=[arguments for arguments, _ in WRONG])
def test_wrong_input_is_one_line_and_status_2(arguments, message, files, capfd):
    """Catches a traceback, a status of 0 or 1, or a message without what is allowed and what was received."""
    shutil.copytree(files, '.', dirs_exist_ok=True)
    with pytest.raises(SystemExit) as exit_info:
        run('-j', 0, '--epochs', 1, '--output', 'out', *arguments.split())
    assert exit_info.value.code == 2
    lines = error_lines(capfd, without=['Pretrained '])
    assert len(lines) == 1, lines
    assert re.match(f'error: .*{message}', lines[0]), lines
    assert Path('out').exists() == ('damaged' in arguments or '1e30 ' in arguments)  # wrong before training began
    assert not list(Path().glob('out/*.safetensors'))


@pytest.mark.parametrize('error', [RuntimeError, ValueError, AssertionError, KeyError])
def test_a_bug_keeps_its_traceback(error, monkeypatch, capfd):
    """Catches an error of the program that is reported as one of its user."""
    def fail(*args):
        raise error('planted')

    monkeypatch.setattr(EKDLoss, 'terms', fail)
    with pytest.raises(error, match='planted'):
        run(*FAST, *few_digits(), '--epochs', 1, '--output', 'out')
    assert 'error:' not in capfd.readouterr().err


def test_a_program_with_a_bug_ends():
    """Catches worker processes that are waited for for ever after an error, and a bug that ends with 2."""
    code = (
        'import sys, timm_ddnn.train.loop, timm_ddnn_cli.main\n'
        'def fail(*args): raise ValueError("planted")\n'
        'timm_ddnn.train.loop.LossMeter.update = fail\n'
        'timm_ddnn_cli.main.main(["train", *sys.argv[1:]])'
    )
    process = subprocess.run(
        [sys.executable, '-c', code, *FAST, *few_digits(), '-j', '2', '--output', 'out'],
        env=dict(os.environ, ACCELERATE_USE_CPU='1', PYTHONWARNDEFAULTENCODING=''), capture_output=True, text=True,
        timeout=120,
    )
    assert process.returncode == 1, process.stderr
    assert process.stderr.startswith('Traceback') and process.stderr.endswith('ValueError: planted\n')


# What comes from the surroundings

@pytest.fixture
def accelerate_setting(monkeypatch):
    """Set what `accelerate launch` and its configuration file hand on in the environment."""
    return lambda name, value: monkeypatch.setenv(f'ACCELERATE_{name}', value)


@pytest.mark.parametrize('name, value, message', [
    ('DYNAMO_BACKEND', 'EAGER', 'dynamo_backend of accelerate must be NO, because --torchcompile compiles, got EAGER'),
    ('MIXED_PRECISION', 'int8', 'mixed_precision of accelerate must be no, bf16 or fp16, got int8'),
    ('TORCH_DEVICE', 'foo', 'accelerate cannot be set up: .*foo'),
    ('TORCH_DEVICE', 'meta', "device must be cpu.* on this machine, got 'meta'"),
    ('GRADIENT_ACCUMULATION_STEPS', '0', 'gradient_accumulation_steps of accelerate must be at least 1, got 0'),
    ('GRADIENT_ACCUMULATION_STEPS', 'two', 'accelerate cannot be set up: .*two'),
])
def test_settings_of_accelerate_that_do_not_go_with_training(name, value, message, accelerate_setting, capfd):
    """Catches a run that trains otherwise than its summary says, because of the environment."""
    accelerate_setting(name, value)
    with pytest.raises(SystemExit) as exit_info:
        run(*FAST, *few_digits(), '--output', 'out')
    assert exit_info.value.code == 2
    line, = error_lines(capfd)
    assert re.match(f'error: .*{message}', line), line


@pytest.mark.parametrize('options, used', [([], 2), (['--grad-accum-steps', 3], 3)])
def test_batches_per_update_are_those_of_the_summary(options, used, accelerate_setting):
    """Catches updates and a schedule that the environment changes, and a summary that says otherwise."""
    accelerate_setting('GRADIENT_ACCUMULATION_STEPS', '2')
    run(*FAST, *few_digits(), '--epochs', 1, *options, '--output', 'out')  # of 11 batches
    record, = history('out')
    assert record['updates'] == math.ceil(11 / used) and record['lr'] == pytest.approx(0, abs=1e-9)
    assert read('out')['arguments']['grad_accum_steps'] == used


def test_text_is_utf8_and_a_console_cannot_lose_results(monkeypatch, tmp_path):
    """Catches a locale that changes what is written, and a training without a summary because of its last line."""
    folder = tmp_path / 'цифры' / 'crème'
    for split in ('train', 'val'):
        write_images(folder / split, range(40), class_names=[f'цифра {i}' for i in range(10)])

    def plain_console():
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding='cp1252', errors='strict')

    monkeypatch.setenv('LC_ALL', 'C')
    statuses, output = join(fork(*FAST, '--dataset', folder, '--epochs', 1, '-b', 20, before=plain_console))
    assert statuses == [0], output
    run_folder, = Path('output').iterdir()
    assert run_folder.name == 'ddnn_resnet20-crème'
    assert read(run_folder)['arguments']['dataset'] == str(folder)
    assert read(run_folder, 'config.json')['label_names'] == [f'цифра {i}' for i in range(10)]


def test_results_are_on_disk_before_they_are_printed(monkeypatch):
    """Catches results that are lost because they cannot be shown."""
    def print_table(*args):
        assert Path('out/summary.json').exists()
        raise KeyError('planted')

    monkeypatch.setattr('timm_ddnn_cli.tables.result_table', print_table)
    with pytest.raises(KeyError, match='planted'):
        run(*FAST, *few_digits(), '--epochs', 1, '--output', 'out')


def kill_all():
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


def test_a_worker_that_is_killed_is_named(monkeypatch, capfd):
    """Catches a traceback where the system has killed a worker for want of memory."""
    def kill(meter, terms, original=LossMeter.update):
        original(meter, terms)
        kill_all()

    monkeypatch.setattr(LossMeter, 'update', kill)
    with pytest.raises(SystemExit) as exit_info:
        run(*FAST, *few_digits(), '-j', 1, '--output', 'out')
    assert exit_info.value.code == 2
    line, = error_lines(capfd)
    assert line.startswith('error: a worker process that loads images has ended, ') and 'fewer --workers' in line


@pytest.mark.parametrize('args', ['evaluate ddnn_resnet20', 'calibrate ddnn_resnet20 --blocks 3,2,2 --output new'])
def test_a_worker_of_a_command_that_is_killed_is_named(args, monkeypatch, capfd):
    """Catches a traceback where a worker is killed that does not load for training."""
    def kill(batches, *args, original=batches.normalize):
        for batch in original(batches, *args):
            yield batch
            kill_all()

    monkeypatch.setattr(batches, 'normalize', kill)
    with pytest.raises(SystemExit) as exit_info:
        main([*args.split(), '--data', few_digits()[1], '-b', '4', '-j', '1'])
    assert exit_info.value.code == 2
    assert error_lines(capfd)[-1].startswith('error: a worker process that loads images has ended, ')


@pytest.mark.parametrize('damaged', [True, False])
def test_workers_end_with_the_run(damaged, tmp_path):
    """Catches workers that stay, and for each of which the garbage collector waits ten seconds, some time later."""
    write_images(tmp_path / 'set' / 'train', range(40))
    write_images(tmp_path / 'set' / 'val', range(40))
    if damaged:
        (tmp_path / 'set' / 'train' / '3' / '3.png').write_bytes(DAMAGED)
    with pytest.raises(SystemExit) if damaged else nullcontext():
        run(*FAST, '--dataset', tmp_path / 'set', '-b', 8, '-j', 2, '--epochs', 1, '--output', 'out')
    assert not multiprocessing.active_children()


class FullMemory(torch.utils.data.Dataset):
    """Images whose worker finds /dev/shm full, or meets a bug."""

    seed = 0

    def __init__(self, message):
        self.message = message

    def __len__(self):
        return 2

    def __getitem__(self, key):
        raise RuntimeError(self.message)


def test_a_small_shared_memory_is_named():
    """Catches a traceback where /dev/shm of a container is full, and a bug that is taken for that."""
    full = 'unable to write to file </torch_7_1>: No space left on device (28)'
    for message, error in (full, LoaderError), ('planted', RuntimeError):
        loader = create_loader(FullMemory(message), 1, training=False, num_workers=1)
        with pytest.raises(error, match=message.partition('<')[0]) as error_info, loading():
            list(loader)
        assert type(error_info.value) is error


def test_one_process_of_a_machine_speaks(monkeypatch, capfd):
    """Catches a wrong argument reported once per GPU, or not at all on a machine where alone it is wrong."""
    monkeypatch.setenv('RANK', '9')
    for local_rank, lines in ('1', 0), ('0', 1):
        monkeypatch.setenv('LOCAL_RANK', local_rank)
        with pytest.raises(SystemExit):
            run('--epochs', 0)
        assert len(error_lines(capfd)) == lines
