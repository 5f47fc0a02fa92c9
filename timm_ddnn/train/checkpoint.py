"""Checkpoints that a training run resumes from.

A checkpoint is a folder `step-<updates>`. It is the folder of a model, `config.json` and `model.safetensors`, with the
averaged weights if there are any, and then those in training in `training.safetensors` and each process's statistics
of the average in `averaged_<process>.safetensors`. Besides, it has what `accelerate` saves (optimizer, gradient scaler
and random states as PyTorch files that are read with `weights_only=True`), `state.json` with the position in the run,
and `checksums.json` with size and SHA-256 of all of these. It is written under a temporary name, flushed to the disk
and renamed: a folder of the final name is complete. With several machines the folder must lie on a file system that
they share.
"""
import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load
from accelerate.utils.constants import RNG_STATE_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..utils.errors import InputError
from ..utils.files import file_sha256
from .state import TrainState

__all__ = ['CheckpointError', 'Checkpoints']


NAME = re.compile(r'step-\d{8,}')


class CheckpointError(InputError):
    """A checkpoint that cannot be written, read, or resumed from."""

    on_every_process = True


class Checkpoints:
    """The newest checkpoints of a run."""

    def __init__(
            self,
            accelerator: Accelerator,
            folder: Path,
            model: nn.Module,
            save_net: Callable[[Path, TrainState], None],
            *,
            ema: nn.Module | None = None,
            keep: int = 2,
    ) -> None:
        """Choose what is saved, and where.

        Args:
            accelerator: Accelerator of the run; optimizer and gradient scaler that it has prepared are saved.
            folder: Folder of the checkpoints, made with the first of them.
            model: Model in training.
            save_net: Saves the averaged model, or the one in training if there is none, in a folder.
            ema: Averaged model.
            keep: How many to keep, >= 1.
        """
        self.accelerator = accelerator
        self.folder = folder
        self.model = model
        self.save_net = save_net
        self.ema = ema
        self.keep = keep
        # accelerate would save the task, whose names of weights no model has
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def paths(self) -> list[Path]:
        """List the checkpoints, the newest first. They need not be intact.

        What has a name of another form, such as a copy `step-00000020-good`, belongs to the user.
        """
        found = (path for path in self.folder.glob('step-*') if NAME.fullmatch(path.name) and path.is_dir())
        return sorted(found, reverse=True)

    def save(self, state: TrainState) -> None:
        """Save a checkpoint, to be called by all processes, and remove those that are not to be kept.

        Args:
            state: Position in the run. Its updates name the checkpoint.

        Raises:
            CheckpointError: If it cannot be written. Those before it are left as they are.
        """
        target = self.folder / f'step-{state.updates:08d}'
        temporary = self.folder / f'.{target.name}.tmp'
        main_process = self.accelerator.is_main_process
        try:
            if main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                for remains in self.folder.glob('.step-*.tmp'):
                    _remove_tree(remains)
            self.accelerator.wait_for_everyone()
            try:
                self.accelerator.save_state(str(temporary), safe_serialization=True)
            except RuntimeError as e:  # torch's, when the disk is full
                raise OSError(str(e)) from e
            if main_process:
                self.save_net(temporary, state)
            if self.ema:
                # Statistics of the averaged model are each process's own between two evaluations
                _save(dict(self.ema.named_buffers()), temporary / self._averaged)
                if main_process:
                    _save(self.model.state_dict(), temporary / 'training.safetensors')
            self.accelerator.wait_for_everyone()
            if main_process:
                (temporary / 'state.json').write_text(json.dumps(asdict(state)), encoding='utf-8')
                checksums = {path.name: _checksum(path) for path in sorted(temporary.iterdir())}
                (temporary / 'checksums.json').write_text(json.dumps(checksums, indent=2) + '\n', encoding='utf-8')
                for path in (*temporary.iterdir(), temporary):
                    _flush(path)
                if os.path.lexists(target):  # of a run that resumed from an earlier one
                    self._remove(target)
                os.replace(temporary, target)
                _flush(self.folder)
                for path in self.paths()[self.keep:]:
                    self._remove(path)
        except (OSError, SafetensorError) as e:
            shutil.rmtree(temporary, ignore_errors=True)
            intact = ', '.join(path.name for path in self.paths()) or 'none'
            raise CheckpointError(f'checkpoint {target} cannot be written: {e}. Left as they were: {intact}') from e
        self.accelerator.wait_for_everyone()

    def find(self, resume: str | None) -> tuple[Path | None, list[str]]:
        """Find the checkpoint to resume from; damaged ones that are newer are renamed to damaged-*.

        Args:
            resume: 'auto' for the newest intact one, if there is any; a folder; None for none.

        Returns:
            The checkpoint, None to begin; and a line for each that is damaged.

        Raises:
            CheckpointError: If there are checkpoints but none is intact, or some are newer than the given one.
        """
        if not resume:
            return None, []
        if resume != 'auto':
            newer = [path.name for path in self.paths() if path.name > Path(resume).resolve().name]
            if newer:
                raise CheckpointError(
                    f'--resume {resume} is older than {", ".join(newer)} in {self.folder}: choose another --output')
            return Path(resume), []
        path, damaged = self.newest()
        lines = []
        for other, damage in damaged.items():
            aside = other.with_name(f'damaged-{other.name}')
            if aside.exists():
                _remove_tree(aside)
            os.replace(other, aside)
            lines.append(f'{other} is damaged, left aside as {aside.name}: {damage}')
        return path, lines

    def newest(self) -> tuple[Path | None, dict[Path, str]]:
        """Find the newest checkpoint that is intact.

        Returns:
            The checkpoint, None if there is none at all; and what is wrong with those that are newer.

        Raises:
            CheckpointError: If there are checkpoints but none is intact.
        """
        damaged = {}
        for path in self.paths():
            damage = _find_damage(path)
            if not damage:
                return path, damaged
            damaged[path] = damage
        if damaged:
            reasons = '; '.join(f'{path.name}: {damage}' for path, damage in damaged.items())
            raise CheckpointError(f'no checkpoint in {self.folder} is intact: {reasons}')
        return None, {}

    def read_state(self, path: Path) -> dict[str, Any]:
        """Read the state that was saved, after a check that the checkpoint is intact.

        Args:
            path: Folder of the checkpoint.

        Raises:
            CheckpointError: If the checkpoint is damaged.
        """
        damage = _find_damage(path)
        if damage:
            raise CheckpointError(f'checkpoint {path} is damaged: {damage}')
        return json.loads((path / 'state.json').read_text(encoding='utf-8'))

    def load(self, path: Path) -> None:
        """Put back what was saved besides the state, to be called by all processes.

        Args:
            path: Folder of the checkpoint, intact.

        Raises:
            CheckpointError: If its files do not fit what is trained.
        """
        try:
            self.accelerator.load_state(str(path))
            # accelerate passes over random states that do not load
            states = load(path / f'{RNG_STATE_NAME}_{self.accelerator.process_index}.pkl')
            random.setstate(states['random_state'])
            np.random.set_state(states['numpy_random_seed'])
            torch.set_rng_state(states['torch_manual_seed'])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(states['torch_cuda_manual_seed'])
            net = load_file(path / 'model.safetensors')
            self.model.load_state_dict(load_file(path / 'training.safetensors') if self.ema else net)
            if self.ema:
                self.ema.load_state_dict(net | load_file(path / self._averaged))
        except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError, UnpicklingError) as e:
            raise CheckpointError(f'checkpoint {path} does not fit this run: {type(e).__name__}: {e}') from e

    @property
    def _averaged(self) -> str:
        return f'averaged_{self.accelerator.process_index}.safetensors'

    def _remove(self, path: Path) -> None:
        # Renamed first: what is cut short must not look like a checkpoint
        doomed = path.with_name(f'.{path.name}.old.tmp')
        os.replace(path, doomed)
        _remove_tree(doomed)


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _checksum(path: Path) -> dict[str, Any]:
    return {'bytes': path.stat().st_size, 'sha256': file_sha256(path)}


def _remove_tree(path: Path) -> None:
    """Remove a folder, or a file or link that has its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk, a folder where the system can."""
    is_folder = path.is_dir()
    if is_folder and os.name == 'nt':
        return
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if not (is_folder and e.errno in (errno.EINVAL, errno.ENOTSUP, errno.EBADF)):
            raise
    finally:
        os.close(descriptor)


def _find_damage(path: Path) -> str | None:
    """Say what is wrong with a checkpoint, None if its files are those that were written."""
    try:
        checksums = json.loads((path / 'checksums.json').read_text(encoding='utf-8'))
        for name, expected in checksums.items():
            found = _checksum(path / name)
            if found['bytes'] != expected['bytes']:
                return f'{name} has {found["bytes"]} bytes, {expected["bytes"]} were written'
            if found != expected:
                return f'{name} has the SHA-256 {found["sha256"]}, {expected["sha256"]} was written'
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return str(e)
    return None if checksums else 'checksums.json is empty'
