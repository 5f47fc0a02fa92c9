"""The machine that a number was measured on, and its devices."""
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

__all__ = ['describe_machine']


def describe_machine() -> dict[str, Any]:
    """Describe what a number was measured with: versions, hardware, and the commit of this library."""
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.partition(': ')[2] for line in lines if line.startswith('model name')), cpu)
    return {
        'versions': {
            'timm_ddnn': __version__,
            'python': platform.python_version(),
            'torch': torch.__version__,
            **{name: version(name) for name in ('torchvision', 'timm', 'accelerate', 'datasets')},
        },
        'hardware': {
            'cpu': cpu,
            'cpu_cores': os.cpu_count(),
            'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30, 1),
            'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        'git': _git_state(Path(__file__)),
    }


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks a file, and whether a tracked file differs from it; None if none does."""
    def git(*args: str) -> str:
        return subprocess.run(
            ('git', '-C', str(file.parent), *args), capture_output=True, text=True, check=True).stdout.strip()
    try:
        git('ls-files', '--error-unmatch', file.name)
        return {'commit': git('rev-parse', 'HEAD'), 'dirty': bool(git('status', '--porcelain', '--untracked-files=no'))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _find_device(name: str | None) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return found or torch.device('cpu')
    try:
        device = torch.device(name)
        if device.type not in {'cpu', found.type if found else 'cpu'}:
            raise RuntimeError(f'this machine has no {device.type}')
        torch.empty(0, device=device)
    except RuntimeError as e:
        known = 'cpu' if not found else f'cpu or {found.type}'
        raise ValueError(f'device must be {known} here, got {name!r}: {str(e).splitlines()[0]}') from None
    return device
