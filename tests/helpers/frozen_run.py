"""Records loss and gradient of the first updates of a training run whose batch-norm statistics are frozen."""
import os

import torch
from torch import nn

from timm_ddnn import EKDTask
from timm_ddnn.utils.modules import find_norms


class Recorded(BaseException):
    """The run is not needed any longer."""


def plant(patch, file, updates):
    """Freeze the statistics, and end the run by `Recorded` after some updates.

    `file`.RANK gets a list per update: the losses of this process's batches, and the gradient of all parameters [N].

    Args:
        patch: pytest's monkeypatch, or what has its `setattr`.
        file: Path of the records, without the rank.
        updates: How many updates to record.
    """
    records, losses = [], []

    def train(task, mode=True, original=nn.Module.train):
        original(task, mode)
        for norm in find_norms(task):
            original(norm, False)
        return task

    def forward(task, *args, original=EKDTask.forward, **kwargs):
        terms = original(task, *args, **kwargs)
        losses.append(terms['loss'].item())
        return terms

    def step(optimizer, *args, original=torch.optim.SGD.step, **kwargs):
        gradient = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group['params']])
        records.append((list(losses), gradient))
        losses.clear()
        if len(records) == updates:
            torch.save(records, f'{file}.{os.environ.get("RANK", 0)}')
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            raise Recorded
        return original(optimizer, *args, **kwargs)

    patch.setattr(EKDTask, 'train', train)
    patch.setattr(EKDTask, 'forward', forward)
    patch.setattr(torch.optim.SGD, 'step', step)
