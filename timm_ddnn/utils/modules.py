"""Helpers for any `nn.Module`: modes, norms, a checksum of the state dict."""
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ['eval_mode', 'find_norms', 'state_dict_sha256']


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module of it back into its own mode when the block ends.

    Args:
        model: Any module.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def find_norms(module: nn.Module) -> list[nn.Module]:
    """List the modules in `module` that keep running statistics, in registration order."""
    return [m for m in module.modules() if m._buffers.get('running_mean') is not None]


def state_dict_sha256(model: nn.Module) -> str:
    """Compute the SHA-256 of a model's state dict, its names and values; hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
