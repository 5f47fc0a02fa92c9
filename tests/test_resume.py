"""Runs that are killed, stopped or out of disk, and resume. Each test says which fault it catches."""
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from filelock import FileLock
from helpers.killed_run import plant
from helpers.training import (
    FAST,
    assert_same_run,
    checkpoints,
    error_lines,
    few_digits,
    fork,
    history,
    join,
    read,
    run,
)
from safetensors.torch import load_file, save_file

from timm_ddnn import EKDLoss
from timm_ddnn.train.checkpoint import CheckpointError, Checkpoints
from timm_ddnn.train.output import copy_best
from timm_ddnn.train.signals import EXIT_STOPPED, stop_signals
from timm_ddnn.train.state import TrainState
from timm_ddnn.utils.files import file_sha256

pytestmark = pytest.mark.usefixtures('surroundings')

PLAIN = [*FAST, *few_digits(), '-b', 8, '--epochs', 2]  # of 88 updates
# Everything that keeps a state of its own: dropout draws random numbers, AdamW has moments
FULL = [  # of 44 updates
    *PLAIN, '--mixup', 0.2, '--cutmix', 1, '--drop', 0.1, '--drop-path', 0.1, '--reprob', 0.2, '--grad-accum-steps', 2,
    '--model-ema', '--model-ema-decay', 0.9,
]


def checkpoints_in(folder, **kwargs):
    """Checkpoints of a run that has nothing but a small model."""
    model = torch.nn.Linear(2, 2)
    return Checkpoints(
        Accelerator(cpu=True), folder, model,
        lambda folder, state: save_file(model.state_dict(), folder / 'model.safetensors'), **kwargs)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take longer than most of these runs; other tests look at them."""
    for name in ('plot_accuracy', 'plot_curves'):
        monkeypatch.setattr(f'timm_ddnn.train.output.{name}', lambda *args: None)


def fail_on(capfd, message):
    """Assert that one line said what is wrong."""
    lines = error_lines(capfd)
    assert len(lines) == 1, lines
    assert re.search(f'^error: .*{message}', lines[0]), lines[0]


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
        if updates >= 22:  # a checkpoint at the end of an epoch is the model of that epoch
            best = uninterrupted / ('best' if updates == 44 else 'checkpoints/step-00000022')
            for name in ('config.json', 'model.safetensors'):
                Path('out/best').mkdir(exist_ok=True)
                shutil.copy(best / name, 'out/best')
    return copy


# Kills

def kill_and_resume(log, folder, expected, kills, rng):
    """Kill runs at random moments, half of them while a checkpoint is written, until there were enough; compare each
    run that comes to its end with `expected`. Returns a line per kill.
    """
    arguments = [*FULL, '--checkpoint-interval', 3, '--output', folder, '--resume', 'auto']
    lines = []
    while len(lines) < kills:
        moment, seconds = ('step', rng.uniform(0, 1.2)) if rng.random() < 0.5 else ('save', rng.uniform(0, 0.03))
        log.write_text('')
        Path('output.log').write_text('')
        (status,), output = join(fork(*arguments, before=partial(plant, log, moment, seconds), log='output.log'),
                                 log='output.log')
        events = log.read_text().split()
        updates = [int(event) for event in events if event.isdigit()]
        begun = int((re.findall(r'resuming from .*step-(\d+)', output) or ['0'])[0])
        assert begun == updates[0], 'another position than that of the checkpoint'
        if status == 0:
            assert_same_run(folder, expected)
            shutil.rmtree(folder)
            continue
        assert status == -signal.SIGKILL, output
        complete = [int(name[-8:]) for name in checkpoints(folder) if name.startswith('step-')]
        newest = max(complete, default=0)
        assert newest >= updates[-1] - 3, 'more is lost than the steps since the last checkpoint'
        writing = events.count('save') > events.count('saved')
        lines.append(
            f'kill {len(lines) + 1}: {seconds * 1000:.0f} ms after the first {moment}, update {updates[-1]}, '
            f'{"while a checkpoint was written" if writing else "between checkpoints"}; resumed at {newest}'
        )
    return lines


@pytest.mark.parametrize('kills', [1, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_runs_end_with_the_same_weights(kills, uninterrupted, tmp_path):
    """Catches a state that is not saved or not restored, and half a checkpoint taken for one, at random moments."""
    seed = random.SystemRandom().randrange(2 ** 32)
    print('seed', seed)
    lines = kill_and_resume(tmp_path / 'log', 'out', uninterrupted, kills, random.Random(seed))
    print('\n'.join(lines))
    if kills > 10:
        assert {'while a checkpoint was written' in line for line in lines} == {True, False}
    run(*FULL, '--checkpoint-interval', 3, '--output', 'out', '--resume', 'auto')
    assert_same_run('out', uninterrupted)


@pytest.mark.parametrize('updates', [5, 22, 25, 44])
def test_resuming_at_any_place(updates, copy_of, uninterrupted):
    """Catches a state that matters only inside an epoch, at its end, in a later one, or after the last."""
    copy_of(updates)
    for name in ('metrics.jsonl', 'model.safetensors', 'config.json'):  # of a later step, as after a kill
        shutil.copy(uninterrupted / name, 'out')
    run(*FULL, '-j', 2, '--resume', f'out/checkpoints/step-{updates:08d}')  # the output follows from the path
    assert_same_run('out', uninterrupted)
    assert read('out')['weights'] == 'of epoch 2 of 2, averaged'


def test_resuming_without_mixup_ema_and_accumulation(monkeypatch):
    """Catches a resume that rests on the averaged weights or on the seeding of mixup, and time that is lost."""
    run(*PLAIN, '--checkpoint-interval', 30, '--checkpoint-hist', 9, '--output', 'expected')
    shutil.copytree('expected/checkpoints/step-00000030', 'out/checkpoints/step-00000030')
    monkeypatch.setattr(Checkpoints, 'read_state', lambda *args, original=Checkpoints.read_state: {
        **original(*args), 'seconds': 1000.0})
    run(*PLAIN, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', 'expected')
    assert [record['seconds'] > 1000 for record in history('out')] == [True, False]


# Which checkpoints there are

@pytest.mark.parametrize('by, best', [([], 2), (['--best-by', 8], 3)])
def test_newest_and_best_are_kept(by, best, monkeypatch):
    """Catches best weights of another epoch or depth, a tie that the later one wins, and checkpoints that pile up."""
    tops = {14: iter([20, 40, 30, 10]), 8: iter([20, 40, 45, 45])}

    def evaluate(*args):
        metrics = {f'top1_{depth}': float(next(values)) for depth, values in tops.items()}
        return metrics | {name.replace('1', '5', 1): 50.0 for name in metrics}

    monkeypatch.setattr('timm_ddnn.train.recipe.evaluate', evaluate)
    run(*PLAIN, '--epochs', 4, '-b', 88, '--checkpoint-hist', 1, '--output', 'out', *by)
    assert checkpoints('out') == ['step-00000016']
    configs, summaries = (
        [read(place, file) for place in ('out', 'out/best')] for file in ('config.json', 'summary.json'))
    assert [summary['epoch'] for summary in summaries] == [config['epoch'] for config in configs] == [4, best]
    assert [summary['best_epoch'] for summary in summaries] == [best, best]
    assert [row['top1'] for row in configs[1]['depths']] == [[40, 40], [30, 45]][best - 2] == [
        row['top1'] for row in summaries[1]['depths']]
    assert summaries[0]['weights'] == 'of epoch 4 of 4'
    assert summaries[1]['weights'] == f'of epoch {best} of 4, the best top-1 ' + (
        'at depth 8' if by else 'as mean over depths')
    assert not torch.equal(*(load_file(f'{f}/model.safetensors')['conv1.weight'] for f in ('out', 'out/best')))


def test_every_model_of_a_run_loads(uninterrupted, capsys):
    """Catches best weights and checkpoints that are kept and that nothing can load."""
    averaged = load_file(uninterrupted / 'checkpoints/step-00000005/model.safetensors')
    for place in ('best', 'checkpoints/step-00000005'):
        model = timm.create_model(f'local-dir:{uninterrupted / place}', pretrained=True)
        assert model.trained_depths == (14, 8)
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in model.state_dict().items())
    first, best = uninterrupted / 'checkpoints/step-00000022', uninterrupted / 'best'
    run('--evaluate', '--pretrained', '--model', first, '-j', 0, *few_digits(), '--output', 'evaluated')
    record = history(uninterrupted)[0]
    assert [row['top1'] for row in read('evaluated', 'evaluation.json')['depths']] == [
        record['ema_top1_14'], record['ema_top1_8']]
    run(*PLAIN, '--initial-checkpoint', first, '--teacher', best, '--epochs', 1, '--lr', 0, '--output', 'out')
    given, found = (load_file(folder / 'model.safetensors')['conv1.weight'] for folder in (first, Path('out')))
    assert torch.equal(given, found)


def test_the_end_of_a_run_is_not_resumed_elsewhere(copy_of, capfd):
    """Catches a summary without a model."""
    copy_of(44)
    with pytest.raises(SystemExit):
        run(*FULL, '--resume', 'out/checkpoints/step-00000044', '--output', 'other')
    fail_on(capfd, r'step-00000044 is the end of a run, whose model is not in --output other')


def test_the_best_model_comes_along(copy_of):
    """Catches a run that resumes in another folder without, or with a later one than, the best model until then."""
    copy_of(25)
    for epoch in (0, 1):
        copy_best(Path('out'), Path('other'), epoch)
        assert Path('other/best/model.safetensors').exists() == (epoch == 1)


def test_a_checkpoint_holds_no_foreign_objects(uninterrupted):
    """Catches weights that are not safetensors, and anything that PyTorch's restricted unpickling refuses."""
    folder = uninterrupted / 'checkpoints' / 'step-00000044'
    assert {path.name for path in folder.iterdir()} == {
        'averaged_0.safetensors', 'checksums.json', 'config.json', 'model.safetensors', 'optimizer.bin',
        'random_states_0.pkl', 'state.json', 'training.safetensors',
    }
    model = timm.create_model('ddnn_resnet20', channels=(8, 16, 32), layers=(2, 2, 2), subnets=((1, 1, 1),))
    for name in ('model.safetensors', 'training.safetensors'):
        assert load_file(folder / name).keys() == model.state_dict().keys()
    assert torch.load(folder / 'optimizer.bin', weights_only=True)['state']


def test_state_of_a_checkpoint_is_readable(uninterrupted):
    """Catches a position in the run that only code can read."""
    state = json.loads((uninterrupted / 'checkpoints/step-00000025/state.json').read_text())
    assert (state['epoch'], state['step'], state['updates'], len(state['history'])) == (1, 6, 25, 1)
    assert state['sums']['loss'][0] / 6 == pytest.approx(history(uninterrupted)[0]['train_loss'], rel=0.3)
    assert 0 < state['seconds'] < 60
    assert [state['arguments'][name] for name in ('processes', 'mixed_precision', 'device')] == [1, 'no', 'cpu']


DAMAGES = {
    'truncated': (lambda path: os.truncate(path / 'optimizer.bin', 1000), 'optimizer.bin has 1000 bytes'),
    'flipped': (lambda path: flip(path / 'model.safetensors'), 'model.safetensors has the SHA-256'),
    'missing': (lambda path: (path / 'random_states_0.pkl').unlink(), 'random_states_0.pkl'),
    'no checksums': (lambda path: (path / 'checksums.json').write_text('{}'), 'is empty'),
    'checksums cut': (lambda path: os.truncate(path / 'checksums.json', 50), ''),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_is_found(damage, copy_of):
    """Catches a damaged file that is read, or one that ends the run though an older checkpoint is intact."""
    copy_of(10)
    newest, intact = (Path('out/checkpoints') / name for name in ('step-00000010', 'step-00000005'))
    apply, reason = DAMAGES[damage]
    apply(newest)
    found = checkpoints_in(Path('out/checkpoints')).newest()
    assert found[0] == intact and found[1].keys() == {newest} and reason in found[1][newest]
    apply(intact)
    with pytest.raises(CheckpointError, match=f'no checkpoint in out/checkpoints is intact: .*{reason}'):
        checkpoints_in(Path('out/checkpoints')).newest()


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(copy_of, uninterrupted, capsys):
    """Catches a damaged checkpoint that is lost, in the way, or passed over in silence."""
    copy_of(40)
    Path('out/checkpoints/damaged-step-00000040/old').mkdir(parents=True)  # damaged before
    flip(Path('out/checkpoints/step-00000040/model.safetensors'))
    run(*FULL, '--output', 'out', '--resume', 'auto')
    printed = capsys.readouterr().out
    assert 'step-00000040 is damaged, left aside as damaged-step-00000040: model.safetensors has the SHA-256' in printed
    assert 'resuming from out/checkpoints/step-00000035' in printed
    assert Path('out/checkpoints/damaged-step-00000040/state.json').exists()
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
    run(*PLAIN, '--epochs', 1, '-b', 88, '--resume', 'auto', '--output', 'out')
    assert checkpoints('out') == ['step-00000004']


def files_of(folder):
    return {
        path: path.read_bytes() for path in Path(folder).rglob('*') if path.is_file() and path.name != '.lock'}


@pytest.mark.parametrize('arguments, message', [
    (['--output', 'out'], 'out has checkpoints: resume by --resume auto, or choose another folder'),
    (['--resume', 'auto'], '--resume auto needs --output'),
    (['--resume', 'nowhere'], "must be 'auto' or a folder checkpoints/step-\\*.*'nowhere'"),
    (['--resume', 'auto', '--output', 'out', '--lr', 0.1], 'lr was 0.02, got 0.1'),
    (['--resume', 'auto', '--output', 'out', '-b', 16, '--seed', 1], 'batch_size was 8, got 16; seed was 0, got 1'),
    (['--resume', 'auto', '--output', 'out', '--subnets', '2,1,1'], r'subnets was .*1, 1, 1.*, got .*2, 1, 1'),
    (['--resume', 'auto', '--output', 'out', '--model-kwargs', 'channels=8,16,64'], 'model_kwargs was .*, got .*64'),
    (['--resume', 'auto', '--output', 'out', '--epochs', 1], 'epochs was 2, got 1'),
    (['--resume', 'out/checkpoints/step-00000005'], 'step-00000005 is older than step-00000010'),
    (['--resume', 'auto', '--evaluate', '--initial-checkpoint', __file__], '--resume is for training'),
])
def test_wrong_ways_to_resume(arguments, message, copy_of, capfd):
    """Catches a run that resumes with something else than it began with, and one that overwrites another."""
    copy_of(10)
    before = files_of('out')
    with pytest.raises(SystemExit) as exit_info:
        run(*FULL, *arguments)
    assert exit_info.value.code == 2
    fail_on(capfd, message)
    assert files_of('out') == before


def test_what_is_the_users_stays(tmp_path):
    """Catches a copy of a checkpoint that is deleted, or takes the place of one, and a link that stops every save."""
    options = [*PLAIN, '-b', 44, '--checkpoint-interval', 2, '--output', 'out']  # of 16 updates
    run(*options, '--checkpoint-hist', 9)
    folder = Path('out/checkpoints')
    for updates in (12, 14, 16):
        shutil.rmtree(folder / f'step-{updates:08d}')
    shutil.copytree(folder / 'step-00000008', folder / 'step-00000008-good')
    shutil.copytree(folder / 'step-00000008', folder / 'step-saved')
    shutil.move(folder / 'step-00000010', tmp_path / 'moved')
    (folder / 'step-00000010').symlink_to(tmp_path / 'moved')
    (folder / 'step-00000012').symlink_to(tmp_path / 'nowhere')
    (folder / 'step-00000014').write_text('a file')
    run(*options, '--checkpoint-hist', 1, '--resume', 'auto')
    assert set(checkpoints('out')) == {'step-00000016', 'step-00000008-good', 'step-saved'}
    assert (tmp_path / 'moved' / 'state.json').exists()


def test_random_states_that_do_not_load_are_an_error(copy_of, capfd):
    """Catches a run that resumes with other random numbers: accelerate passes over states that it cannot load."""
    copy_of(5)
    folder = Path('out/checkpoints/step-00000005')
    torch.save({'step': 10, 'random_state': 'other'}, folder / 'random_states_0.pkl')
    checksums = json.loads((folder / 'checksums.json').read_text())
    file = folder / 'random_states_0.pkl'
    checksums[file.name] = {'bytes': file.stat().st_size, 'sha256': file_sha256(file)}
    (folder / 'checksums.json').write_text(json.dumps(checksums))
    with pytest.raises(SystemExit) as exit_info:
        run(*FULL, '--output', 'out', '--resume', 'auto')
    assert exit_info.value.code == 2
    fail_on(capfd, 'checkpoint out/checkpoints/step-00000005 does not fit this run: ')


def test_random_states_are_those_of_the_checkpoint(tmp_path):
    """Catches a task or an augmentation of the user's that draws other numbers after a resume."""
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(TrainState({}, updates=3))
    expected = draw()
    checkpoints.load(tmp_path / 'step-00000003')
    assert draw() == expected


def test_a_folder_is_for_one_run_at_a_time(copy_of, uninterrupted, capfd):
    """Catches two runs that overwrite each other, and a folder that a killed run leaves locked."""
    copy_of(40)
    with FileLock('out/checkpoints/.lock'), pytest.raises(SystemExit) as exit_info:
        run(*FULL, '--output', 'out', '--resume', 'auto')
    assert exit_info.value.code == 2
    fail_on(capfd, '--output out must not be that of another run, which is writing to it')
    run(*FULL, '--output', 'out', '--resume', 'auto')
    assert_same_run('out', uninterrupted)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(monkeypatch, tmp_path):
    """Catches a power cut that leaves empty files under the final name of a checkpoint, or an older one alone."""
    events = []

    def fsync(descriptor, original=os.fsync):
        events.append(os.fstat(descriptor).st_ino)
        original(descriptor)

    def replace(source, target, original=os.replace):
        events.append(Path(target))
        original(source, target)

    monkeypatch.setattr(os, 'fsync', fsync)
    monkeypatch.setattr(os, 'replace', replace)
    checkpoints_in(tmp_path).save(TrainState({}, updates=3))
    folder = tmp_path / 'step-00000003'
    named = events.index(folder)
    assert set(events[:named]) == {path.stat().st_ino for path in (folder, *folder.iterdir())}
    assert events[named + 1:] == [tmp_path.stat().st_ino]


def test_a_kill_while_a_checkpoint_is_removed(monkeypatch, tmp_path):
    """Catches half a checkpoint under the name of a whole one, and remains that pile up."""
    def rmtree(path, **_):
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    checkpoints = checkpoints_in(tmp_path, keep=1)
    checkpoints.save(TrainState({}, updates=3))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, 'rmtree', rmtree)
        checkpoints.save(TrainState({}, updates=4))
    assert checkpoints.paths() == [tmp_path / 'step-00000004']
    checkpoints.save(TrainState({}, updates=5))
    assert os.listdir(tmp_path) == ['step-00000005']


@pytest.mark.parametrize('number', [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EIO])
def test_file_systems_that_cannot_flush_a_folder(number, monkeypatch, tmp_path):
    """Catches a run without checkpoints on such a system, and a disk that fails and is not reported."""
    def fsync(descriptor, original=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        original(descriptor)

    monkeypatch.setattr(os, 'fsync', fsync)
    checkpoints = checkpoints_in(tmp_path)
    state = TrainState({}, updates=3)
    if number == errno.EIO:
        with pytest.raises(CheckpointError, match='cannot be written'):
            checkpoints.save(state)
    else:
        checkpoints.save(state)
        assert checkpoints.newest() == (tmp_path / 'step-00000003', {})


# Full disk

@pytest.fixture
def fill_disk(monkeypatch):
    """Let no file grow beyond 100 kB after a checkpoint was loaded."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def load(checkpoints, path, original=Checkpoints.load):
        original(checkpoints, path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, 'load', load)
        yield patch
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('last, message, written', [
    (15, 'checkpoint out/checkpoints/step-00000020 cannot be written: .*Left as they were: step-00000015', []),
    (20, 'out cannot be written to: .* Checkpoints are intact', ['metrics.jsonl']),
])
def test_a_full_disk(last, message, written, copy_of, uninterrupted, fill_disk, capfd):
    """Catches a checkpoint lost for one that could not be written, inside an epoch and at its end."""
    copy_of(last)
    arguments = [*FULL, '--checkpoint-interval', 5, '--resume', 'auto', '--output', 'out']
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fill_disk.undo()
    assert exit_info.value.code == 2
    fail_on(capfd, message)
    assert sorted(os.listdir('out')) == ['checkpoints', *written]
    assert all(name.startswith('step-') for name in checkpoints('out'))
    run(*arguments)
    assert f'resuming from out/checkpoints/step-000000{last}' in capfd.readouterr().out
    assert_same_run('out', uninterrupted)


def test_a_full_disk_after_the_last_epoch(copy_of, uninterrupted, monkeypatch, capfd):
    """Catches a traceback for a plot that cannot be written, and a run that cannot be completed or looks complete."""
    def plot(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    copy_of(40)
    Path('out/summary.json').touch()  # of an earlier run
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_info:
        patch.setattr('timm_ddnn.train.output.plot_curves', plot)
        run(*FULL, '--resume', 'auto', '--output', 'out')
    assert exit_info.value.code == 2
    fail_on(capfd, 'No space left on device')
    assert not Path('out/summary.json').exists()
    run(*FULL, '--resume', 'auto', '--output', 'out')
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
        if len(calls) == 11 + 7:
            terms['kl_8'] = terms['kl_8'] + float(value)
            terms['loss'] = terms['loss'] + terms['kl_8']
        return terms

    monkeypatch.setattr(EKDLoss, 'terms', spoil)
    with pytest.raises(SystemExit) as exit_info:
        run(*PLAIN, '-b', 32, '--checkpoint-interval', 4, '--output', 'out')
    assert exit_info.value.code == 2
    fail_on(capfd, r'loss is not finite in epoch 2, step 7: kl of depth 8$')
    assert checkpoints('out') == ['step-00000012', 'step-00000016']
    assert all(t.isfinite().all() for t in load_file('out/checkpoints/step-00000016/model.safetensors').values())


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

def test_a_second_ctrl_c_ends_the_program():
    """Catches a run that hangs and cannot be ended, and signals that are still noted after it."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt), stop_signals() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signal == 'SIGINT'
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, uninterrupted):
    """Catches a preemption that loses steps, hangs on its worker processes, or ends with a status that says nothing.

    The signal goes to all processes of the run, as a terminal and most schedulers send it.
    """
    process, = fork(*FULL, '-j', 2, '--log-interval', 1, '--output', 'out')
    while process.is_alive() and not (Path('log').exists() and 'batch 5/' in Path('log').read_text()):
        time.sleep(0.01)
    os.killpg(process.pid, number)
    (status,), output = join([process])
    assert status == EXIT_STOPPED == 75, output
    name, = checkpoints('out')
    assert f'{number.name}: stopped after update {int(name[-8:])}, --resume auto resumes' in output
    assert int(name[-8:]) < 22
    assert 'Traceback' not in output
    assert not Path('out/summary.json').exists()
    run(*FULL, '--resume', 'auto', '--output', 'out')
    assert_same_run('out', uninterrupted)
