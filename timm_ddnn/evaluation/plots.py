"""Plots of accuracy, training curves and calibration."""
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .metrics import wilson_interval

__all__ = [
    'MARKERS', 'plot_accuracy', 'plot_calibration', 'plot_curves', 'save_figure', 'show_macs', 'widen_axis',
]


MARKERS = 'osD^vP*X'  # of depths, or of other curves of one plot
LEAST_IMAGES = 20  # of a point in a plot of the calibration


def plot_accuracy(
        path: Path,
        rows: Sequence[Mapping[str, Any]],
        title: str,
        *,
        cascade: Mapping[str, Any] | None = None,
) -> None:
    """Draw top-1 accuracy over multiply-accumulates with 95 % intervals, a point per depth.

    Args:
        path: PNG file to write.
        rows: Rows with depth, macs, top1 and top1_interval.
        title: Title.
        cascade: A cascade to draw too, as `evaluate_cascade` gives it; the depths are then those of its steps.
    """
    figure = Figure(figsize=(7, 5), layout='constrained')
    axes = figure.add_subplot()
    points = [(row['depth'], row['macs'], row['top1'], row['top1_interval']) for row in rows]
    if cascade:
        points = [
            (step['depth'], step['macs_alone'], step['top1_alone'], step['top1_alone_interval'])
            for step in cascade['steps']]
        axes.plot(cascade['curve']['macs'], cascade['curve']['top1'], color='0.6', label='cascade, all thresholds')
        _draw_point(
            axes, cascade['macs'], cascade['top1'], cascade['top1_interval'], fmt='*', color='black', markersize=13,
            label=f'cascade, threshold {cascade["threshold"]:.4f}: {cascade["top1"]:.2f} %')
        if cascade['chosen']:
            title += f'\ncascade on {cascade["images"]:,} images, its threshold chosen on others'
    colors = {row['depth']: f'C{i}' for i, row in enumerate(rows)}
    for depth, macs, top1, interval in points:
        _draw_point(
            axes, macs, top1, interval, fmt='o', color=colors[depth], label=f'depth {depth}: {top1:.2f} %')
    show_macs(axes, max(macs for _, macs, *_ in points))
    axes.margins(x=0.1, y=0.1)
    widen_axis(axes, [*([cascade['top1_interval']] if cascade else []), *(point[-1] for point in points)])
    axes.set_title(title, parse_math=False)  # the name of a data set may have dollar signs
    axes.set(xlabel='multiply-accumulates per image', ylabel='top-1 accuracy (%)')
    axes.grid(alpha=0.3)
    figure.legend(
        loc='outside lower center', ncols=2, fontsize='small', title='bars: 95 % confidence intervals (Wilson)',
        title_fontsize='small')
    save_figure(figure, path)


def widen_axis(axes: Axes, intervals: Sequence[Sequence[float]]) -> None:
    """Let the axis of an accuracy span three times the widest of some intervals: no difference looks larger than it."""
    low, high = axes.get_ylim()
    more = 3 * max(high - low for low, high in intervals) - (high - low)
    if more > 0:
        axes.set_ylim(low - more / 2, high + more / 2)


def plot_curves(
        path: Path,
        history: Sequence[Mapping[str, Any]],
        rows: Sequence[Mapping[str, Any]],
        title: str,
) -> None:
    """Draw the terms of the loss, without their weights, and the accuracy of every depth by epoch, a panel each.

    Args:
        path: PNG file to write.
        history: Records with epoch, and by depth train_ce_<depth>, train_kl_<depth>, train_attention_<depth>,
            top1_<depth> and ema_top1_<depth>, of which some may be missing.
        rows: Rows of the last epoch with depth and top1_interval, the full-net's first.
        title: Title.
    """
    terms = {
        'train_ce': 'training: cross-entropy',
        'train_kl': 'training: KL divergence from the teacher',
        'train_attention': "training: distance to the teacher's attention",
        'top1': 'validation: top-1 accuracy (%)',
    }
    depths, last = [row['depth'] for row in rows], history[-1]
    terms = {term: label for term, label in terms.items() if any(f'{term}_{depth}' in last for depth in depths)}
    averaged = any(f'ema_top1_{depth}' in last for depth in depths)
    lines = 2 if len(terms) == 4 else 1
    columns = len(terms) // lines
    figure = Figure(figsize=(4.5 * columns, 0.8 + 3.4 * lines), layout='constrained')
    figure.suptitle(title, parse_math=False)
    epochs = [record['epoch'] + 1 for record in history]
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes, (term, label) in zip(panels.flat, terms.items(), strict=True):
        for metric, style in (term, '-'), (f'ema_{term}', '--'):
            for i, depth in enumerate(depths):
                values = [record.get(f'{metric}_{depth}', math.nan) for record in history]
                axes.plot(epochs, values, style, color=f'C{i}', marker=MARKERS[i % len(MARKERS)], markersize=4)
        if term == 'top1':
            widen_axis(axes, [row['top1_interval'] for row in rows])
        else:
            axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set(xlabel='epoch', ylabel=label, xlim=(0.5, len(history) + 0.5))
        axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], color=f'C{i}', marker=MARKERS[i % len(MARKERS)], markersize=4, label=f'depth {depth}')
        for i, depth in enumerate(depths)]
    if averaged:
        handles += [Line2D([], [], color='black', linestyle='--', label='averaged weights')]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(handles))
    save_figure(figure, path)


def show_macs(axes: Axes, most: float) -> None:
    """Write the multiply-accumulates of an x-axis in millions, or in billions if the most of them are that many."""
    unit, letter = (1e9, 'G') if most >= 1e9 else (1e6, 'M')
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value / unit:g} {letter}'))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file such that it is whole or not there at all."""
    temporary = path.with_name(f'.{path.name}.tmp')
    figure.savefig(temporary, format='png', dpi=150)
    os.replace(temporary, path)


def _draw_point(axes: Axes, x: float, top1: float, interval: Sequence[float], **style: Any) -> None:
    low, high = interval
    axes.errorbar(x, top1, yerr=[[max(top1 - low, 0)], [max(high - top1, 0)]], capsize=3, zorder=3, **style)


def plot_calibration(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw accuracy over confidence, a panel per depth.

    Bins with few images are joined with the next, so that each point stands for at least 20 images.

    Args:
        path: PNG file to write.
        rows: Rows of `depth_metrics`, with temperature.
        title: Title.
    """
    columns = min(len(rows), 3)
    figure = Figure(figsize=(4 * columns + 0.5, 4.8 * math.ceil(len(rows) / columns)), layout='constrained')
    figure.suptitle(
        f'{title}\npoints: {LEAST_IMAGES} images or more, bars: 95 % intervals of their accuracy', parse_math=False)
    panels = [*figure.subplots(math.ceil(len(rows) / columns), columns, squeeze=False).flat]
    for i, (axes, row) in enumerate(zip(panels, rows, strict=False)):
        axes.plot([0, 100], [0, 100], ':', color='black', label='confidence = accuracy')
        before = row['uncalibrated']
        if before:
            _draw_bins(axes, before['calibration'], '0.6', f'before: calibration error {before["ece"]:.2f} %')
        label = f'temperature {row["temperature"]:.2f}: ' if before else ''
        _draw_bins(axes, row['calibration'], f'C{i}', f'{label}calibration error {row["ece"]:.2f} %')
        axes.set(
            title=f'depth {row["depth"]}', xlabel='confidence (%)', ylabel='accuracy (%)', xlim=(0, 102), ylim=(0, 102))
        axes.grid(alpha=0.3)
        axes.legend(fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.17))
    for axes in panels[len(rows):]:
        axes.set_axis_off()
    save_figure(figure, path)


def _draw_bins(axes: Axes, calibration: Mapping[str, Sequence[Any]], color: str, label: str) -> None:
    points = _join_bins(calibration)
    axes.plot([100 * x / n for n, x, _ in points], [100 * y / n for n, _, y in points], linewidth=1, color=color)
    for n, x, y in points:
        interval = wilson_interval(round(y), n)
        _draw_point(axes, 100 * x / n, 100 * y / n, interval, fmt='o', markersize=4, color=color, label=label)
        label = None


def _join_bins(calibration: Mapping[str, Sequence[Any]]) -> list[tuple[int, float, float]]:
    """Join neighbouring bins until each has 20 images: images, and sums of confidences and of what is right."""
    joined = [(0, 0.0, 0.0)]
    for n, confidence, accuracy in zip(*calibration.values(), strict=True):
        if n:
            if joined[-1][0] >= LEAST_IMAGES:
                joined.append((0, 0.0, 0.0))
            count, sure, right = joined[-1]
            joined[-1] = count + n, sure + n * confidence, right + n * accuracy
    if len(joined) > 1 and joined[-1][0] < LEAST_IMAGES:
        joined[-2:] = [tuple(map(sum, zip(*joined[-2:], strict=True)))]
    return joined
