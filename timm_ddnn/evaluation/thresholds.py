"""The threshold of a cascade: accuracy and cost of every one, and the choice among them."""
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..utils.errors import InputError

__all__ = ['OperatingPoint', 'Tradeoff', 'UnreachableError', 'choose_threshold', 'exit_steps', 'trace_thresholds']


class UnreachableError(InputError):
    """No threshold fulfils what was asked for."""

    exit_status = 3


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
        InputError: If both `target_top1` and `budget_macs` are given.
        UnreachableError: If no threshold reaches the accuracy or stays within the budget.
    """
    if target_top1 is not None and budget_macs is not None:
        raise InputError(f'one of target_top1 and budget_macs is expected, got {target_top1} and {budget_macs}')
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
