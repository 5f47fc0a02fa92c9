"""Precision, compilation, memory formats and trackers of the training script, each by what it does to a real run."""
import copy
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import timm
import torch
from helpers.training import FAST, assert_same_run, few_digits, history, read, run
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import save_for_hf

from timm_ddnn import EKDLoss, EKDTask

pytestmark = pytest.mark.usefixtures('surroundings')

@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take longer than most of these runs; other tests look at them."""
    for name in ('plot_accuracy', 'plot_curves'):
        monkeypatch.setattr(f'timm_ddnn.train.output.{name}', lambda *args: None)


SHORT = [*FAST, *few_digits(), '-b', 32, '--epochs', 2]  # of 22 updates
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Folder of a run without options, in float32."""
    folder = tmp_path_factory.mktemp('plain')
    run(*SHORT, '--output', folder)
    return folder


@pytest.fixture
def seen(monkeypatch):
    """What the task and the loss are given, by name."""
    seen = {}

    def forward(task, images, target, original=EKDTask.forward):
        channels_last = dict(memory_format=torch.channels_last)
        seen['images'] = images.is_contiguous(**channels_last), images.is_contiguous()
        seen['input'] = images
        weight = task.trainable_module.layer2[0].conv1.weight
        seen['weights'] = weight.is_contiguous(**channels_last), weight.is_contiguous()
        return original(task, images, target)

    def terms(loss, outputs, target, teacher=None, original=EKDLoss.terms):
        seen['logits'] = {output.logits.dtype for output in outputs.values()}
        seen['teacher'] = teacher
        return original(loss, outputs, target, teacher)

    monkeypatch.setattr(EKDTask, 'forward', forward)
    monkeypatch.setattr(EKDLoss, 'terms', terms)
    return seen


def losses(folder):
    return [record['train_loss'] for record in history(folder)]


@pytest.mark.slow
def test_bfloat16(plain, seen):
    """Catches an option that is reported and not applied, and weights that are rounded with the activations."""
    run(*SHORT, '--mixed-precision', 'bf16', '--output', 'out')
    assert seen['logits'] == {torch.bfloat16}
    assert read('out')['mixed_precision'] == 'bf16'
    assert losses('out') == pytest.approx(losses(plain), rel=0.02)
    assert losses('out') != losses(plain)
    weights = load_file('out/model.safetensors')
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}
    weight = weights['layer1.0.conv1.weight']
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize('given, expected', [
    ([], (15, 0.1, 1)),
    (['--pretrained'], (10, 0.03, 1)),
    (['--initial-checkpoint', __file__, '--lr', 0.3], (10, 0.3, 1)),
    (['--pretrained', '--epochs', 15, '--lr', 0.1, '--warmup-epochs', 0], (15, 0.1, 0)),
])
def test_trained_weights_have_defaults_of_their_own(given, expected, monkeypatch):
    """Catches weights that are lost by the learning rate of random ones, and an option that is given and not taken."""
    options = []
    monkeypatch.setattr('timm_ddnn.train.recipe.train', lambda args, *_: options.append(args))
    run(*given)
    assert (options[0].epochs, options[0].lr, options[0].warmup_epochs) == expected


def test_float32_is_the_default(seen):
    """Catches a precision that comes from the machine's configuration unasked."""
    run(*SHORT, '--epochs', 1, '--output', 'out')
    assert seen['logits'] == {torch.float32}


@pytest.mark.parametrize('options, expected', [([], (True, False)), (['--no-channels-last'], (False, True))])
def test_channels_last(options, expected, plain, seen):
    """Catches images or weights in the other memory format, which costs speed and says nothing."""
    run(*SHORT, *options, '--output', 'out')
    assert seen['images'] == seen['weights'] == expected
    assert losses('out') == pytest.approx(losses(plain), rel=1e-3)


def test_gradient_checkpointing(plain, monkeypatch):
    """Catches an option that recomputes nothing, and one that changes what is learned.

    Running statistics differ: a norm that runs twice counts its batch twice, in stock timm as well.
    """
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, 'checkpoint', lambda *args, **kwargs: (
        calls.append(None), checkpoint(*args, **kwargs))[1])
    run(*SHORT, '--epochs', 1, '--sched', 'constant', '--output', 'plain')
    assert not calls
    run(*SHORT, '--epochs', 1, '--sched', 'constant', '--grad-checkpointing', '--output', 'out')
    assert calls
    mine, expected = (load_file(f'{folder}/model.safetensors') for folder in ('out', 'plain'))
    for name, tensor in expected.items():
        if 'running' not in name and 'num_batches' not in name:
            assert torch.allclose(mine[name], tensor, atol=1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
def test_torchcompile(backend, plain):
    """Catches a step that breaks into several graphs or is compiled again, and checkpoints that do not load."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(*SHORT, '--torchcompile', backend, '--output', 'out')
    stats = copy.deepcopy(torch._dynamo.utils.counters)
    assert not stats['graph_break']
    assert stats['stats']['unique_graphs'] == 1
    assert losses('out') == pytest.approx(losses(plain), rel=1e-3)
    shutil.copytree('out', 'expected')
    shutil.rmtree('out/checkpoints/step-00000022')
    run(*SHORT, '--torchcompile', backend, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', 'expected')


def test_averaged_weights_of_every_depth(monkeypatch):
    """Catches an average that is evaluated or saved at one depth alone, or with the statistics of the other weights."""
    run(*SHORT, '--stages', 0, 1, 2, '--model-ema', '--model-ema-decay', 0.5, '--output', 'out')
    record = history('out')[-1]
    model = timm.create_model('local-dir:out', pretrained=True)
    state = load_file('out/checkpoints/step-00000022/model.safetensors')
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(record[f'ema_top1_{depth}'] != record[f'top1_{depth}'] for depth in (14, 8))
    run('--evaluate', '--pretrained', '--model', 'local-dir:out', '--output', 'out', '-j', 0, *few_digits())
    assert [row['top1'] for row in read('out', 'evaluation.json')['depths']] == [
        record[f'ema_top1_{depth}'] for depth in (14, 8)]


def test_the_average_teaches(seen, plain):
    """Catches an option that does nothing, and a run that resumes with another teacher."""
    average = ['--model-ema', '--model-ema-decay', 0.5, '--ema-teacher']
    run(*SHORT, *average, '--output', 'out')
    assert seen['teacher'] is not None
    first, last = history('out')
    assert {'train_kl_14', 'train_attention_14', 'train_kl_8'} <= first.keys()
    assert last['train_loss'] != history(plain)[-1]['train_loss']
    shutil.copytree('out', 'expected')
    shutil.rmtree('out/checkpoints/step-00000022')
    run(*SHORT, *average, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', 'expected')


def test_a_net_that_was_trained_before_teaches(seen, plain, capsys):
    """Catches a teacher that is not asked, is not the one of the weights, and a run that resumes with another."""
    run(*SHORT, '--teacher', plain, '--output', 'out')
    record = history('out')[-1]
    assert {'train_kl_14', 'train_attention_14', 'train_kl_8', 'train_attention_8'} <= record.keys()
    assert not [name for name in load_file('out/model.safetensors') if 'teacher' in name]
    shutil.copytree('out', 'expected')
    shutil.rmtree('out/checkpoints/step-00000022')
    run(*SHORT, '--teacher', plain, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', 'expected')
    teacher = timm.create_model(f'local-dir:{plain}', pretrained=True).eval()
    with torch.no_grad():
        logits = teacher(seen['input'])
    torch.testing.assert_close(seen['teacher'].logits, logits)
    shutil.copytree(plain, 'teacher')
    run(*SHORT, '--teacher', 'teacher', '--output', 'other', '--epochs', 1)
    shutil.copy('out/model.safetensors', 'teacher')
    config = read('teacher', 'config.json') | {'weights_sha256': read('out', 'config.json')['weights_sha256']}
    Path('teacher/config.json').write_text(json.dumps(config))
    with pytest.raises(SystemExit, match='2'):
        run(*SHORT, '--teacher', 'teacher', '--output', 'other', '--epochs', 1, '--resume', 'auto')
    sums = [read(folder, 'summary.json')['teacher_sha256'] for folder in ('out', 'other')]
    assert sums[0] == sums[1] and f"teacher_sha256 was '{sums[0]}', got '" in capsys.readouterr().err


def test_any_net_of_timm_teaches_without_attention(seen):
    """Catches a teacher that must be of this library."""
    teacher = timm.create_model('test_resnet', num_classes=10)
    save_for_hf(teacher, 'teacher')
    run(*SHORT, '--epochs', 1, '--teacher', 'teacher', '--beta', 0, '--output', 'out')
    assert {name for name in history('out')[-1] if 'kl' in name} == {'train_kl_14', 'train_kl_8'}
    assert seen['teacher'].features == []


@gpu
@pytest.mark.parametrize('options', [['--mixed-precision', 'fp16'], ['--sync-bn', '--mixed-precision', 'bf16']])
def test_on_a_gpu(options, plain):
    """Catches a scale of the loss that is not saved, and options of GPUs that do not train."""
    run(*SHORT, *options, '--checkpoint-interval', 5, '--output', 'out', on_gpu=True)
    assert losses('out') == pytest.approx(losses(plain), rel=0.05)
    scaler = Path('out/checkpoints/step-00000022/scaler.pt')
    assert scaler.exists() == ('fp16' in options)
    assert not scaler.exists() or torch.load(scaler)['scale'] >= 1


# Trackers

def logged_by_tensorboard():
    events = EventAccumulator('out/tensorboard').Reload()
    return {(name, event.step): event.value for name in events.Tags()['scalars'] for event in events.Scalars(name)}


def logged_by_trackio():
    with sqlite3.connect('trackio/timm_ddnn.db') as database:
        rows = database.execute('select step, metrics from metrics').fetchall()
    return {(name, step): value for step, metrics in rows for name, value in json.loads(metrics).items()}


@pytest.mark.parametrize(
    'tracker', ['tensorboard', *(pytest.param(name, marks=pytest.mark.slow) for name in ('trackio', 'wandb'))])
def test_a_tracker_gets_the_metrics_by_their_names(tracker, tmp_path, monkeypatch):
    """Catches metrics that are missing, named otherwise than in metrics.jsonl, or at another step than the updates."""
    logged = {}
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
    if tracker == 'wandb':
        import wandb

        def log(self, values, step, original=wandb.Run.log):
            logged.update({(name, step): value for name, value in values.items()})
            original(self, values, step=step)

        monkeypatch.setattr(wandb.Run, 'log', log)
    run(*SHORT, '--grad-accum-steps', 2, '--log-interval', 4, '--report-to', tracker, '--output', 'out')
    if tracker == 'tensorboard':
        logged = logged_by_tensorboard()
    elif tracker == 'trackio':
        logged = logged_by_trackio()
    records = history('out')
    assert [record['updates'] for record in records] == [6, 12]
    for record in records:
        for name, value in record.items():
            assert logged.pop((name, record['updates'])) == pytest.approx(value, rel=1e-5, abs=1e-12), name
    # Between the epochs' ends: the loss so far
    names = [name for name in records[0] if name.startswith('train_')] + ['epoch', 'updates', 'lr']
    assert {key for key in logged if not key[0].startswith('system')} == {
        (name, step) for name in names for step in (2, 4, 8, 10)}


def test_a_tracker_that_is_not_installed(monkeypatch, capfd):
    """Catches a run of hours whose metrics go nowhere."""
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])
    with pytest.raises(SystemExit) as exit_info:
        run(*SHORT, '--report-to', 'wandb', '--output', 'out')
    assert exit_info.value.code == 2
    assert capfd.readouterr().err.endswith('error: --report-to wandb needs its package: pip install wandb\n')


def test_a_run_that_resumes_is_the_same_run_to_the_tracker(monkeypatch):
    """Catches a preempted job whose curves are scattered over as many runs as it had starts."""
    names = []

    def init_trackers(accelerator, project, config, kwargs):
        names.append((kwargs['wandb']['id'], kwargs['trackio']['name']))

    monkeypatch.setattr('accelerate.Accelerator.init_trackers', init_trackers)
    for _ in range(2):
        run(*SHORT, '--report-to', 'tensorboard', '--output', 'out', '--resume', 'auto')
    run(*SHORT, '--report-to', 'tensorboard', '--output', 'other/out')
    assert names[0] == names[1] != names[2]
    assert_same_run('out', 'other/out')
