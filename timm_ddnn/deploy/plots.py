"""The plot of a profile."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..evaluation.plots import save_figure

__all__ = ['plot_profile']


MARKERS = 'osD^vP*X'


def plot_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Draw the latency of every depth, a panel per batch size and in it a band per depth, the full-net's on top.

    A point is the median of a runtime with a number of threads; a line goes from it to the 90th percentile. The axis of
    latency is logarithmic where medians of one panel are more than ten times apart. The accuracy of a depth stands
    beside its name if it is known.

    Args:
        path: PNG file to write.
        profile: Profile, see `timm_ddnn.deploy.profile`.
    """
    rows = profile['depths']
    bands = {row['depth']: -i for i, row in enumerate(rows)}
    batch_sizes = sorted({m['batch_size'] for m in profile['measurements']})
    ways = list(dict.fromkeys((m['runtime'], m['threads']) for m in profile['measurements']))
    height = 2.2 + len(rows) * max(0.6, 0.2 * len(ways))
    figure = Figure(figsize=(max(6, 1.5 + 4 * len(batch_sizes)), height), layout='constrained')
    figure.suptitle(_title(profile))
    panels = figure.subplots(1, len(batch_sizes), squeeze=False, sharey=True)[0]
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        measurements = [m for m in profile['measurements'] if m['batch_size'] == batch_size]
        for i, way in enumerate(ways):
            points = [m for m in measurements if (m['runtime'], m['threads']) == way]
            axes.errorbar(
                [m['median_ms'] for m in points],
                [bands[m['depth']] + 0.35 - 0.7 * (i + 0.5) / len(ways) for m in points],
                xerr=[[0] * len(points), [m['p90_ms'] - m['median_ms'] for m in points]],
                linestyle='none', marker=MARKERS[i % len(MARKERS)], capsize=3, color=f'C{i}',
                label=f'{way[0]}, {way[1]} thread{"" if way[1] == 1 else "s"}',
            )
        for band in [*bands.values()][1::2]:
            axes.axhspan(band - 0.5, band + 0.5, color='0.95', zorder=0)
        axes.set_title(f'batch of {batch_size} image{"" if batch_size == 1 else "s"}', fontsize='medium')
        axes.set(xlabel='latency of a batch (ms)', ylim=(0.5 - len(rows), 0.5))
        axes.grid(alpha=0.3, axis='x')
        _scale_latency(axes, [m['median_ms'] for m in measurements])
    known = any('top1' in row for row in rows)
    panels[0].set_yticks([*bands.values()], [
        f'{row["depth"]}\n{row["top1"]:.2f} %' if 'top1' in row else str(row['depth']) for row in rows])
    panels[0].set_ylabel('depth (layers), top-1 accuracy' if known else 'depth (layers)')
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=2 if len(panels) == 1 else 4,
        fontsize='small', title='median, and line to the 90th percentile', title_fontsize='small',
    )
    save_figure(figure, path)


def _title(profile: Mapping[str, Any]) -> str:
    height, width = profile['input_size'][1:]
    hardware = profile['hardware']
    chip = hardware['cpu'] if profile['device'] == 'cpu' else ', '.join(dict.fromkeys(hardware['gpus']))
    return f'{profile["architecture"]}, images of {width} x {height} px\n{chip}'


def _scale_latency(axes: Axes, medians: Sequence[float]) -> None:
    if max(medians) <= 10 * min(medians):
        axes.set_xlim(0, None)
        return
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter('{x:g}')
    axes.xaxis.set_minor_formatter(NullFormatter())
