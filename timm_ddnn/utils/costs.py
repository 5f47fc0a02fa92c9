"""What a depth costs: parameters and multiply-accumulates."""
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .modules import eval_mode

__all__ = ['count_costs', 'count_macs']


@torch.no_grad()
def count_macs(function: Callable[[], Any]) -> int:
    """Count the multiply-accumulates of a call, those of convolutions and matrix products.

    Args:
        function: What to call once.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def count_costs(model: nn.Module, input_size: Sequence[int]) -> list[dict[str, Any]]:
    """Count parameters and multiply-accumulates of every depth.

    Args:
        model: Dynamic-depth model.
        input_size: Size of an image, (C, H, W).

    Returns:
        Rows with depth, blocks, parameters and macs (of one image).
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    with eval_mode(model):
        return [
            {
                'depth': depth,
                'blocks': list(model.blocks(depth)),
                'parameters': sum(p.numel() for p in model.extract(depth).parameters()),
                'macs': count_macs(lambda depth=depth: model(image, depth=depth)),
            }
            for depth in model.depths
        ]
