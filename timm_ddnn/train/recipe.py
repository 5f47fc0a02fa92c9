"""The training run: data, model, task, optimizer, loop, and what it writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..utils.environment import describe_machine

__all__ = ['describe_run']


def describe_run(accelerator: Accelerator, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what a run was started with: arguments, processes, precision, and `describe_machine`.

    Args:
        accelerator: Accelerator of the run.
        arguments: Arguments of the script.
    """
    return {
        'arguments': {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        'processes': accelerator.num_processes,
        'device': str(accelerator.device),
        'mixed_precision': accelerator.mixed_precision,
        **describe_machine(),
    }
