"""Runs that are killed, stopped or out of disk, and go on. Each test says which fault it catches."""
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.training import FAST, SCRIPT, assert_same_run, checkpoints, history, read, run
from safetensors.torch import load_file

import timm_ddnn.evaluation.predict
from timm_ddnn import EKDLoss
from timm_ddnn.train.checkpoint import Checkpoints
from timm_ddnn.train.signals import EXIT_STOPPED

pytestmark = pytest.mark.usefixtures('surroundings')

KILLED_RUN = Path(__file__).parent / 'killed_run.py'
PLAIN = [*FAST, '--epochs', 2]  # of 44 updates
# Everything that keeps a state of its own: dropout draws random numbers, AdamW has moments
FULL = [
    *PLAIN, '--mixup', 0.2, '--cutmix', 1, '--drop', 0.1, '--drop-path', 0.1, '--reprob', 0.2, '--grad-accum-steps', 2,
    '--model-ema', '--model-ema-decay', 0.9,
]


def start(*args, program=(SCRIPT,)):
    return subprocess.Popen(
        [sys.executable, *map(str, (*program, *args))], text=True, start_new_session=True,
        env=dict(os.environ, ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1'),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def fail_on(capfd, message):
    """Assert that one line said what is wrong."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error:')]
    assert len(lines) == 1, lines
    assert re.search(message, lines[0]), lines[0]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Folder of a run with everything on that nothing disturbed, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    run(*FULL, '--checkpoint-interval', 5, '--checkpoint-hist', 100, '--output', folder)
    return folder


@pytest.fixture
def copy_of(uninterrupted):
    """Copy the run as it was at its checkpoint of an update."""
    def copy(updates):
        for path in Path(uninterrupted).glob('checkpoints/step-*'):
            if int(path.name[-8:]) <= updates:
                shutil.copytree(path, Path('out/checkpoints') / path.name)
    return copy


# Kills

def kill_and_go_on(log, folder, expected, kills, rng):
    """Kill runs at random moments, half of them while a checkpoint is written, until there were enough; compare each
    run that comes to its end with `expected`. Returns a line per kill.
    """
    arguments = [*FULL, '--checkpoint-interval', 3, '--output', folder, '--resume', 'auto']
    lines = []
    while len(lines) < kills:
        moment, seconds = ('step', rng.uniform(0, 1.2)) if rng.random() < 0.5 else ('save', rng.uniform(0, 0.03))
        log.write_text('')
        process = start(*arguments, program=(KILLED_RUN, log, moment, seconds, SCRIPT))
        output = process.communicate()[0]
        events = log.read_text().split()
        updates = [int(event) for event in events if event.isdigit()]
        begun = int((re.findall(r'going on from .*step-(\d+)', output) or ['0'])[0])
        assert begun == updates[0], 'another position than that of the checkpoint'
        if process.returncode == 0:
            assert_same_run(folder, expected)
            shutil.rmtree(folder)
            continue
        assert process.returncode == -signal.SIGKILL, output
        complete = [int(name[-8:]) for name in checkpoints(folder) if name.startswith('step-')]
        newest = max(complete, default=0)
        assert newest >= updates[-1] - 3, 'more is lost than the steps since the last checkpoint'
        writing = events.count('save') > events.count('saved')
        lines.append(
            f'kill {len(lines) + 1}: {seconds * 1000:.0f} ms after the first {moment}, update {updates[-1]}, '
            f'{"while a checkpoint was written" if writing else "between checkpoints"}; went on at {newest}'
        )
    return lines


@pytest.mark.parametrize('kills', [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_runs_end_with_the_same_weights(kills, uninterrupted, tmp_path):
    """Catches a state that is not saved or not restored, and half a checkpoint taken for one, at random moments."""
    seed = random.SystemRandom().randrange(2 ** 32)
    print('seed', seed)
    lines = kill_and_go_on(tmp_path / 'log', 'out', uninterrupted, kills, random.Random(seed))
    print('\n'.join(lines))
    if kills > 10:
        assert {'while a checkpoint was written' in line for line in lines} == {True, False}
    run(*FULL, '--checkpoint-interval', 3, '--output', 'out', '--resume', 'auto')
    assert_same_run('out', uninterrupted)


@pytest.mark.parametrize('updates', [5, 22, 25, 44])
def test_going_on_from_any_place(updates, copy_of, uninterrupted):
    """Catches a state that matters only inside an epoch, at its end, in a later one, or after the last."""
    copy_of(updates)
    for name in ('metrics.jsonl', 'model.safetensors'):  # of a later step, as after a kill
        shutil.copy(uninterrupted / name, 'out')
    run(*FULL, '-j', 2, '--resume', f'out/checkpoints/step-{updates:08d}')  # the output follows from the path
    assert_same_run('out', uninterrupted)
    assert read('out')['weights'] == 'averaged'


def test_going_on_without_mixup_ema_and_accumulation():
    """Catches a resume that rests on the averaged weights or on the seeding of mixup."""
    run(*PLAIN, '--output', 'expected')
    run(*PLAIN, '--checkpoint-interval', 30, '--checkpoint-hist', 9, '--output', 'out')
    shutil.rmtree('out/checkpoints/step-00000088')
    shutil.rmtree('out/checkpoints/step-00000060')
    shutil.rmtree('out/checkpoints/step-00000044')
    run(*PLAIN, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', 'expected')


# Which checkpoints there are

def test_newest_and_best_are_kept(monkeypatch):
    """Catches a best checkpoint that is pruned, and checkpoints that pile up."""
    accuracies = iter([20.0, 40.0, 30.0, 10.0])

    def evaluate(accelerator, model, loader, original=timm_ddnn.evaluation.predict.evaluate):
        accuracy = next(accuracies)
        return dict.fromkeys(original(accelerator, model, loader), accuracy)

    monkeypatch.setattr(timm_ddnn.evaluation.predict, 'evaluate', evaluate)
    run(*PLAIN, '--epochs', 4, '-b', 64, '--checkpoint-hist', 1, '--output', 'out')
    assert checkpoints('out') == ['step-00000044', 'step-00000088']


def test_the_end_of_a_run_is_not_gone_on_from_elsewhere(copy_of, capfd):
    """Catches a summary without a model."""
    copy_of(44)
    with pytest.raises(SystemExit):
        run(*FULL, '--resume', 'out/checkpoints/step-00000044', '--output', 'other')
    fail_on(capfd, r'step-00000044 is the end of a run, whose model is not in --output other')


def test_a_checkpoint_holds_no_foreign_objects(uninterrupted):
    """Catches weights that are not safetensors, and anything that PyTorch's restricted unpickling refuses."""
    folder = uninterrupted / 'checkpoints' / 'step-00000044'
    assert {path.name for path in folder.iterdir()} == {
        'checksums.json', 'ema_0.safetensors', 'model.safetensors', 'optimizer.bin', 'random_states_0.pkl',
        'state.json',
    }
    weights = load_file(folder / 'model.safetensors')
    model = timm.create_model('ddnn_resnet20', channels=(8, 16, 32), layers=(2, 2, 2), subnets=((1, 1, 1),))
    assert weights.keys() == {f'trainable_module.{name}' for name in model.state_dict()}
    assert load_file(folder / 'ema_0.safetensors').keys() == model.state_dict().keys()
    assert torch.load(folder / 'optimizer.bin', weights_only=True)['state']


DAMAGES = {
    'truncated': lambda path: os.truncate(path / 'optimizer.bin', 1000),
    'flipped': lambda path: flip(path / 'model.safetensors'),
    'missing': lambda path: (path / 'random_states_0.pkl').unlink(),
    'no checksums': lambda path: (path / 'checksums.json').write_text('{}'),
    'checksums cut': lambda path: os.truncate(path / 'checksums.json', 50),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
        damage, copy_of, uninterrupted, capsys, monkeypatch):
    """Catches a damaged file that is read, or one that ends the run though an older checkpoint is intact."""
    copy_of(40)
    Path('out/checkpoints/damaged-step-00000040/old').mkdir(parents=True)  # damaged before
    DAMAGES[damage](Path('out/checkpoints/step-00000040'))
    run(*FULL, '--output', 'out', '--resume', 'auto')
    printed = capsys.readouterr().out
    reason = {'truncated': 'optimizer.bin has 1000 bytes', 'flipped': 'model.safetensors has the SHA-256',
              'missing': 'random_states_0.pkl', 'no checksums': 'is empty', 'checksums cut': ''}[damage]
    assert re.search(f'step-00000040 is damaged, left aside as damaged-step-00000040: .*{reason}', printed)
    assert 'going on from out/checkpoints/step-00000035' in printed
    assert_same_run('out', uninterrupted)


def test_no_intact_checkpoint(copy_of, capfd):
    """Catches a run that begins anew, and overwrites, where somebody's hours of training lie damaged."""
    copy_of(5)
    flip(Path('out/checkpoints/step-00000005/model.safetensors'))
    for resume in ('auto', 'out/checkpoints/step-00000005'):
        with pytest.raises(SystemExit) as exit_info:
            run(*FULL, '--output', 'out', '--resume', resume)
        assert exit_info.value.code == 2
        fail_on(capfd, r'(no checkpoint in out/checkpoints is intact|is damaged): .*SHA-256')
    assert checkpoints('out') == ['step-00000005']


def test_resume_auto_begins_where_there_is_nothing():
    """Catches a first start of a preemptible job that needs another command than its restarts."""
    run(*PLAIN, '--epochs', 1, '--resume', 'auto', '--output', 'out')
    assert checkpoints('out') == ['step-00000044']


@pytest.mark.parametrize('arguments, message', [
    (['--output', 'out'], 'out has checkpoints: go on by --resume auto, or choose another folder'),
    (['--resume', 'auto'], '--resume auto needs --output'),
    (['--resume', 'nowhere'], "must be 'auto' or a folder checkpoints/step-\\*.*'nowhere'"),
    (['--resume', 'auto', '--output', 'out', '--lr', 0.1], 'lr was 0.02, got 0.1'),
    (['--resume', 'auto', '--output', 'out', '-b', 16, '--seed', 1], 'batch_size was 32, got 16; seed was 0, got 1'),
    (['--resume', 'auto', '--output', 'out', '--subnets', '2,1,1'], r'subnets was .*1, 1, 1.*, got .*2, 1, 1'),
    (['--resume', 'auto', '--output', 'out', '--model-kwargs', 'channels=8,16,64'], 'model_kwargs was .*, got .*64'),
    (['--resume', 'auto', '--output', 'out', '--epochs', 1], 'epochs was 2, got 1'),
    (['--resume', 'out/checkpoints/step-00000005'], 'step-00000005 is older than step-00000010'),
    (['--resume', 'auto', '--evaluate', '--initial-checkpoint', __file__], '--resume is for training'),
])
def test_wrong_ways_to_go_on(arguments, message, copy_of, capfd):
    """Catches a run that goes on with something else than it began with, and one that overwrites another."""
    copy_of(10)
    before = {path: path.read_bytes() for path in Path('out').rglob('*') if path.is_file()}
    with pytest.raises(SystemExit) as exit_info:
        run(*FULL, *arguments)
    assert exit_info.value.code == 2
    fail_on(capfd, message)
    assert {path: path.read_bytes() for path in Path('out').rglob('*') if path.is_file()} == before


# Full disk

@pytest.mark.parametrize('last', [15, 20])  # the next checkpoint is in the epoch, or at its end
def test_a_full_disk(last, uninterrupted, monkeypatch, capfd):
    """Catches a checkpoint lost for one that could not be written, inside an epoch and at its end."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(checkpoints, updates, *args, original=Checkpoints.save):
        original(checkpoints, updates, *args)
        if updates == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
            patch.setattr(Checkpoints, 'save', save)
            run(*FULL, '--checkpoint-interval', 5, '--output', 'out')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert exit_info.value.code == 2
    if last == 15:
        fail_on(capfd, 'checkpoint out/checkpoints/step-00000020 cannot be written: .*Left as they were: step-00000015')
        assert os.listdir('out') == ['checkpoints']
    else:
        fail_on(capfd, 'out cannot be written to: .* Checkpoints are intact')
        assert sorted(os.listdir('out')) == ['checkpoints', 'metrics.jsonl']
    assert all(name.startswith('step-') for name in checkpoints('out'))
    run(*FULL, '--checkpoint-interval', 5, '--resume', 'auto', '--output', 'out')
    assert f'going on from out/checkpoints/step-000000{last}' in capfd.readouterr().out
    assert_same_run('out', uninterrupted)


def test_a_full_disk_after_the_last_epoch(uninterrupted, monkeypatch, capfd):
    """Catches a traceback for a picture that cannot be written, and a run that then cannot be completed."""
    def plot(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr('timm_ddnn.evaluation.plots.plot_curves', plot)
        run(*FULL, '--checkpoint-interval', 5, '--output', 'out')
    assert exit_info.value.code == 2
    fail_on(capfd, 'No space left on device')
    run(*FULL, '--checkpoint-interval', 5, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', uninterrupted)
    assert Path('out/summary.json').exists()


# Numbers that are not finite

@pytest.mark.parametrize('value', ['nan', 'inf'])
def test_a_loss_that_is_not_finite_stops_the_run(value, monkeypatch, capfd):
    """Catches a run that goes on with, or saves, what is spoilt, and a message that does not say where it began."""
    calls = []

    def spoil(*args, original=EKDLoss.terms):
        terms = original(*args)
        calls.append(None)
        if len(calls) == 44 + 7:
            terms['kl_8'] = terms['kl_8'] + float(value)
            terms['loss'] = terms['loss'] + terms['kl_8']
        return terms

    monkeypatch.setattr(EKDLoss, 'terms', spoil)
    with pytest.raises(SystemExit) as exit_info:
        run(*PLAIN, '--checkpoint-interval', 10, '--output', 'out')
    assert exit_info.value.code == 2
    fail_on(capfd, r'loss is not finite in epoch 2, step 7: kl of depth 8$')
    assert checkpoints('out') == ['step-00000044', 'step-00000050']
    assert all(t.isfinite().all() for t in load_file('out/checkpoints/step-00000050/model.safetensors').values())


def test_weights_that_are_not_finite_are_not_saved(monkeypatch, capfd):
    """Catches a last step whose update spoils the weights after its loss was found finite."""
    def spoil(self, model, *args, original=timm.utils.ModelEmaV3.update, **kwargs):
        original(self, model, *args, **kwargs)
        if kwargs['step'] == 20:
            model.layer1[0].conv1.weight.data[0] = torch.nan

    monkeypatch.setattr(timm.utils.ModelEmaV3, 'update', spoil)
    with pytest.raises(SystemExit):
        run(*FULL, '--checkpoint-interval', 10, '--output', 'out')
    fail_on(capfd, r'layer1.0.conv1.weight is not finite after update 20$')
    assert checkpoints('out') == ['step-00000010']


# Signals

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, uninterrupted):
    """Catches a preemption that loses steps, hangs on its worker processes, or ends with a status that says nothing.

    The signal goes to all processes of the run, as a terminal and most schedulers send it.
    """
    process = start(*FULL, '-j', 2, '--log-interval', 1, '--output', 'out')
    for line in process.stdout:
        if line.startswith('batch 5/'):
            os.killpg(process.pid, number)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == EXIT_STOPPED == 75, rest
    name, = checkpoints('out')
    assert f'{number.name}: stopped after update {int(name[-8:])}, --resume auto goes on' in rest
    assert int(name[-8:]) < 22
    assert 'Traceback' not in rest
    assert not Path('out/summary.json').exists()
    run(*FULL, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', uninterrupted)


def test_state_of_a_checkpoint_is_readable(uninterrupted):
    """Catches a position in the run that only code can read."""
    state = json.loads((uninterrupted / 'checkpoints/step-00000025/state.json').read_text())
    assert (state['epoch'], state['step'], state['updates'], len(state['history'])) == (1, 6, 25, 1)
    assert state['sums']['loss'][0] / 6 == pytest.approx(history(uninterrupted)[0]['train_loss'], rel=0.2)
