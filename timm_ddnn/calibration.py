"""Estimation of batch-norm statistics for some depths of a dynamic-depth model."""
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .utils.errors import InputError
from .utils.modules import eval_mode

__all__ = ['calibrate_bn']


_logger = logging.getLogger(__name__)


def calibrate_bn(model: nn.Module, loader: Iterable[Any], depth: int | str | Sequence[int]) -> int:
    """Estimate the batch-norm statistics that some depths have for themselves, as means over the batches of a loader.

    Weights, the statistics that other depths use too, modes and momenta stay as they are, so that the logits of every
    other depth stay equal bit for bit. After an error the statistics are the old ones too; else the depths count as
    trained.

    Args:
        model: Dynamic-depth model.
        loader: Batches of images as the model takes them, [B, C, H, W]: tensors, or sequences with the images first.
        depth: As for the model's `forward`. Sub-nets that share statistics with each other and have none yet, as after
            loading a stock checkpoint, must be calibrated together.

    Returns:
        Number of images seen.

    Raises:
        InputError: If the model has no such depth or no batch norm, or the loader does not give image tensors, or such
            that the statistics are not finite.
    """
    depths, _ = model.resolve_depths(depth)
    paths = {d: {id(norm): norm for norm in model.path_norms(d)} for d in model.depths}
    if not any(paths.values()):
        raise InputError(
            f'{type(model).__name__} has no batch-norm statistics to estimate: a new depth of it is to be trained')
    fixed = {key for d in model.depths if d not in depths for key in paths[d]}
    norms = list({key: norm for d in depths for key, norm in paths[d].items() if key not in fixed}.values())
    known = {id(norm) for norm in norms}.union(*(paths[d] for d in model.trained_depths))
    for d in depths:
        partners = [e for e in model.depths if e not in depths and (paths[d].keys() & paths[e].keys()) - known]
        if partners:
            _logger.warning(
                f'Depth {d} shares statistics with {partners}, which are not trained: these stay unknown. '
                'Calibrate them together.'
            )
    momenta = [norm.momentum for norm in norms]
    statistics = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    weight = next(model.parameters())

    num_images = 0
    try:
        with eval_mode(model), torch.no_grad():
            for norm in norms:
                norm.train()
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
            for batch in loader:
                images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
                if not isinstance(images, torch.Tensor) or images.ndim != 4:
                    raise InputError(
                        'loader must give images [B, C, H, W], alone or first in a sequence, '
                        f'got {type(images).__name__}'
                    )
                model(images.to(device=weight.device, dtype=weight.dtype), depth=depths)
                num_images += len(images)
        if not num_images:
            raise InputError('loader gave no images')
        if not all(buffer.isfinite().all() for norm in norms for buffer in norm.buffers()):
            raise InputError('loader must give images whose maps are finite, got statistics of NaN or inf')
    except BaseException:
        for norm, old in zip(norms, statistics, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(old[name])
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    model.mark_trained(depths)
    return num_images
