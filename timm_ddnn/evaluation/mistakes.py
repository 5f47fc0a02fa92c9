"""What a model mistakes for what: classes that are confused, and images that it is sure of and wrong."""
import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.datasets import ImageData
from ..data.images import Images
from ..utils.files import write_text
from .plots import save_figure
from .predict import Predictions

__all__ = [
    'Confusions', 'count_confusions', 'find_mistakes', 'most_confused', 'plot_confusions', 'plot_mistakes',
    'write_confusions',
]


Confusions = dict[int, Counter[tuple[int, int]]]  # images by depth, and by true and predicted class
MOST_CLASSES = 20  # that a plot of confusions shows
MOST_MISTAKES = 24  # that are kept, and drawn on the sheet
SIDE = 256  # px, the most of an image on the sheet


def count_confusions(predictions: Predictions) -> Confusions:
    """Count the images of every class that each depth takes for every class; what does not occur is left out."""
    confusions = {}
    for depth, classes in zip(predictions.depths, predictions.classes, strict=True):
        confusions[depth] = Counter(zip(predictions.target.tolist(), classes.tolist(), strict=True))
    return confusions


def most_confused(confusions: Confusions, num_classes: int, most: int = MOST_CLASSES) -> list[int]:
    """Choose the classes to show: all, or of many those of the most frequent confusions, over all depths together.

    Args:
        confusions: What `count_confusions` gives.
        num_classes: Classes of the model.
        most: Classes to choose at most.

    Returns:
        Indices of classes, ascending.
    """
    if num_classes <= most:
        return list(range(num_classes))
    total = sum(confusions.values(), Counter())
    chosen: dict[int, None] = {}
    for (true, predicted), _ in total.most_common():
        if true != predicted and len({*chosen, true, predicted}) <= most:
            chosen |= {true: None, predicted: None}
    return sorted(chosen)


def write_confusions(path: Path, confusions: Confusions, class_names: Sequence[str]) -> None:
    """Write a CSV file with depth, true class, predicted class and images; what does not occur is left out.

    Args:
        path: File to write.
        confusions: What `count_confusions` gives.
        class_names: Name of every class, the label being its index.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['depth', 'true', 'predicted', 'images'])
    for depth, counts in confusions.items():
        for (true, predicted), images in sorted(counts.items()):
            writer.writerow([depth, class_names[true], class_names[predicted], images])
    write_text(path, text.getvalue())


def plot_confusions(path: Path, confusions: Confusions, class_names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix per depth: images as numbers, and as colours the share of the class that is mistaken.

    Of more than 20 classes, those of the most frequent confusions are drawn.

    Args:
        path: PNG file to write.
        confusions: What `count_confusions` gives.
        class_names: Name of every class, the label being its index.
        title: Title.
    """
    shown = most_confused(confusions, len(class_names))
    if len(shown) < len(class_names):
        title += f'\nthe {len(shown)} of {len(class_names):,} classes that are most confused'
    names = [_shorten(class_names[i]) for i in shown]
    side, margin = max(3.0, 0.36 * len(shown)), 0.08 * max(map(len, names))  # inches
    figure = Figure(figsize=(side * len(confusions) + margin + 2.2, side + margin + 1.4), layout='compressed')
    figure.suptitle(title, parse_math=False)
    panels = figure.subplots(1, len(confusions), squeeze=False, sharey=True)[0]
    counts = {depth: np.array([[pairs[t, p] for p in shown] for t in shown]) for depth, pairs in confusions.items()}
    shares = {depth: _share_mistaken(counts[depth], confusions[depth], shown) for depth in confusions}
    most = max(1.0, *(np.nanmax(share, initial=0.0) for share in shares.values()))
    for axes, depth in zip(panels, confusions, strict=True):
        image = axes.imshow(shares[depth], cmap='Reds', vmin=0, vmax=most, aspect='equal')
        axes.set(title=f'depth {depth}', xlabel='predicted class')
        axes.set_xticks(range(len(shown)), names, rotation=90, fontsize='small', parse_math=False)
        axes.set_yticks(range(len(shown)), names, fontsize='small', parse_math=False)
        _write_counts(axes, counts[depth], shares[depth] > 0.6 * most)
    panels[0].set_ylabel('true class')
    figure.colorbar(image, ax=panels, label='share of the true class (%)')
    save_figure(figure, path)


def _share_mistaken(counts: np.ndarray, pairs: Mapping[tuple[int, int], int], shown: Sequence[int]) -> np.ndarray:
    """Compute the shares of a class that are taken for others, in percent; NaN on the diagonal."""
    totals = Counter()
    for (true, _), images in pairs.items():
        totals[true] += images
    shares = 100 * counts / np.array([[max(totals[i], 1)] for i in shown])
    np.fill_diagonal(shares, np.nan)
    return shares


def _write_counts(axes: Axes, counts: np.ndarray, dark: np.ndarray) -> None:
    for i, j in zip(*np.nonzero(counts), strict=True):
        axes.text(
            j, i, str(counts[i, j]), ha='center', va='center', fontsize=6.5, color='white' if dark[i, j] else 'black',
            fontweight='bold' if i == j else 'normal')


def find_mistakes(
        predictions: Predictions,
        data: ImageData,
        rows: torch.Tensor,
        most: int = MOST_MISTAKES,
) -> list[dict[str, Any]]:
    """Find the images that the full-net is wrong about, those with the greatest confidence first.

    Such an image is unlike the others of its class, or its label is wrong.

    Args:
        predictions: Predictions for N images of the validation split.
        data: The data set.
        rows: The row of each of them in the split, [N].
        most: Mistakes to find at most.

    Returns:
        For each: depth (the full-net's), row, path (None if the data have none), true and predicted (names of classes),
        and confidence, [0, 1].
    """
    wrong = (~predictions.correct[0]).nonzero().flatten()
    order = predictions.confidences[0, wrong].argsort(descending=True, stable=True)[:most]
    files = data.validation.cast_column(data.input_key, datasets.Image(decode=False))
    return [
        {
            'depth': predictions.depths[0],
            'row': int(rows[i]),
            'path': files[int(rows[i])][data.input_key].get('path'),
            'true': data.class_names[predictions.target[i]],
            'predicted': data.class_names[predictions.classes[0, i]],
            'confidence': round(float(predictions.confidences[0, i]), 6),
        }
        for i in wrong[order].tolist()
    ]


def plot_mistakes(path: Path, mistakes: Sequence[Mapping[str, Any]], data: ImageData, title: str) -> None:
    """Draw the images of some mistakes, with labels, confidence, and name or row.

    Args:
        path: PNG file to write.
        mistakes: What `find_mistakes` gives.
        data: The data set.
        title: Title.
    """
    columns = min(6, max(len(mistakes), 3))
    lines = max(1, math.ceil(len(mistakes) / columns))
    figure = Figure(figsize=(2.2 * columns, 2.9 * lines + 0.6), layout='constrained')
    figure.suptitle(title, parse_math=False)
    images = Images(data, 'validation', lambda image: image, seed=None)
    panels = [*figure.subplots(lines, columns, squeeze=False).flat]
    for axes in panels:
        axes.set_axis_off()
    for axes, mistake in zip(panels, mistakes, strict=False):
        image, _ = images[0, mistake['row']]
        image.thumbnail((SIDE, SIDE))
        axes.imshow(image)
        name = Path(mistake['path']).name if mistake['path'] else f'row {mistake["row"]}'
        caption = (
            f'true: {_shorten(mistake["true"])}',
            f'predicted: {_shorten(mistake["predicted"], 18)}, {100 * mistake["confidence"]:.1f} %',
            _shorten(name, 28),
        )
        axes.set_title('\n'.join(caption), fontsize=8, loc='left', parse_math=False)
    save_figure(figure, path)


def _shorten(text: str, most: int = 24) -> str:
    return text if len(text) <= most else f'{text[:most - 1]}…'
