"""Metrics of every depth and of cascades, from the predictions of one pass over images."""
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..cascade import StepCost
from ..utils.errors import InputError
from .predict import Predictions, percent
from .thresholds import Tradeoff, choose_threshold, exit_steps, trace_thresholds

__all__ = [
    'add_accuracies', 'calibration_bins', 'class_rows', 'depth_metrics', 'evaluate_cascade', 'split_images',
    'wilson_interval',
]


BINS = 15
CURVE_POINTS = 200  # of a curve in a file; the choice of a threshold is from all


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute the confidence interval of an accuracy: how far it would differ on other images of the same kind.

    It is Wilson's score interval ('Probable inference, the law of succession, and statistical inference', Journal of
    the American Statistical Association 22, 1927), which stays within [0, 100] and holds for few images and for an
    accuracy of 0 or 100 % too.

    Args:
        correct: Images that are right, from 0 to `total`.
        total: Images, >= 1.
        confidence: Share of such intervals that hold the true accuracy, (0, 1).

    Returns:
        Its ends in percent, the lower first.
    """
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    p, shrink = correct / total, 1 + z * z / total
    middle = (p + z * z / (2 * total)) / shrink
    margin = z / shrink * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    return tuple(round(100 * min(max(end, 0.0), 1.0), 4) for end in (middle - margin, middle + margin))


def interval(correct: torch.Tensor) -> list[float]:
    """Compute the `wilson_interval` of the share of images that are right, [N]."""
    return list(wilson_interval(int(correct.sum()), len(correct)))


def calibration_bins(confidences: torch.Tensor, correct: torch.Tensor) -> dict[str, list]:
    """Sort images by confidence into 15 bins of equal width.

    Args:
        confidences: Probabilities of the predicted classes, [N].
        correct: Whether these are right, [N].

    Returns:
        For every bin its images, mean confidence and accuracy ([0, 1], None if it is empty). Bin m of M holds the
        confidences in ((m - 1) / M, m / M].
    """
    confidences = confidences.double()
    bins = ((confidences * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    count, confidence_sum, correct_sum = (
        torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, values)
        for values in (torch.ones_like(confidences), confidences, correct.double())
    )

    def means(sums: torch.Tensor) -> list[float | None]:
        return [float(total / n) if n else None for total, n in zip(sums, count, strict=True)]

    return {'images': count.long().tolist(), 'confidence': means(confidence_sum), 'accuracy': means(correct_sum)}


def _calibration(confidences: torch.Tensor, correct: torch.Tensor) -> dict[str, Any]:
    bins = calibration_bins(confidences, correct)
    errors = [n * abs(a - c) for n, c, a in zip(*bins.values(), strict=True) if n]
    return {'ece': round(100 * sum(errors) / len(correct), 4), 'calibration': bins}


def depth_metrics(predictions: Predictions) -> list[dict[str, Any]]:
    """Compute the metrics of every depth.

    Args:
        predictions: Of at least one image.

    Returns:
        Rows with depth and, in percent, top1, top1_interval (as `wilson_interval`), top5, ece and agreement, and with
        calibration (as `calibration_bins`). `ece` is the expected calibration error of the predicted class over these
        bins: the mean difference of confidence and accuracy, weighted by images ('On Calibration of Modern Neural
        Networks', arXiv 1706.04599, equation 3). `agreement` is the share of images with the same prediction as the
        first depth's, the full-net's. `uncalibrated` has ece and calibration at a temperature of 1, None if that is the
        temperature of the depth.
    """
    rows = []
    for i, depth in enumerate(predictions.depths):
        confidences, uncalibrated = predictions.confidences[i], predictions.uncalibrated[i]
        rows.append({
            'depth': depth,
            'top1': percent(predictions.correct[i]),
            'top1_interval': interval(predictions.correct[i]),
            'top5': percent(predictions.top5[i]),
            'agreement': percent(predictions.classes[i] == predictions.classes[0]),
            **_calibration(confidences, predictions.correct[i]),
            'uncalibrated': None if torch.equal(confidences, uncalibrated) else _calibration(
                uncalibrated, predictions.correct[i]),
        })
    return rows


def class_rows(predictions: Predictions, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Compute the accuracy on the images of every class.

    Args:
        predictions: The predictions.
        class_names: Name of every class, the label being its index.

    Returns:
        Rows with class, images and 'top1_<depth>' in percent, None for a class without images.
    """
    rows = []
    for label, name in enumerate(class_names):
        own = predictions.target == label
        correct = predictions.correct[:, own]
        rows.append({'class': name, 'images': int(own.sum())} | {
            f'top1_{depth}': percent(hits) if len(hits) else None
            for depth, hits in zip(predictions.depths, correct, strict=True)
        })
    return rows


def split_images(count: int, holdout: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Split images at random, and always in the same way.

    Args:
        count: Number of images.
        holdout: Share of the first part, (0, 1).

    Returns:
        Indices of the images of both parts, in random order.

    Raises:
        InputError: If a part has no image.
    """
    first = round(count * holdout)
    if not 0 < first < count:
        raise InputError(f'the share of held-out images must leave some in both parts of {count}, got {holdout}')
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:first], order[first:]


def evaluate_cascade(
        costs: Sequence[StepCost],
        reported: Predictions,
        held_out: Predictions | None = None,
        *,
        threshold: float | None = None,
        target_top1: float | None = None,
        budget_macs: float | None = None,
) -> dict[str, Any]:
    """Choose the threshold of a cascade on some images and report it on others.

    Args:
        costs: What `Cascade.count_macs` gives.
        reported: Predictions for the images that are reported on.
        held_out: Predictions for the images to choose by. Not needed if there is a threshold.
        threshold: The threshold, chosen if None.
        target_top1: As for `choose_threshold`.
        budget_macs: As for `choose_threshold`.

    Returns:
        threshold, top1 in percent, its interval and macs (mean multiply-accumulates per image) on the `images` reported
        on; chosen: the same on those chosen by, None if the threshold was given; steps: for every net its costs, the
        percentage of images that end there, and top1 and macs of that net alone on the same images; beaten_by: the
        depth that alone takes no more MACs and is no less accurate than the cascade, or None; curve: at most 200 of all
        thresholds.

    Raises:
        UnreachableError: If no threshold fulfils what is asked for.
    """
    depths, macs = [cost.depth for cost in costs], [cost.macs for cost in costs]
    chosen = None
    if threshold is None:
        others = held_out.select(torch.arange(len(held_out.target)), depths)
        point = choose_threshold(
            others.confidences, others.correct, macs, target_top1=target_top1, budget_macs=budget_macs)
        threshold, chosen = point.threshold, {'images': len(others.target), 'top1': point.top1, 'macs': point.macs}
    own = reported.select(torch.arange(len(reported.target)), depths)
    ends = exit_steps(own.confidences, threshold)
    correct = own.correct[ends, torch.arange(len(ends))]
    top1 = percent(correct)
    mean_macs = float(torch.tensor(macs).cumsum(0)[ends].double().mean())
    steps = [
        {
            **cost._asdict(),
            'macs_alone': cost.macs + cost.reused,
            'top1_alone': percent(own.correct[i]),
            'top1_alone_interval': interval(own.correct[i]),
            'ends': percent(ends == i),
        }
        for i, cost in enumerate(costs)
    ]
    better = [step for step in steps if step['top1_alone'] >= top1 and step['macs_alone'] <= mean_macs]
    return {
        'depths': depths,
        'confidence': 'greatest softmax probability; an image goes on where it is not above the threshold',
        'threshold': threshold,
        'target_top1': target_top1,
        'budget_macs': budget_macs,
        'chosen': chosen,
        'images': len(own.target),
        'top1': top1,
        'top1_interval': interval(correct),
        'macs': mean_macs,
        'steps': steps,
        'beaten_by': max(better, key=lambda step: step['top1_alone'])['depth'] if better else None,
        'curve': _thin_out(trace_thresholds(own.confidences, own.correct, macs)),
    }


def _thin_out(curve: Tradeoff) -> dict[str, list[float]]:
    """Take points at equal distances of a curve, for a file."""
    points = len(curve.thresholds)
    some = torch.linspace(0, points - 1, min(points, CURVE_POINTS), dtype=torch.float64).round().long()
    return {name: values[some].tolist() for name, values in curve._asdict().items()}


def add_accuracies(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Add the accuracy of every depth to its row.

    Args:
        rows: Rows with depth, as `count_costs` gives them.
        metrics: top1_<depth> and top5_<depth>, as `evaluate` gives them.

    Returns:
        Rows of results.
    """
    return [dict(row, top1=metrics[f'top1_{row["depth"]}'], top5=metrics[f'top5_{row["depth"]}']) for row in rows]
