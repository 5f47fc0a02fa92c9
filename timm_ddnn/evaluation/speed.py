"""Images per second of a cascade and of its nets."""
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..cascade import Cascade
from .predict import autocast

__all__ = ['measure_speed']


@torch.inference_mode()
def measure_speed(
        cascade: Cascade,
        batches: Sequence[torch.Tensor],
        *,
        precision: str = 'no',
        rounds: int = 7,
) -> dict[str, Any]:
    """Measure images per second of a cascade and of each of its nets alone, in turn on the same images.

    Args:
        cascade: The cascade, of a model in eval mode.
        batches: Images, [B, C, H, W] each, on the device of the model.
        precision: 'no' or 'bf16', as in accelerate.
        rounds: Rounds to take the median of, >= 2. One more goes before them and does not count.

    Returns:
        images, batch_size, rounds, threads (of PyTorch, on a CPU), device, ends: the share of images that end at every
        step, in percent; depths and cascade: the median of images per second, with the range of its middle half, low
        to high.
    """
    device = batches[0].device
    calls = {depth: partial(cascade.model, depth=depth) for depth in cascade.depths} | {'cascade': cascade}
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            for images in batches:
                with autocast(device, precision):
                    call(images)
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    with autocast(device, precision):
        steps = torch.cat([cascade(images)[1] for images in batches]).cpu()
    speeds = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles((len(steps) / value for value in values[1:]), n=4, method='inclusive')
        speeds[name] = {'median': median, 'low': low, 'high': high}
    return {
        'images': len(steps),
        'batch_size': len(batches[0]),
        'rounds': rounds,
        'threads': torch.get_num_threads(),
        'device': str(device),
        'ends': [100 * float((steps == i).double().mean()) for i in range(len(cascade.depths))],
        'depths': [{'depth': depth, **speeds[depth]} for depth in cascade.depths],
        'cascade': speeds['cascade'],
    }


def _synchronize(device: torch.device) -> None:
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)
