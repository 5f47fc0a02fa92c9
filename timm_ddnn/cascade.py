"""Cascades of the depths of one model: a shallow net for all images, deeper ones where it is unsure.

Here is what runs, what chooses a threshold and what measures speed; it needs PyTorch alone. Accuracies are in
`analysis.py`.
"""
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .dynamic_depth import eval_mode

__all__ = [
    'Cascade', 'OperatingPoint', 'StepCost', 'Tradeoff', 'UnreachableError', 'autocast', 'choose_threshold',
    'confidence', 'exit_steps', 'measure_speed', 'trace_thresholds',
]


class UnreachableError(ValueError):
    """No threshold fulfils what was asked for."""


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Compute the greatest probability of every image, [B], in float32.

    As the confidence that ends a cascade it is the choice of 'Dynamically Sacrificing Accuracy for Reduced Computation'
    (arXiv 1805.10982) and of MSDNet (arXiv 1703.09844, budgeted batch classification).

    Args:
        logits: [B, C].
    """
    return logits.float().softmax(-1).amax(-1)


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
            threshold: An image goes on where its `confidence` is not above it, [0, 1]: at 0 none does, at 1 all do.

        Raises:
            ValueError: If the depths or the threshold are none such.
        """
        self.depths = tuple(depths)
        known = set(self.depths) <= set(model.depths)
        if not known or len(self.depths) < 2 or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(
                f'cascade must be two or more of the depths {model.depths[::-1]}, the shallowest first, '
                f'got {self.depths}'
            )
        if not 0 <= threshold <= 1:
            raise ValueError(f'threshold of a cascade must be from 0 to 1, got {threshold!r}')
        self.model = model
        self.threshold = threshold
        self._paths = [
            [block for stage in range(len(model.blocks(depth))) for block in model._stage(depth, stage)]
            for depth in self.depths
        ]
        # A net parts from the first of the earlier ones that it shares most blocks with: that one ran the last of them
        self._starts, self._sources = [0], [0]
        for i, path in enumerate(self._paths[1:], start=1):
            shared = [_count_shared(path, other) for other in self._paths[:i]]
            self._starts.append(max(shared))
            self._sources.append(shared.index(max(shared)))

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify images.

        Args:
            x: Images, [B, C, H, W].

        Returns:
            Logits [B, num_classes], and for every image the index in `depths` of the net that they are of, [B].

        Raises:
            ValueError: If the model is in training mode.
        """
        if self.model.training:
            raise ValueError('the model of a cascade must be in eval mode')
        with torch.no_grad():
            maps = {0: x}
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
        """Run net i from `maps[i]` (the first: from images), and add the maps that later nets start from."""
        x = maps.pop(i)
        if i == 0:
            x = self.model.maxpool(self.model.act1(self.model.bn1(self.model.conv1(x))))
        for count, block in enumerate(self._paths[i][self._starts[i]:], start=self._starts[i] + 1):
            x = block(x)
            for later in range(i + 1, len(self.depths)):
                if self._sources[later] == i and self._starts[later] == count:
                    maps[later] = x
        return self.model.forward_head(x)

    def count_macs(self, input_size: Sequence[int]) -> list[StepCost]:
        """Count the multiply-accumulates of every step, by running all of them on one image.

        Args:
            input_size: Size of an image, (C, H, W).
        """
        parameter = next(self.model.parameters())
        image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
        maps, costs = {0: image}, []
        with eval_mode(self.model), torch.no_grad():
            for i, depth in enumerate(self.depths):
                with FlopCounterMode(display=False) as step:
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


def _count_shared(path: Sequence[nn.Module], other: Sequence[nn.Module]) -> int:
    """Count the blocks that two nets begin with: the same modules, so on the same images the same maps."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], zip(path, other, strict=False)))


class OperatingPoint(NamedTuple):
    """A threshold and what it gives.

    Attributes:
        threshold: [0, 1].
        top1: Accuracy in percent.
        macs: Mean multiply-accumulates per image.
    """
    threshold: float
    top1: float
    macs: float


class Tradeoff(NamedTuple):
    """Every threshold that makes a difference on some images, in ascending order.

    Attributes:
        thresholds: [T], float32. The first is 0, where no image goes on, and at the last all go on to the last net.
        top1: Accuracy in percent, [T].
        macs: Mean multiply-accumulates per image, [T]. They ascend.
    """
    thresholds: torch.Tensor
    top1: torch.Tensor
    macs: torch.Tensor


def exit_steps(confidences: torch.Tensor, threshold: float) -> torch.Tensor:
    """Tell from the confidences at all steps where a cascade ends for every image.

    Args:
        confidences: [K, N] for K steps and N images.
        threshold: As for `Cascade`.

    Returns:
        Indices of steps, [N].
    """
    return (confidences[:-1] <= threshold).long().cumprod(0).sum(0)


def trace_thresholds(confidences: torch.Tensor, correct: torch.Tensor, macs: Sequence[int]) -> Tradeoff:
    """Compute accuracy and cost at every threshold that makes a difference.

    Args:
        confidences: Confidences at all steps, [K, N] for K steps and N images.
        correct: Whether the net of a step is right, [K, N].
        macs: Multiply-accumulates that each of the K steps runs.
    """
    # An image goes beyond a step from that threshold on which is the greatest confidence that it had up to there
    moves = confidences[:-1].cummax(0).values
    thresholds, event = moves.unique(return_inverse=True)
    gains = correct[1:].long() - correct[:-1].long()
    costs = torch.tensor(macs[1:], device=moves.device)[:, None].expand_as(gains)
    gained, spent = (
        torch.zeros(len(thresholds) + 1, dtype=torch.long, device=moves.device).index_add(
            0, event.flatten() + 1, amount.flatten()).cumsum(0)
        for amount in (gains, costs)
    )
    count = correct.shape[1]
    return Tradeoff(
        thresholds=torch.cat([thresholds.new_zeros(1), thresholds]),
        top1=100 * (correct[0].sum() + gained).double() / count,
        macs=macs[0] + spent.double() / count,
    )


def choose_threshold(
        confidences: torch.Tensor,
        correct: torch.Tensor,
        macs: Sequence[int],
        *,
        target_top1: float | None = None,
        budget_macs: float | None = None,
) -> OperatingPoint:
    """Choose the best of all thresholds: the fewest MACs for an accuracy, or the best accuracy for a budget of MACs.

    Args:
        confidences: As for `trace_thresholds`, of images that the result is not reported on.
        correct: Likewise.
        macs: Likewise.
        target_top1: Accuracy to reach, in percent. That of the last net if this and `budget_macs` are None.
        budget_macs: Mean multiply-accumulates per image to stay within. Of equal accuracies the cheapest is taken.

    Raises:
        ValueError: If both `target_top1` and `budget_macs` are given.
        UnreachableError: If no threshold reaches the accuracy or stays within the budget.
    """
    if target_top1 is not None and budget_macs is not None:
        raise ValueError(f'one of target_top1 and budget_macs is expected, got {target_top1} and {budget_macs}')
    thresholds, top1, mean_macs = trace_thresholds(confidences, correct, macs)
    if budget_macs is not None:
        within = top1[mean_macs <= budget_macs]
        if not len(within):
            raise UnreachableError(
                f'no threshold has mean MACs of {budget_macs:.4g}: the first net alone takes {macs[0]:.4g}')
        best = int(within.argmax())
        best = int((within == within[best]).nonzero()[0])  # argmax may give any of several
    else:
        target = top1[-1] if target_top1 is None else target_top1
        reached = (top1 >= target).nonzero()
        if not len(reached):
            raise UnreachableError(
                f'no threshold has a top-1 accuracy of {target_top1} %: on the images to choose by, the best has '
                f'{float(top1.max()):.2f} %'
            )
        best = int(reached[0])
    return OperatingPoint(float(thresholds[best]), float(top1[best]), float(mean_macs[best]))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Run in float32 for a precision of 'no', in bfloat16 where that is safe for 'bf16'."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == 'bf16')


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
