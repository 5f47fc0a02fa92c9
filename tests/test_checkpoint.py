"""Checkpoints by themselves: what is on the disk and when. Runs that resume from them are in `test_resume.py`."""
import errno
import os
import random
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import checkpoints_in

from timm_ddnn.train.checkpoint import CheckpointError
from timm_ddnn.train.state import TrainState

pytestmark = pytest.mark.usefixtures('surroundings')


def test_random_states_are_those_of_the_checkpoint(tmp_path):
    """Catches a task or an augmentation of the user's that draws other numbers after a resume."""
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(TrainState({}, updates=3))
    expected = draw()
    checkpoints.load(tmp_path / 'step-00000003')
    assert draw() == expected


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
