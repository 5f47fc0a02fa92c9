"""The position in a training run: what a checkpoint stores as JSON, and what a resumed run must have in common."""
import argparse
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from ..data.content import fingerprint
from ..data.datasets import ImageData
from ..utils.errors import InputError
from ..utils.modules import state_dict_sha256

__all__ = ['TrainState', 'fixed_arguments']


# Options that a resumed run may change. Two runs that differ in nothing else end with the same weights.
MAY_CHANGE = {
    'output', 'resume', 'workers', 'validation_batch_size', 'log_interval', 'report_to', 'checkpoint_interval',
    'checkpoint_hist',
}


@dataclass
class TrainState:
    """The position in a run.

    Attributes:
        arguments: What decides the weights, see `fixed_arguments`.
        run: Random name, which a tracker knows the run by.
        epoch: Epochs that are complete.
        step: Batches of the epoch after these.
        updates: Updates of the weights.
        seconds: Time that the steps of this epoch took.
        sums: Terms of the loss over these steps, as `LossMeter.sums` gives them.
        history: Metrics of every complete epoch, as in metrics.jsonl.
    """

    arguments: Mapping[str, Any]
    run: str = field(default_factory=lambda: secrets.token_hex(4))
    epoch: int = 0
    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    sums: dict[str, list[float]] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def end_epoch(self, record: dict[str, Any]) -> None:
        """Begin the next epoch.

        Args:
            record: Metrics of the one that is complete.
        """
        self.history.append(record)
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], arguments: Mapping[str, Any]) -> 'TrainState':
        """Make the state that a run resumes from.

        Args:
            values: What `dataclasses.asdict` gave.
            arguments: What decides the weights of the run that resumes.

        Raises:
            InputError: If these are others than those of the run that was saved.
        """
        was = values['arguments']
        changed = [f'{name} was {was.get(name)!r}, got {arguments.get(name)!r}'
                   for name in sorted(was | arguments) if was.get(name) != arguments.get(name)]
        if changed:
            raise InputError(f'--resume needs the arguments of the run that was saved: {"; ".join(changed)}')
        return cls(**values)


def fixed_arguments(
        args: argparse.Namespace,
        accelerator: Accelerator,
        data: ImageData,
        teacher: nn.Module | None = None,
) -> dict[str, Any]:
    """Collect what decides the weights of a run, as JSON has it; to be called by all processes.

    Args:
        args: Options of the run.
        accelerator: Accelerator of the run.
        data: The data set.
        teacher: Net that teaches and is not trained.
    """
    fixed = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    fixed |= {
        'processes': accelerator.num_processes,
        'mixed_precision': accelerator.mixed_precision,
        'device': accelerator.device.type,
        'visible_gpus': torch.cuda.device_count(),
        'data': broadcast_object_list([fingerprint(data) if accelerator.is_main_process else None])[0],
        'teacher_sha256': state_dict_sha256(teacher) if teacher else None,
    }
    return json.loads(json.dumps(fixed, default=str))
