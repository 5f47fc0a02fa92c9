"""What a file in int8 is judged by: real images to find its ranges on, and others to measure its accuracy on.

How nets become integers is in `quantize.py`.
"""
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..data.datasets import load_image_data, match_classes
from ..evaluation.batches import load_batches
from ..utils.errors import InputError

__all__ = ['Int8Images', 'Int8LossError', 'load_int8_images', 'measure_loss', 'spread']


_CALIBRATION_IMAGES = 512
_BATCH_SIZE = 64


class Int8LossError(InputError):
    """A depth that loses too much accuracy by int8."""

    exit_status = 1


class Int8Images(NamedTuple):
    """Images for a file in int8.

    Attributes:
        calibration: Images that show what values occur, [N, C, H, W].
        held_out: Batches of other images [B, C, H, W] and labels [B], on which accuracy is measured.
    """
    calibration: torch.Tensor
    held_out: Iterable[tuple[torch.Tensor, torch.Tensor]]


def spread(num: int, count: int) -> np.ndarray:
    """Choose at most `num` of `count` indices, at equal distances."""
    return np.linspace(0, count - 1, min(num, count)).astype(int)


def load_int8_images(model: nn.Module, data: str, num_held_out: int = 5000) -> Int8Images:
    """Load 512 training images, without augmentation, and validation images.

    Args:
        model: Dynamic-depth model.
        data: Data set, as for `load_image_data`, with the classes of the model.
        num_held_out: The most validation images, at equal distances, >= 1.

    Raises:
        FileNotFoundError: If there is no such data set.
        InputError: If it cannot be read, has no such splits, or other classes.
    """
    image_data = match_classes(load_image_data(data), model)
    rows = spread(_CALIBRATION_IMAGES, len(image_data.train))
    calibration = [images for images, _ in load_batches(image_data, 'train', model, _BATCH_SIZE, rows=rows)]
    rows = spread(num_held_out, len(image_data.validation))
    return Int8Images(torch.cat(calibration), load_batches(image_data, 'validation', model, _BATCH_SIZE, rows=rows))


@torch.no_grad()
def measure_loss(
        run: Callable[[torch.Tensor, int], torch.Tensor],
        nets: Mapping[int, nn.Module],
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        max_loss: float,
) -> dict[int, dict[str, Any]]:
    """Measure what every depth loses by int8.

    Args:
        run: Maps images [B, C, H, W] and a depth to logits in int8.
        nets: Plain nets in float by depth.
        batches: Images and labels [B].
        max_loss: The most top-1 accuracy that a depth may lose, in points of percent.

    Returns:
        Rows with depth, top1 (of int8), float_top1 (in percent) and held_out_images, by depth.

    Raises:
        Int8LossError: If a depth loses more.
    """
    hits, count = torch.zeros(len(nets), 2), 0
    for images, target in batches:
        images, target, count = images.cpu(), target.cpu(), count + len(target)
        for row, (depth, net) in zip(hits, nets.items(), strict=True):
            row += torch.stack([(logits.argmax(1) == target).sum() for logits in (run(images, depth), net(images))])
    rows = {
        depth: {
            'depth': depth, 'top1': round(100 * mine / count, 4), 'float_top1': round(100 * of_float / count, 4),
            'held_out_images': count,
        }
        for depth, (mine, of_float) in zip(nets, hits.tolist(), strict=True)
    }
    for row in rows.values():
        if not row['float_top1'] - row['top1'] <= max_loss:
            raise Int8LossError(
                f'int8 must not cost a depth more than {max_loss:g} points of top-1 (--max-loss), but depth '
                f'{row["depth"]} has {row["top1"]:.2f} % in place of {row["float_top1"]:.2f} % on {count} images')
    return rows
