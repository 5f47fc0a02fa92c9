"""Estimation of batch-norm statistics for one depth of a dynamic-depth model."""
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ['calibrate_bn']


def calibrate_bn(model: nn.Module, loader: Iterable[Any], depth: int) -> int:
    """Estimate the batch-norm statistics that one depth has for itself, as means over the batches of a loader.

    Weights, the statistics that other depths use too, modes and momenta stay as they are, so that the logits of every
    other depth stay equal bit for bit. After an error the statistics are the old ones too; else the depth counts as
    trained.

    Args:
        model: Dynamic-depth model.
        loader: Batches of images as the model takes them, [B, C, H, W]: tensors, or sequences with the images first.
        depth: One of `model.depths`.

    Returns:
        Number of images seen.

    Raises:
        ValueError: If the model has no such depth or the loader gives no image tensors.
    """
    depth = model.select_depth(depth)
    shared = {id(norm) for d in model.depths if d != depth for norm in model.path_norms(d)}
    norms = [norm for norm in model.path_norms(depth) if id(norm) not in shared]
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    weight = next(model.parameters())

    num_images = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
        with torch.no_grad():
            for batch in loader:
                images = batch[0] if isinstance(batch, (tuple, list)) else batch
                if not isinstance(images, torch.Tensor) or images.ndim != 4:
                    raise ValueError(
                        'loader must give images [B, C, H, W], alone or first in a sequence, '
                        f'got {type(batch).__name__}'
                    )
                model(images.to(device=weight.device, dtype=weight.dtype), depth=depth)
                num_images += len(images)
        if not num_images:
            raise ValueError('loader gave no images')
    except BaseException:
        for norm, old in zip(norms, statistics, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(old[name])
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    model.subnets.trained[model.depths.index(depth)] = True
    return num_images
