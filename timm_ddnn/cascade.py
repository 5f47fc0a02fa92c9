"""Cascades of the depths of one model: a shallow net for all images, deeper ones where it is unsure.

How a threshold is chosen is in `evaluation/thresholds.py`.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .utils.errors import InputError
from .utils.modules import eval_mode
from .utils.schema import brief, judge, number

__all__ = ['Cascade', 'StepCost', 'confidence']


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Compute the greatest probability of every image, [B], in float32; 0 where logits give none.

    As the confidence that ends a cascade it is the choice of 'Dynamically Sacrificing Accuracy for Reduced Computation'
    (arXiv 1805.10982) and of MSDNet (arXiv 1703.09844, budgeted batch classification).

    Args:
        logits: [B, C].
    """
    return logits.float().softmax(-1).amax(-1).nan_to_num(0.0)


class StepCost(NamedTuple):
    """What one step of a cascade costs an image that reaches it.

    Attributes:
        depth: Depth of the net.
        macs: Multiply-accumulates that the step runs.
        source: Depth of the earlier net from one of whose maps it starts, None for the first.
        shared_blocks: Blocks that both nets begin with, and that the step does not run again.
        reused: Multiply-accumulates of the net that it does not run again, those of the stem and of these blocks.
    """
    depth: int
    macs: int
    source: int | None
    shared_blocks: int
    reused: int


class Cascade:
    """Runs the shallowest of some depths, and the next one where the confidence is not above a threshold.

    A net that runs later begins at the map where its path leaves that of an earlier one, so no block runs twice on an
    image. One threshold for all steps is this library's choice.
    """

    def __init__(self, model: nn.Module, depths: Sequence[int], threshold: float) -> None:
        """Plan the cascade.

        Args:
            model: Dynamic-depth model, in eval mode when the cascade runs.
            depths: Two or more of its depths, the shallowest first.
            threshold: An image goes on to the next net where its `confidence`, at the temperature of the depth, is not
                above this, [0, 1]: at 0 none does, at 1 all do.

        Raises:
            InputError: If these are not depths of the model in this order, or the threshold is out of range.
        """
        self.depths = tuple(depths)
        known = set(self.depths) <= set(model.depths)
        if not known or len(self.depths) < 2 or list(self.depths) != sorted(set(self.depths)):
            raise InputError(
                f'cascade must be two or more of the depths {model.depths[::-1]}, the shallowest first, '
                f'got {brief(self.depths)}'
            )
        judge(threshold, number(0, 1), 'threshold of a cascade')
        self.model = model
        self.threshold = threshold
        self._temperatures = [model.temperature(depth) for depth in self.depths]
        # A net parts from the first of the earlier ones that it shares most blocks with: that one ran the last of them
        self._starts, self._sources = [0], [0]
        for i, depth in enumerate(self.depths[1:], start=1):
            shared = [model.count_shared(depth, other) for other in self.depths[:i]]
            self._starts.append(max(shared))
            self._sources.append(shared.index(max(shared)))

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify images.

        Args:
            x: Images, [B, C, H, W].

        Returns:
            Logits [B, num_classes], divided by the `temperature` of the depth that they are of, and for every image the
            index of that depth in `depths`, [B].

        Raises:
            InputError: If the model is in training mode.
        """
        if self.model.training:
            raise InputError('the model of a cascade must be in eval mode')
        with torch.no_grad():
            maps = {0: self.model.forward_stem(x)}
            logits = self._run(0, maps)
            steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
            own, rows = logits, torch.arange(len(x), device=x.device)
            for i in range(1, len(self.depths)):
                unsure = (confidence(own) <= self.threshold).nonzero().squeeze(1)
                if not len(unsure):
                    break
                if len(unsure) < len(rows):
                    rows = rows[unsure]
                    maps = {later: y[unsure] for later, y in maps.items()}
                own = self._run(i, maps)
                logits[rows] = own
                steps[rows] = i
        return logits, steps

    def _run(self, i: int, maps: dict[int, torch.Tensor]) -> torch.Tensor:
        """Run net i from `maps[i]`, and add the maps that later nets start from."""
        depth = self.depths[i]
        end = sum(self.model.blocks(depth))
        later = [j for j in range(i + 1, len(self.depths)) if self._sources[j] == i]
        stops = {end, *(self._starts[j] for j in later)}
        computed = self.model.run_blocks(maps.pop(i), depth, self._starts[i], stops)
        maps |= {j: computed[self._starts[j]] for j in later}
        logits = self.model.forward_head(self.model.forward_tail(computed[end], depth), depth=depth)
        return logits / self._temperatures[i]

    def count_macs(self, input_size: Sequence[int]) -> list[StepCost]:
        """Count the multiply-accumulates of every step, by running all of them on one image.

        Args:
            input_size: Size of an image, (C, H, W).
        """
        parameter = next(self.model.parameters())
        image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
        maps, costs = {}, []
        with eval_mode(self.model), torch.no_grad():
            for i, depth in enumerate(self.depths):
                with FlopCounterMode(display=False) as step:
                    if i == 0:
                        maps[0] = self.model.forward_stem(image)
                    self._run(i, maps)
                with FlopCounterMode(display=False) as alone:
                    self.model(image, depth=depth)
                macs = step.get_total_flops() // 2
                costs.append(StepCost(
                    depth=depth,
                    macs=macs,
                    source=self.depths[self._sources[i]] if i else None,
                    shared_blocks=self._starts[i],
                    reused=alone.get_total_flops() // 2 - macs,
                ))
        return costs
