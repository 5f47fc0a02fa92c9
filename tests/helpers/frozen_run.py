"""Runs the training script with batch-norm statistics frozen, and records loss and gradient of its first updates.

    python frozen_run.py FILE UPDATES SCRIPT ARGS...

FILE.RANK gets a list per update: the losses of this process's batches, and the gradient of all parameters [N].
"""
import os
import runpy
import sys

import torch
from torch import nn

from timm_ddnn import EKDTask

_, path, updates, script, *arguments = sys.argv
records, losses = [], []


def train(task, mode=True, original=nn.Module.train):
    original(task, mode)
    for module in task.modules():
        if isinstance(module, nn.BatchNorm2d):
            original(module, False)
    return task


def forward(task, *args, original=EKDTask.forward):
    terms = original(task, *args)
    losses.append(terms['loss'].item())
    return terms


def step(optimizer, *args, original=torch.optim.SGD.step, **kwargs):
    gradient = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group['params']])
    records.append((list(losses), gradient))
    losses.clear()
    if len(records) == int(updates):
        torch.save(records, f'{path}.{os.environ.get("RANK", 0)}')
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        os._exit(0)
    return original(optimizer, *args, **kwargs)


EKDTask.train, EKDTask.forward, torch.optim.SGD.step = train, forward, step
sys.argv = [script, *arguments]
runpy.run_path(script, run_name='__main__')
