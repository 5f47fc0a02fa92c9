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

__all__ = ['plot_accuracy', 'plot_curves', 'plot_evaluation', 'save_figure', 'show_macs']


def plot_accuracy(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw top-1 accuracy over multiply-accumulates, a point per depth.

    Args:
        path: PNG file to write.
        rows: Rows with depth, macs and top1.
        title: Title.
    """
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.add_subplot()
    macs = [row['macs'] for row in rows]
    axes.plot(macs, [row['top1'] for row in rows], color='0.7')
    for i, row in enumerate(rows):
        axes.plot(row['macs'], row['top1'], 'o', color=f'C{i}', label=f'depth {row["depth"]}: {row["top1"]:.2f} %')
    figure.legend(loc='outside lower center', ncols=min(len(rows), 3))
    axes.margins(x=0.1, y=0.1)
    axes.set_title(title, parse_math=False)  # the name of a data set may have dollar signs
    axes.set(xlabel='multiply-accumulates per image', ylabel='top-1 accuracy (%)')
    show_macs(axes, max(macs))
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_curves(path: Path, history: Sequence[Mapping[str, Any]], depths: Sequence[int], title: str) -> None:
    """Draw the terms of the loss and the accuracy of every depth by epoch.

    Args:
        path: PNG file to write.
        history: Records with epoch, and by depth train_ce_<depth>, train_kl_<depth>, train_attention_<depth>,
            top1_<depth> and ema_top1_<depth>, of which some may be missing.
        depths: Depths, the full-net's first.
        title: Title.
    """
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    figure.suptitle(title, parse_math=False)
    losses, accuracies = figure.subplots(1, 2)
    epochs = [record['epoch'] + 1 for record in history]
    curves = [
        (losses, 'train_ce', '.-', 'cross-entropy'),
        (losses, 'train_kl', 'x--', 'KL divergence'),
        (losses, 'train_attention', '+:', 'attention'),
        (accuracies, 'top1', '.-', 'weights of the epoch'),
        (accuracies, 'ema_top1', 'x--', 'averaged weights'),
    ]
    for axes, metric, style, label in curves:
        for i, depth in enumerate(depths):
            values = [record.get(f'{metric}_{depth}', math.nan) for record in history]
            axes.plot(epochs, values, style, color=f'C{i}')
        if any(f'{metric}_{depth}' in history[-1] for depth in depths):
            axes.plot([], [], style, color='black', label=label)
    losses.set(title='training, terms of the loss without their weights', xlabel='epoch', yscale='log')
    accuracies.set(title='validation', xlabel='epoch', ylabel='top-1 accuracy (%)')
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0.5, len(history) + 0.5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize='small')
    handles = [Line2D([], [], color=f'C{i}', label=f'depth {depth}') for i, depth in enumerate(depths)]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(depths))
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


def plot_evaluation(path: Path, result: Mapping[str, Any], title: str) -> None:
    """Draw top-1 accuracy over multiply-accumulates, with the cascade if there is one, and the calibration.

    Args:
        path: PNG file to write.
        result: depths and cascade as in `evaluation.json`.
        title: Title.
    """
    figure = Figure(figsize=(11, 5.2), layout='constrained')
    figure.suptitle(title, parse_math=False)
    left, right = figure.subplots(1, 2)
    colors = {row['depth']: f'C{i}' for i, row in enumerate(result['depths'])}
    _draw_accuracy(left, result, colors)
    _draw_calibration(right, result, colors)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.15), ncols=2)
    save_figure(figure, path)


def _draw_accuracy(axes: Axes, result: Mapping[str, Any], colors: Mapping[int, str]) -> None:
    cascade, title = result['cascade'], 'accuracy'
    if cascade:
        points = [(step['depth'], step['macs_alone'], step['top1_alone']) for step in cascade['steps']]
        axes.plot(cascade['curve']['macs'], cascade['curve']['top1'], color='0.5', label='cascade, all thresholds')
        axes.plot(
            cascade['macs'], cascade['top1'], '*', color='black', markersize=13, zorder=3,
            label=f'threshold {cascade["threshold"]:.4f}: {cascade["top1"]:.2f} %',
        )
        if cascade['chosen']:
            title += f' on {cascade["images"]:,} images, the threshold chosen on others'
    else:
        points = [(row['depth'], row['macs'], row['top1']) for row in result['depths']]
    for depth, macs, top1 in points:
        axes.plot(macs, top1, 'o', color=colors[depth], label=f'depth {depth} alone: {top1:.2f} %')
    show_macs(axes, max(macs for _, macs, _ in points))
    axes.margins(x=0.1, y=0.1)
    axes.set(title=title, xlabel='multiply-accumulates per image', ylabel='top-1 accuracy (%)')


def _draw_calibration(axes: Axes, result: Mapping[str, Any], colors: Mapping[int, str]) -> None:
    axes.plot([0, 1], [0, 1], ':', color='black', label='calibrated')
    for row in result['depths']:
        bins = [values for values in zip(*row['calibration'].values(), strict=True) if values[0]]
        counts, confidences, accuracies = zip(*bins, strict=True)
        color, sizes = colors[row['depth']], [200 * count / sum(counts) for count in counts]
        label = f'depth {row["depth"]}: calibration error {row["ece"]:.2f} %'
        axes.plot(confidences, accuracies, linewidth=0.8, color=color, label=label)
        axes.scatter(confidences, accuracies, sizes, color=color, clip_on=False, zorder=3)
    axes.set_title('calibration, points sized by images', pad=14)  # points at 1 reach beyond the axes
    axes.set(xlabel='confidence', ylabel='accuracy', xlim=(0, 1), ylim=(0, 1))
