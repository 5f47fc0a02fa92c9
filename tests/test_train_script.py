"""Training as its users start it: short real runs on digits, and what they write."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.image_files import write_images
from helpers.training import FAST, MODEL, SCRIPT, assert_same_run, few_digits, history, read, run, top1
from timm.data import Mixup, create_transform

from timm_ddnn.data.datasets import load_image_data

pytestmark = pytest.mark.usefixtures('surroundings')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder of a run of three epochs on all digits."""
    folder = tmp_path_factory.mktemp('run')
    run(*FAST, '--epochs', 3, '-b', 16, '--alpha', 0.5, '--beta', 0.2, '--weights', '8=0.7', '--output', folder)
    return folder


def test_every_depth_learns(trained):
    """Catches a depth that the loss, the gradient or the statistics do not reach: chance is 10 %.

    Measured: 79 to 88 % with three seeds.
    """
    accuracy = top1(read(trained))
    assert accuracy.keys() == {14, 8}
    assert min(accuracy.values()) > 65, accuracy


def test_what_a_run_writes(trained):
    """Catches a file, a metric or an epoch that is missing, and a summary of another epoch than the saved one."""
    assert {p.name for p in trained.iterdir()} == {
        'accuracy.png', 'best', 'checkpoints', 'config.json', 'curves.png', 'metrics.jsonl', 'model.safetensors',
        'summary.json',
    }
    assert {p.name for p in (trained / 'best').iterdir()} == {
        'accuracy.png', 'config.json', 'model.safetensors', 'summary.json'}
    records, summary = history(trained), read(trained)
    assert [record['epoch'] for record in records] == [0, 1, 2]
    terms = ['loss', 'ce_14', 'ce_8', 'kl_8', 'attention_8']
    assert list(records[0]) == [
        'epoch', 'updates', 'lr', *(f'train_{term}' for term in terms), 'top1_14', 'top1_8', 'top5_14', 'top5_8',
        'top1', 'seconds', 'images_per_second',
    ]
    assert records[-1]['lr'] == pytest.approx(0, abs=1e-9)
    assert top1(summary) == {14: records[-1]['top1_14'], 8: records[-1]['top1_8']}
    assert summary['depths'] == read(trained, 'config.json')['depths']
    assert (summary['training_images'], summary['validation_images'], summary['weights']) == (
        898, 899, 'of epoch 3 of 3')
    assert (summary['arguments']['epochs'], summary['arguments']['seed'], summary['processes']) == (3, 0, 1)
    assert not {'command', 'json', 'run'} & summary['arguments'].keys()


def test_loss_is_made_of_its_terms(trained):
    """Catches --alpha, --beta or --weights that do not arrive at the loss."""
    for record in history(trained):
        ce, kl, attention = (record[f'train_{term}_8'] for term in ('ce', 'kl', 'attention'))
        expected = record['train_ce_14'] + 0.7 * (ce + 0.5 * kl + 0.2 * attention)
        assert record['train_loss'] == pytest.approx(expected, rel=1e-4)


def test_timm_reloads_the_same_accuracy(trained):
    """Catches saved weights, statistics or preprocessing that are not those that were measured."""
    model = timm.create_model(f'local-dir:{trained}', pretrained=True).eval()
    assert model.trained_depths == (14, 8)
    data = load_image_data('digits')
    transform = create_transform(**{
        key: model.pretrained_cfg[key] for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')})
    images = torch.stack([transform(row['image'].convert('RGB')) for row in data.validation])
    labels = torch.tensor(data.validation['label'])
    for depth, accuracy in top1(read(trained)).items():
        with torch.no_grad():
            hits = (model(images, depth=depth).argmax(dim=1) == labels).sum()
        assert 100 * int(hits) / 899 == pytest.approx(accuracy, abs=1e-3)


@pytest.mark.parametrize('weights', [
    ['--model', 'local-dir:{folder}', '--pretrained'],
    [*MODEL, '--initial-checkpoint', '{folder}/model.safetensors'],
])
def test_evaluate_reproduces_the_accuracy(trained, weights, capsys):
    """Catches an evaluation of other weights, depths or images than the training's, and one that writes unasked."""
    weights = [argument.format(folder=trained) for argument in weights]
    run('--evaluate', *weights, '-vb', 100, '-j', 0)
    assert not Path('output').exists()
    printed = capsys.readouterr().out
    run('--evaluate', *weights, '--output', 'out')
    assert read('out', 'evaluation.json')['depths'] == read(trained)['depths']
    assert all(f'{accuracy:.2f}' in printed for accuracy in top1(read(trained)).values())


def test_single_images_are_evaluated(trained, capsys):
    """Catches the need of batch norm for more than one value, where it is not trained; and JSON amid other lines."""
    run('--evaluate', '--pretrained', '--model', f'local-dir:{trained}', '--img-size', 4, '-b', 1, '-j', 0,
        '--output', 'out', *few_digits(), '--json')
    assert read('out', 'evaluation.json')['validation_images'] == 40
    assert json.loads(capsys.readouterr().out) == read('out', 'evaluation.json')


def test_images_of_a_folder_and_pretrained_weights(trained):
    """Catches a classifier that is not replaced for other classes, and a second run that overwrites the first."""
    write_images(Path('set/train'), range(60))
    write_images(Path('set/test'), range(60, 90))
    for _ in range(2):
        run(
            '--model', f'local-dir:{trained}', '--pretrained', '--dataset', 'set', '--epochs', 1, '-b', 30, '-j', 0,
            '--num-classes', 12, '--mixed-precision', 'bf16',
        )
    assert sorted(p.name for p in Path('output').iterdir()) == ['ddnn_resnet20-set', 'ddnn_resnet20-set-1']
    config = read('output/ddnn_resnet20-set', 'config.json')
    assert config['num_classes'] == 12
    assert read('output/ddnn_resnet20-set')['mixed_precision'] == 'bf16'


@pytest.mark.slow
def test_the_full_net_trains_alone_first():
    """Catches sub-nets that train from the start, another start, another teacher, or a run that resumes otherwise."""
    short = [*FAST, *few_digits(), '-b', 32]  # 11 updates in an epoch
    both = [*short, '--epochs', 2, '--model-ema', '--private', 'affine', 'classifier', '--alpha', 1]
    first = ['--full-net-epochs', 1, '--frozen-teacher', '--weights', '8=0.5', '--best-by', 8]
    run(*both, *first, '--checkpoint-interval', 4, '--checkpoint-hist', 9, '--output', 'out')
    alone, records = history('out/full_net'), history('out')
    terms = [{name for name in record if name.startswith('train_')} for record in (*alone, *records)]
    every = {f'train_{term}_{depth}' for depth in (14, 8) for term in ('ce', 'kl', 'attention')}
    assert terms == [{'train_loss', 'train_ce_14'}, *2 * [{'train_loss'} | every]]
    assert alone[-1]['lr'] == pytest.approx(0, abs=1e-9)
    run(*both, '--epochs', 1, '--subnets', '--output', 'plain')
    assert_same_run('plain', 'out/full_net')
    for path in ('out/full_net', 'out'):
        for updates in (11, 12, 16, 20, 22):
            shutil.rmtree(f'{path}/checkpoints/step-{updates:08d}', ignore_errors=True)
        shutil.copytree(f'{path}/checkpoints', Path(path.replace('out', 'again'), 'checkpoints'))
    run(*both, *first, '--resume', 'auto', '--output', 'again')
    assert_same_run('again', 'out')
    assert_same_run('again/full_net', 'out/full_net')
    # The frozen copy knows the classes that the full-net does
    run(*short, '--epochs', 1, '--num-classes', 12, '--full-net-epochs', 1, '--frozen-teacher', '--output', 'more')
    assert read('more')['depths'] and read('more', 'config.json')['num_classes'] == 12


@pytest.mark.slow
def test_a_run_does_not_depend_on_workers():
    """Catches batches, mixup or dropout that change with the number of worker processes, or from run to run."""
    options = ['--epochs', 2, '--mixup', 0.2, '--cutmix', 1, '--drop', 0.1, '--aa', 'rand-m5', '--reprob', 0.2]
    for workers in (0, 2):
        run(*FAST, *few_digits(), *options, '-b', 16, '-j', workers, '--output', f'out{workers}')
    assert_same_run('out0', 'out2')


def test_mixup_is_a_function_of_seed_epoch_and_batch(monkeypatch):
    """Catches mixing that depends on random numbers drawn before, and would not be the same after a restart."""
    draw, drawn = Mixup._params_per_batch, []

    def record(mixup):
        drawn.append(draw(mixup)[0])
        return drawn[-1], False

    def record_and_draw_more(mixup):
        return record(mixup), np.random.rand()

    options = [*FAST, *few_digits(), '--epochs', 2, '-b', 128, '--mixup', 1]
    monkeypatch.setattr(Mixup, '_params_per_batch', record)
    run(*options, '--output', 'out0')
    first, drawn[:] = list(drawn), []
    monkeypatch.setattr(Mixup, '_params_per_batch', lambda mixup: record_and_draw_more(mixup)[0])
    run(*options, '--output', 'out1')
    assert drawn == first
    assert len(set(first)) == 4


def test_averaged_weights_and_other_options(capsys):
    """Catches options that do not work together, and averaged weights of which not they are saved and reported."""
    run(
        *FAST, *few_digits(), '--epochs', 2, '-b', 16, '--model-ema', '--model-ema-decay', 0.9, '--model-ema-warmup',
        '--bce-loss', '--smoothing', 0.1, '--mixup', 0.2, '--clip-grad', 1, '--grad-accum-steps', 2,
        '--no-channels-last', '--grad-checkpointing', '--drop-path', 0.1, '--color-jitter', 0.2, '--train-crop-mode',
        'rrc', '--scale', 0.5, 1, '--hflip', 0.1, '--attention', 'standardized', '--stages', -1, '--temperature', 2,
        '--sched', 'constant', '--log-interval', 10, '--output', 'out',
    )
    record, summary = history('out')[-1], read('out')
    assert summary['weights'] == 'of epoch 2 of 2, averaged'
    assert top1(summary) == {14: record['ema_top1_14'], 8: record['ema_top1_8']}
    assert record['lr'] == 0.02
    assert 'batch 10/22: loss' in capsys.readouterr().out
    run('--evaluate', '--pretrained', '--model', 'local-dir:out', '--output', 'out', '-j', 0, *few_digits())
    assert read('out', 'evaluation.json')['depths'] == summary['depths']


@pytest.mark.slow
def test_averaged_weights_differ():
    """Catches an average that is never updated, or is the weights themselves."""
    run(*FAST, '--epochs', 2, '--stages', 0, 1, 2, '--model-ema', '--model-ema-decay', 0.5, '--output', 'out')
    record = history('out')[-1]
    assert record['ema_top1_14'] != record['top1_14']
    assert record['ema_top5_14'] > 55  # chance is 50 %


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run():
    """Catches a default that no longer reaches 95 % at every depth, and a script that only runs in the checkout.

    Measured: 97.3 to 98.4 %.
    """
    subprocess.run(
        [sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch', '--num_processes', '1', SCRIPT],
        env=dict(os.environ, ACCELERATE_USE_CPU='1'), check=True,
    )
    accuracy = top1(read('output/ddnn_resnet20-digits'))
    assert accuracy.keys() == {20, 14, 8}
    assert min(accuracy.values()) > 95, accuracy
