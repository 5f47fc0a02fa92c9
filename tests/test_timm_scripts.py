"""timm's own scripts with this package in them, as their stand-ins in `timm_scripts/` use timm.

Each test says which fault it catches.
"""
import functools
import io
import json
import logging
import os
import re
import runpy
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
from helpers.training import ROOT, fork, join
from sklearn.datasets import load_digits
from timm.models import load_checkpoint, save_for_hf

from timm_ddnn import EKDLoss

pytestmark = pytest.mark.usefixtures('surroundings')

SCRIPTS = Path(__file__).parent / 'timm_scripts'
TRAIN, VALIDATE, EXPORT = (SCRIPTS / f'{name}.py' for name in ('train', 'validate', 'onnx_export'))
TRAIN_TIMM, RUN_TIMM = (ROOT / 'train_scripts' / f'{name}.py' for name in ('train_timm', 'run_timm'))
# timm's zeros in the last norms would make the depths of a fresh model equal
ARGS = dict(channels=(8, 16, 32), layers=(2, 2, 2), subnets=((1, 1, 1),), zero_init_last=False)
MODEL = ['--model', 'ddnn_resnet20', '--model-kwargs', *(f'{name}={value}' for name, value in ARGS.items())]
OPTIONS = ['--ekd-alpha', 0.5, *MODEL, '--ekd-weights', '8=0.5', '--model-ema']


def start(script, *args):
    """Run a script in this process: importing torch again takes longer than most of these runs."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with ExitStack() as stack:
        for module, name in (
                (timm.task.TrainingTask, '__init__'), (timm.task, 'ClassificationTask'),
                (timm.task.classification, 'ClassificationTask'), (timm, 'create_model'), (timm.models, 'create_model'),
                (timm.models._factory, 'create_model')):  # what the scripts replace
            stack.enter_context(mock.patch.object(module, name, getattr(module, name)))
        stack.enter_context(mock.patch.object(sys, 'argv', [str(script), *map(str, args)]))
        stack.enter_context(mock.patch.object(sys, 'path', list(sys.path)))
        stack.enter_context(mock.patch.object(logging.root, 'handlers', list(logging.root.handlers)))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        try:
            runpy.run_path(str(script), run_name='__main__')
        except SystemExit as e:
            status = e.code or 0
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def run(*args):
    process = start(*args)
    assert process.returncode == 0, process.stderr
    return process.stdout


def log(folder):
    return json.loads(Path(folder, 'log.json').read_text())


def read(folder, ema=False):
    model = timm.create_model('ddnn_resnet20', **ARGS)
    load_checkpoint(model, str(Path(folder, 'last.pth.tar')), use_ema=ema)
    return model.eval()


def digits():
    """The stand-ins' images and labels."""
    data = load_digits()
    images = torch.tensor(data.images / 8 - 1, dtype=torch.float32)[:1024, None]
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    return images, torch.tensor(data.target)[:1024]


def top1(model, depth):
    images, target = digits()
    with torch.no_grad():
        return 100 * float((model(images, depth=depth).argmax(1) == target).double().mean())


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder of two epochs by train.py with the EKDTask, with everything on that a user may turn on."""
    folder = tmp_path_factory.mktemp('trained')
    run(TRAIN_TIMM, TRAIN, *OPTIONS, '--output', folder)
    return folder


def test_train_py_as_it_is_trains_the_full_net():
    """Catches a plugin that does not register by its import, and a default forward that is not one tensor."""
    run(TRAIN, '--device-modules', 'timm_ddnn', *MODEL, '--output', 'out')
    assert log('out')['task'] == 'ClassificationTask'
    assert log('out')['keys'] == ['loss', 'output']
    model = read('out')
    assert model.trained_depths == (14,)
    assert top1(model, 14) > 60


def test_the_task_in_the_place_of_train_pys_own(trained):
    """Catches a task that is not used, options that do not arrive, and a depth that does not learn or is not saved."""
    assert log(trained)['task'] == 'EKDTask'
    assert log(trained)['keys'] == ['attention_8', 'ce_14', 'ce_8', 'kl_8', 'loss', 'output']
    for ema in (False, True):
        model = read(trained, ema=ema)
        assert model.trained_depths == (14, 8)
        assert min(top1(model, depth) for depth in (14, 8)) > 60


@pytest.mark.slow
def test_another_family():
    """Catches a script for ResNets alone."""
    kwargs = "base='vit_tiny_patch16_224'", 'img_size=16', 'patch_size=4', 'embed_dim=24'
    run(TRAIN_TIMM, TRAIN, '--model', 'dynamic_timm', '--model-kwargs', *kwargs, '--epochs', 1, '--output', 'out')
    assert {'ce_12', 'ce_8', 'ce_4', 'attention_4'} < set(log('out')['keys'])


def test_options_reach_the_loss():
    """Catches an option of the loss under another name or with another value than the one given."""
    options = dict(temperature=3.0, alpha=0.7, beta=0.9, attention='standardized', stages=(1, -1), weights={8: 0.25})
    flags = ['--ekd-temperature', 3, '--ekd-alpha', 0.7, '--ekd-beta', 0.9, '--ekd-attention', 'standardized',
             '--ekd-stages', 1, -1, '--ekd-weights', '8=0.25']
    # --criterion: handed as such, as by scripts before timm 1.0.31
    run(TRAIN_TIMM, TRAIN, *MODEL, *flags, '--criterion', '--epochs', 1, '--seed', 5, '--output', 'out')
    timm.utils.random_seed(5, 0)
    model = timm.create_model('ddnn_resnet20', num_classes=10, **ARGS).train()
    images, target = digits()
    first = torch.randperm(1024, generator=torch.Generator().manual_seed(0))[:32]
    with torch.no_grad():
        outputs = model(images[first], depth='all')
    assert log('out')['losses'][0] == pytest.approx(EKDLoss(**options)(outputs, target[first]).item(), rel=1e-5)
    for name in options:  # each of them counts
        others = {key: value for key, value in options.items() if key != name}
        assert log('out')['losses'][0] != pytest.approx(EKDLoss(**others)(outputs, target[first]).item(), rel=1e-5)


def test_other_options_are_passed_on():
    """Catches options of train.py that are taken for ours, negative numbers and arguments without a flag among them."""
    run(TRAIN_TIMM, '--ekd-beta', 0, TRAIN, 'folder', *MODEL, '--mean', -0.5, 0.5, '--mixup', 0.2, '--clip-grad', 1,
        '--amp', '--grad-accum-steps', 2, '--epochs', 1, '--output', 'out')
    assert (log('out')['data_dir'], log('out')['mean']) == ('folder', [-0.5, 0.5])
    assert log('out')['keys'] == ['ce_14', 'ce_8', 'kl_8', 'loss', 'output']


def test_the_average_teaches():
    """Catches an average that train.py keeps and the task does not ask, and a full-net that it does not teach."""
    run(TRAIN_TIMM, TRAIN, *OPTIONS, '--ekd-ema-teacher', '--epochs', 1, '--output', 'out')
    assert log('out')['keys'] == ['attention_14', 'attention_8', 'ce_14', 'ce_8', 'kl_14', 'kl_8', 'loss', 'output']


def test_a_net_that_was_trained_before_teaches():
    """Catches a teacher whose name does not arrive."""
    run(TRAIN_TIMM, TRAIN, *MODEL, '--ekd-teacher', 'ddnn_resnet20.ekd_cifar10', '--epochs', 1, '--output', 'out')
    assert log('out')['keys'] == ['attention_14', 'attention_8', 'ce_14', 'ce_8', 'kl_14', 'kl_8', 'loss', 'output']


def test_resume_goes_on_as_train_py_does(trained):
    """Catches a checkpoint of the task that train.py's --resume cannot read or reads in part."""
    run(TRAIN_TIMM, TRAIN, *OPTIONS, '--epochs', 1, '--output', 'out')
    run(TRAIN_TIMM, TRAIN, *OPTIONS, '--resume', 'out/last.pth.tar', '--output', 'out')
    assert log('out')['losses'] == log(trained)['losses'][32:]
    for ema in (False, True):
        mine, expected = read('out', ema=ema).state_dict(), read(trained, ema=ema).state_dict()
        assert not [name for name in expected if not torch.equal(mine[name], expected[name])]


@pytest.mark.slow
def test_compiled_model():
    """Catches a compiled model that runs at one depth alone, or whose checkpoint holds other names."""
    run(TRAIN_TIMM, TRAIN, *MODEL, '--torchcompile', 'aot_eager', '--output', 'out')
    assert log('out')['keys'][1:3] == ['ce_14', 'ce_8']
    assert top1(read('out'), 8) > 60


def test_two_processes():
    """Catches parameters without a gradient and buffers changed in place, which DDP does not bear."""
    script = functools.partial(run, TRAIN_TIMM, TRAIN, *MODEL, '--model-ema', '--output', 'out')
    statuses, printed = join(fork(processes=2, program=script))
    assert statuses == [0, 0], printed
    assert log('out')['world_size'] == 2
    assert len(log('out')['losses']) == 2 * 16
    losses = log('out')['losses']
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert read('out', ema=True).trained_depths == (14, 8)


def test_other_scripts_run_the_depth_asked_for(trained):
    """Catches a model of the default depth where another was asked for, and weights that the script cannot load."""
    model, checkpoint = read(trained), Path(trained, 'last.pth.tar')
    assert top1(model, 14) != top1(model, 8)
    for depth, flags, options in [(14, [], []), (8, ['--depth', 8], []), (8, ['--depth', 8], ['--torchscript'])]:
        result = json.loads(run(RUN_TIMM, *flags, VALIDATE, *MODEL, '--checkpoint', checkpoint, *options))
        assert result['top1'] == pytest.approx(top1(model, depth))
        assert result['arguments'] == [*MODEL, '--checkpoint', str(checkpoint), *options]


def test_the_parameters_are_those_of_the_depth_that_runs(trained):
    """Catches the number of the full-net's parameters beside the accuracy of a sub-net."""
    model, checkpoint = read(trained), Path(trained, 'last.pth.tar')
    numbers = []
    for depth in (14, 8):
        result = json.loads(run(RUN_TIMM, '--depth', depth, VALIDATE, *MODEL, '--checkpoint', checkpoint))
        assert result['parameters'] == sum(p.numel() for p in model.extract(depth).parameters())
        numbers.append(result['parameters'])
    assert numbers[0] > numbers[1]


def test_export_by_a_script():
    """Catches a depth that does not reach a script which creates its model as `timm.create_model`."""
    for depth in (20, 14):
        run(RUN_TIMM, '--depth', depth, EXPORT, f'{depth}.pt2', '--model', 'ddnn_resnet20')
        nodes = torch.export.load(f'{depth}.pt2').graph.nodes
        assert sum('conv2d' in str(node.target) for node in nodes) == depth - 1


@pytest.mark.parametrize('arguments, message', [
    ([TRAIN_TIMM, 'nowhere.py'], "the first argument must be a script, got 'nowhere.py'"),
    ([TRAIN_TIMM, TRAIN, '--ekd-gamma', 1],
     '--ekd- must be of --ekd-temperature, .*--ekd-weights, --ekd-teacher, --ekd-ema-teacher, got --ekd-gamma'),
    ([TRAIN_TIMM, TRAIN, '--ekd-alpha', -1], r'alpha must be a number from 0 to 1e\+06, got -1'),
    ([TRAIN_TIMM, TRAIN, '--ekd-temperature', 0], 'temperature must be a number from 0.01 to 100, got 0'),
    ([TRAIN_TIMM, TRAIN, '--ekd-stages', 'x'], "--ekd-stages: invalid int value: 'x'"),
    ([TRAIN_TIMM, TRAIN, '--ekd-weights', '8'], "must be DEPTH=WEIGHT such as '26=0.5', got '8'"),
    ([TRAIN_TIMM, TRAIN, *MODEL, '--ekd-ema-teacher'], '--ekd-ema-teacher needs the average: --model-ema'),
    ([TRAIN_TIMM, TRAIN, *OPTIONS, '--ekd-ema-teacher', '--model-ema-force-cpu'],
     '--ekd-ema-teacher needs the average where the model is, got --model-ema-force-cpu'),
    ([TRAIN_TIMM, TRAIN, *OPTIONS, '--ekd-ema-teacher', '--ekd-teacher', 'some'],
     '--ekd-teacher: not allowed with argument --ekd-ema-teacher'),
    ([TRAIN_TIMM, TRAIN, *MODEL, '--ekd-teacher', 'some', '--mean', 0.5],
     "--ekd-teacher needs images of the model's own mean and std, got --mean"),
    ([TRAIN_TIMM, TRAIN, *MODEL, '--ekd-teacher', 'some/where'],
     "model 'some/where' cannot be created: .*'local-dir:some/where' to load from a local folder"),
    ([TRAIN_TIMM, TRAIN, *MODEL, '--ekd-teacher', 'vit', '--ekd-beta', 0],
     r"Input height \(16\) doesn't match model \(160\)"),
    ([TRAIN_TIMM, TRAIN, *MODEL, '--ekd-weights', '10=1'], r'weights must be for sub-nets of \(8,\), got \[10\]'),
    ([TRAIN_TIMM, TRAIN, *MODEL, '--ekd-stages', '3'], r'stages must be from -3 to 2, got \[3\]'),
    ([TRAIN_TIMM, TRAIN, '--model', 'cifar_resnet8'], r'trains dynamic-depth models \(ddnn_\*\), got CifarResNet'),
    ([TRAIN_TIMM, TRAIN, *MODEL, '--kd-model-name', 'cifar_resnet8'], 'ask for LogitDistillationTask'),
    ([RUN_TIMM, 'nowhere.py'], "the first argument must be a script, got 'nowhere.py'"),
    ([RUN_TIMM, '--depth', 'x', VALIDATE], "--depth: must be an integer of at least 1, got 'x'"),
    ([RUN_TIMM, '--depth', 10, VALIDATE, *MODEL], r'depth must be one of \(14, 8\), got 10'),
    ([RUN_TIMM, '--depth', 14, VALIDATE, '--model', 'resnet18'], "for dynamic-depth models .*, got model 'resnet18'"),
    ([RUN_TIMM, '--depth', 14, EXPORT, 'x.pt2', '--model', 'local-dir:vit'], "models .*, got model 'local-dir:vit'"),
])
def test_wrong_input_is_one_line_and_status_2(arguments, message):
    """Catches a traceback, or options that are passed over in silence."""
    save_for_hf(timm.create_model('test_vit', num_classes=10), 'vit', model_args=dict(dynamic_img_size=False))
    process = start(*arguments)
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and re.search(message, lines[0]), process.stderr
    assert 'Traceback' not in process.stderr


def test_help():
    """Catches options that nobody can find, and a script that does not start by itself."""
    command = [sys.executable, '-W', 'error', str(TRAIN_TIMM), '--help']
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert '--ekd-temperature' in printed and 'SCRIPT' in printed
    assert '--depth' in run(RUN_TIMM, '--help')
    assert start(TRAIN_TIMM).returncode == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_lowest_timm(tmp_path):
    """Catches what only a newer timm has: runs this file and the task's tests with the lowest version allowed."""
    lowest, = (re.fullmatch(r'timm>=(\S+)', r)[1] for r in requires('timm_ddnn') if re.match('timm>=', r))
    install = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps', '--target', tmp_path]
    subprocess.run([*install, f'timm=={lowest}'], check=True)
    code = f'import timm, sys, pytest; assert timm.__version__ == {lowest!r}; sys.exit(pytest.main(sys.argv[1:]))'
    process = subprocess.run(
        [sys.executable, '-c', code, '-q', '-m', 'not slow', Path(__file__), Path(__file__).parent / 'test_task.py'],
        env=dict(os.environ, PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}', OMP_NUM_THREADS='1'), cwd=ROOT,
        capture_output=True, text=True,
    )
    assert process.returncode == 0, process.stdout
