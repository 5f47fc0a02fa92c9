"""Metrics of every depth from one pass over images, of cascades of depths, and a picture of both.

A pass keeps the prediction, confidence and hits of every image, so that whatever is computed from them is exact and
needs no second pass. The accuracy that the training script follows is in `evaluation.py`.
"""
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

from .cascade import StepCost, autocast, choose_threshold, confidence, exit_steps, trace_thresholds
from .report import save_figure, show_macs

__all__ = [
    'Predictions', 'calibration_bins', 'class_rows', 'depth_metrics', 'evaluate_cascade', 'plot_evaluation', 'predict',
    'split_images',
]

BINS = 15
CURVE_POINTS = 200  # of a curve in a file; the choice of a threshold is from all


class Predictions(NamedTuple):
    """What D depths say of N images.

    Attributes:
        depths: The depths, the full-net's first.
        target: Labels, [N].
        classes: Classes with the greatest logits, [D, N].
        confidences: Probabilities of these classes, [D, N], float32.
        top5: Whether the label is among the best five (best k if there are k < 5 classes), [D, N].
    """
    depths: tuple[int, ...]
    target: torch.Tensor
    classes: torch.Tensor
    confidences: torch.Tensor
    top5: torch.Tensor

    @property
    def correct(self) -> torch.Tensor:
        """Whether the classes are the labels, [D, N]."""
        return self.classes == self.target

    def select(self, images: torch.Tensor, depths: Sequence[int] | None = None) -> 'Predictions':
        """Select images by their indices, and depths in an order of one's own, all of them if None."""
        depths = self.depths if depths is None else tuple(depths)
        rows = torch.tensor([self.depths.index(depth) for depth in depths])[:, None]
        return Predictions(
            depths, self.target[images], self.classes[rows, images], self.confidences[rows, images],
            self.top5[rows, images],
        )


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[Any], precision: str = 'no') -> Predictions:
    """Run all depths on images, each batch once for all of them.

    Args:
        model: Dynamic-depth model. It is left in eval mode.
        batches: Images [B, C, H, W] and labels [B].
        precision: 'no' or 'bf16', as in accelerate.

    Returns:
        The predictions, on the CPU.

    Raises:
        ValueError: If logits are not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for images, target in batches:
        with autocast(device, precision):
            outputs = model(images.to(device, non_blocking=True), depth='all')
        target, found = target.to(device), []
        for depth, output in outputs.items():
            logits = output.logits.float()
            if not logits.isfinite().all():
                raise ValueError(f'the model gives logits at depth {depth} that are not finite')
            best = logits.topk(min(5, logits.shape[-1])).indices
            found.append((logits.argmax(-1), confidence(logits), (best == target[:, None]).any(-1)))
        parts.append([target.cpu(), *(torch.stack(values).cpu() for values in zip(*found, strict=True))])
    target, *values = zip(*parts, strict=True)
    return Predictions(model.depths, torch.cat(target), *(torch.cat(value, dim=1) for value in values))


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


def _calibration_error(bins: Mapping[str, list]) -> float:
    errors = [n * abs(a - c) for n, c, a in zip(*bins.values(), strict=True) if n]
    return 100 * sum(errors) / sum(bins['images'])


def depth_metrics(predictions: Predictions) -> list[dict[str, Any]]:
    """Compute the metrics of every depth.

    Args:
        predictions: Of at least one image.

    Returns:
        Rows with depth and, in percent, top1, top5, ece and agreement, and with `calibration_bins`. `ece` is the
        expected calibration error of the predicted class over these bins: the mean difference of confidence and
        accuracy, weighted by images ('On Calibration of Modern Neural Networks', arXiv 1706.04599, equation 3).
        `agreement` is the share of images with the same prediction as the first depth's, the full-net's.
    """
    rows = []
    for i, depth in enumerate(predictions.depths):
        bins = calibration_bins(predictions.confidences[i], predictions.correct[i])
        rows.append({
            'depth': depth,
            'top1': _percent(predictions.correct[i]),
            'top5': _percent(predictions.top5[i]),
            'ece': round(_calibration_error(bins), 4),
            'agreement': _percent(predictions.classes[i] == predictions.classes[0]),
            'calibration': bins,
        })
    return rows


def _percent(values: torch.Tensor) -> float:
    return round(100 * float(values.double().mean()), 4)


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
            f'top1_{depth}': _percent(hits) if len(hits) else None
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
        ValueError: If a part has no image.
    """
    first = round(count * holdout)
    if not 0 < first < count:
        raise ValueError(f'the share of held-out images must leave some in both parts of {count}, got {holdout}')
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
        threshold, top1 in percent and macs (mean multiply-accumulates per image) on the `images` reported on; chosen:
        the same on those chosen by, None if the threshold was given; steps: for every net its costs, the percentage of
        images that end there, and top1 and macs of that net alone on the same images; beaten_by: the depth that alone
        takes no more MACs and is no less accurate than the cascade, or None; curve: at most 200 of all thresholds.

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
    steps = exit_steps(own.confidences, threshold)
    total = torch.tensor(macs).cumsum(0)
    rows = [
        {
            **cost._asdict(),
            'macs_alone': cost.macs + cost.reused,
            'top1_alone': _percent(own.correct[i]),
            'ends': _percent(steps == i),
        }
        for i, cost in enumerate(costs)
    ]
    curve = trace_thresholds(own.confidences, own.correct, macs)
    points = len(curve.thresholds)
    some = torch.linspace(0, points - 1, min(points, CURVE_POINTS), dtype=torch.float64).round().long()
    top1, mean_macs = _percent(own.correct[steps, torch.arange(len(steps))]), float(total[steps].double().mean())
    better = [row for row in rows if row['top1_alone'] >= top1 and row['macs_alone'] <= mean_macs]
    return {
        'depths': depths,
        'confidence': 'greatest softmax probability; an image goes on where it is not above the threshold',
        'threshold': threshold,
        'target_top1': target_top1,
        'budget_macs': budget_macs,
        'chosen': chosen,
        'images': len(own.target),
        'top1': top1,
        'macs': mean_macs,
        'steps': rows,
        'beaten_by': max(better, key=lambda row: row['top1_alone'])['depth'] if better else None,
        'curve': {name: values[some].tolist() for name, values in curve._asdict().items()},
    }


def plot_evaluation(path: Path, result: Mapping[str, Any], title: str) -> None:
    """Draw top-1 accuracy over multiply-accumulates, with the cascade if there is one, and the calibration.

    Args:
        path: PNG file to write.
        result: depths and cascade as in `evaluation.json`.
        title: Title.
    """
    figure = Figure(figsize=(11, 5.2), layout='constrained')
    figure.suptitle(title)
    axes, reliability = figure.subplots(1, 2)
    colors = {row['depth']: f'C{i}' for i, row in enumerate(result['depths'])}
    cascade = result['cascade']
    if cascade:
        points = [(step['depth'], step['macs_alone'], step['top1_alone']) for step in cascade['steps']]
        axes.plot(cascade['curve']['macs'], cascade['curve']['top1'], color='0.5', label='cascade, all thresholds')
        axes.plot(
            cascade['macs'], cascade['top1'], '*', color='black', markersize=13, zorder=3,
            label=f'threshold {cascade["threshold"]:.4f}: {cascade["top1"]:.2f} %',
        )
    else:
        points = [(row['depth'], row['macs'], row['top1']) for row in result['depths']]
    for depth, macs, top1 in points:
        axes.plot(macs, top1, 'o', color=colors[depth], label=f'depth {depth} alone: {top1:.2f} %')
    show_macs(axes, max(macs for _, macs, _ in points))
    axes.margins(x=0.1, y=0.1)
    on = f' on {cascade["images"]:,} images, the threshold chosen on others' if cascade and cascade['chosen'] else ''
    axes.set(title=f'accuracy{on}', xlabel='multiply-accumulates per image', ylabel='top-1 accuracy (%)')

    reliability.plot([0, 1], [0, 1], ':', color='black', label='calibrated')
    for row in result['depths']:
        counts, confidences, accuracies = zip(
            *(values for values in zip(*row['calibration'].values(), strict=True) if values[0]), strict=True)
        label = f'depth {row["depth"]}: calibration error {row["ece"]:.2f} %'
        reliability.plot(confidences, accuracies, linewidth=0.8, color=colors[row['depth']], label=label)
        sizes = [200 * count / sum(counts) for count in counts]
        reliability.scatter(confidences, accuracies, sizes, color=colors[row['depth']], clip_on=False, zorder=3)
    reliability.set_title('calibration, points sized by images', pad=14)  # points at 1 reach beyond the axes
    reliability.set(xlabel='confidence', ylabel='accuracy', xlim=(0, 1), ylim=(0, 1))
    for part in (axes, reliability):
        part.grid(alpha=0.3)
        part.legend(fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.15), ncols=2)
    save_figure(figure, path)
