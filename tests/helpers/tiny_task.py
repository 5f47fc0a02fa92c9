"""A model small enough to be trained in any test of the task, and steps of it."""
import torch

from helpers.models import create
from timm_ddnn import EKDTask

DEPTHS = (12, 10, 8)
CLASSES = 5
TARGET = torch.tensor([1, 4, 0, 2, 1, 3])
TERMS = {'ce_12', 'ce_10', 'ce_8', 'kl_10', 'kl_8', 'attention_10', 'attention_8'}
OPTIONS = dict(temperature=3.0, alpha=0.7, beta=2.0, attention='standardized', stages=(0, -1), weights={8: 0.5})


def tiny(seed=0, **kwargs):
    layers = dict(layers=(2, 2, 1), subnets=((2, 1, 1), (1, 1, 1)))
    return create('ddnn_resnet20', seed, **{**layers, 'num_classes': CLASSES, **kwargs}).train()


def make_task(model, *args, **kwargs):
    return EKDTask(model, *args, verbose=False, **kwargs)


def step(task, x, optimizer=None, **kwargs):
    optimizer = optimizer or torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    optimizer.zero_grad()
    result = task(x, TARGET, **kwargs)
    result['loss'].backward()
    optimizer.step()
    return result


def assert_same_state(state, expected, equal=torch.equal):
    assert list(state) == list(expected)
    for name, value in state.items():
        assert equal(value, expected[name]), name
