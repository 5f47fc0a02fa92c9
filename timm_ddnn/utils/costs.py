"""What every depth costs: parameters and multiply-accumulates."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .modules import eval_mode

__all__ = ['count_costs']


def count_costs(model: nn.Module, input_size: Sequence[int]) -> list[dict[str, Any]]:
    """Count parameters and multiply-accumulates of every depth.

    Args:
        model: Dynamic-depth model.
        input_size: Size of an image, (C, H, W).

    Returns:
        Rows with depth, blocks, parameters and macs.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    rows = []
    with eval_mode(model), torch.no_grad():
        for depth in model.depths:
            with FlopCounterMode(display=False) as counter:
                model(image, depth=depth)
            rows.append({
                'depth': depth,
                'blocks': list(model.blocks(depth)),
                'parameters': sum(p.numel() for p in model.extract(depth).parameters()),
                'macs': counter.get_total_flops() // 2,
            })
    return rows
