"""The plot of a profile."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..evaluation.plots import save_figure

__all__ = ['plot_profile']


def plot_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Draw accuracy over latency, or latency by depth where an accuracy is not known: a panel per batch size.

    A point is the median of a depth; a line goes from it to the 90th percentile. The axis of latency is logarithmic
    where medians of one panel are more than ten times apart.

    Args:
        path: PNG file to write.
        profile: Profile, see `timm_ddnn.deploy.profile`.
    """
    rows = {row['depth']: row for row in profile['depths']}
    known = all('top1' in row for row in rows.values())
    batch_sizes = sorted({m['batch_size'] for m in profile['measurements']})
    figure = Figure(figsize=(max(6, 4.5 * len(batch_sizes)), 4.6), layout='constrained')
    figure.suptitle(_title(profile))
    panels = figure.subplots(1, len(batch_sizes), squeeze=False, sharey=known)[0]
    ways = list(dict.fromkeys((m['runtime'], m['threads']) for m in profile['measurements']))
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        measurements = [m for m in profile['measurements'] if m['batch_size'] == batch_size]
        for i, way in enumerate(ways):
            points = [m for m in measurements if (m['runtime'], m['threads']) == way]
            latency = [m['median_ms'] for m in points]
            spread = [[0] * len(points), [m['p90_ms'] - m['median_ms'] for m in points]]
            style = dict(marker='o', capsize=3, color=f'C{i}', label=f'{way[0]}, threads: {way[1]}')
            if known:
                axes.errorbar(latency, [rows[m['depth']]['top1'] for m in points], xerr=spread, **style)
            else:
                axes.errorbar([m['depth'] for m in points], latency, yerr=spread, **style)
        axes.set_title(f'batch of {batch_size}', fontsize='medium')
        axes.grid(alpha=0.3)
        if known:
            axes.set_xlabel('latency of a batch (ms)')
            for row in rows.values():
                axes.axhline(row['top1'], color='grey', linewidth=0.5, linestyle=':')
        else:
            axes.set(xlabel='depth', xticks=[*rows])
        _scale_latency(axes, 'x' if known else 'y', [m['median_ms'] for m in measurements])
    panels[0].set_ylabel('top-1 accuracy (%)' if known else 'latency of a batch (ms)')
    if known:
        right = panels[-1].secondary_yaxis('right')
        ticks = _group_near({depth: row['top1'] for depth, row in rows.items()})
        right.set_yticks([*ticks], [f'depth {", ".join(map(str, depths))}' for depths in ticks.values()])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize='small',
        title='median, and line to the 90th percentile', title_fontsize='small',
    )
    save_figure(figure, path)


def _title(profile: Mapping[str, Any]) -> str:
    pixels = ' x '.join(map(str, profile['input_size'][1:]))
    chip = profile['hardware']['cpu'] if profile['device'] == 'cpu' else ', '.join(profile['hardware']['gpus'])
    return f'{profile["architecture"]}, {pixels} px, {chip}'


def _scale_latency(axes: Axes, direction: str, medians: Sequence[float]) -> None:
    if max(medians) <= 10 * min(medians):
        axes.set(**{f'{direction}lim': (0, None)})
        return
    axes.set(**{f'{direction}scale': 'log'})
    axis = axes.xaxis if direction == 'x' else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter('{x:g}')
    axis.set_minor_formatter(NullFormatter())


def _group_near(heights: Mapping[int, float]) -> dict[float, list[int]]:
    """Group the depths whose labels at the side of a panel would overlap, by the height of the lowest."""
    groups: dict[float, list[int]] = {}
    span = max(heights.values()) - min(heights.values())
    for depth, height in sorted(heights.items(), key=lambda item: item[1]):
        if groups and height - (last := next(reversed(groups))) <= 0.05 * span:
            groups[last].append(depth)
        else:
            groups[height] = [depth]
    return groups
