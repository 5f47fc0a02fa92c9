"""The machine that a number was measured on, and its devices."""
import copy
import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..version import __version__
from .errors import InputError

__all__ = ['describe_machine', 'find_device', 'total_memory']


_PACKAGES = ('torchvision', 'timm', 'accelerate', 'datasets', 'onnxruntime')


def find_device(name: str | None = None) -> torch.device:
    """Find a device of this machine by its name.

    Args:
        name: 'cpu', or the accelerator's, such as 'cuda' or 'cuda:1'. The accelerator if there is one, else the CPU,
            if None.

    Raises:
        InputError: If this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device('cpu')
    known = ['cpu']
    if accelerator:
        known += [accelerator.type, *(f'{accelerator.type}:{i}' for i in range(torch.accelerator.device_count()))]
    if name not in known:
        raise InputError(f'device must be {" or ".join(known)} on this machine, got {name!r}')
    return torch.device(name)


def total_memory() -> float | None:
    """Memory of this machine in GiB, None where the system does not tell."""
    if not hasattr(os, 'sysconf'):
        return None
    return round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30, 1)


def describe_machine() -> dict[str, Any]:
    """Describe what a number was measured with.

    Returns:
        versions (of Python, this library and the packages that it runs on, if they are installed), hardware (cpu,
        cpu_cores, memory_gib, gpus), git (commit of the checkout that holds this library, and whether it is dirty; None
        outside of a checkout).
    """
    return copy.deepcopy(_describe_once())


@functools.cache
def _describe_once() -> dict[str, Any]:
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
        cpu = next((line.partition(': ')[2] for line in lines if line.startswith('model name')), cpu)
    return {
        'versions': {
            'timm_ddnn': __version__,
            'python': platform.python_version(),
            'torch': torch.__version__,
            **{name: found for name in _PACKAGES if (found := _installed_version(name))},
        },
        'hardware': {
            'cpu': cpu,
            'cpu_cores': os.cpu_count(),
            'memory_gib': total_memory(),
            'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        'git': _git_state(Path(__file__)),
    }


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks a file, and whether a tracked file differs from it; None if none does."""
    def git(*args: str) -> str:
        command = ('git', '-C', str(file.parent), *args)
        run = subprocess.run(command, capture_output=True, encoding='utf-8', errors='replace', check=True)
        return run.stdout.strip()
    try:
        git('ls-files', '--error-unmatch', file.name)
        return {'commit': git('rev-parse', 'HEAD'), 'dirty': bool(git('status', '--porcelain', '--untracked-files=no'))}
    except (OSError, subprocess.CalledProcessError):
        return None
