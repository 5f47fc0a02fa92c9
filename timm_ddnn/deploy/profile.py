"""Latency, peak memory and multiply-accumulates of every depth on this machine, and the picture of them.

A profile is a dict that JSON can hold:

    architecture       timm's name of the model
    trained_depths     depths whose weights are trained; costs do not depend on it
    input_size         (C, H, W)
    device             'cpu' or, for example, 'cuda:0'
    depths             a row per depth: depth, blocks, parameters, macs (of one image), and top1 in percent if known
    measurements       a row per depth, runtime, batch size and number of threads:
        depth, runtime, batch_size, threads
        median_ms      median latency of a batch, in milliseconds
        p90_ms         its 90th percentile, see `selection.percentile_90`
        runs           number of calls that these two are taken over
        compile_s      seconds of the first call, in which 'compiled' compiles, null for other runtimes; the disk's
                       cache begins empty, but what depths have in common is compiled with the first of them
        memory_mb      peak memory of the plain net of the depth alone, with the most of all threads asked for, in
                       10^6 bytes, see `memory.py`: on the CPU
                       growth of the resident memory of a process, on a GPU what tensors hold. A model that switches
                       depths takes what its deepest does.
    versions, hardware, git    of this machine, see `report.describe_machine`

Latency is that of `model(x, depth=depth)`, under ONNX Runtime of the exported `model.extract(depth)`, in float32 on
images in memory. A round visits the depths one after another, so that what else the machine does meets all of them,
and times one call of each after two that are not counted.
"""
import copy
import functools
import importlib
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from timm.data import resolve_input_data_config
from torch import nn

from ..evaluation.plots import save_figure
from ..models.load import create_ddnn, load_model, saved_results
from ..utils.costs import count_costs
from ..utils.environment import describe_machine
from ..utils.files import staged_folder, write_json
from .choose import percentile_90, read_accuracies
from .peak_memory import measure_memory, measure_memory_cuda, onnx_function

__all__ = ['RUNTIMES', 'compare_machines', 'plot_profile', 'profile_model', 'profile_saved']


_RUNNING = ('timm_ddnn', 'torch', 'timm', 'onnxruntime')  # versions that latency depends on
RUNTIMES = ('eager', 'compiled', 'onnxruntime')


def profile_model(
        model: nn.Module,
        *,
        depths: Sequence[int] | None = None,
        batch_sizes: Sequence[int] = (1,),
        threads: Sequence[int] | None = None,
        runtimes: Sequence[str] = ('eager',),
        rounds: int = 20,
        img_size: int | None = None,
        device: str | torch.device | None = None,
        accuracies: Mapping[int, float] | None = None,
        on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what every depth costs on this machine.

    Args:
        model: Dynamic-depth model that `timm.create_model` made. A copy of it is measured. What the process has
            compiled before is compiled anew if 'compiled' is among the runtimes.
        depths: Some of its depths, all if None.
        batch_sizes: Images per batch.
        threads: Numbers of threads, PyTorch's present one if None.
        runtimes: Some of `RUNTIMES`. 'compiled' is `torch.compile`, 'onnxruntime' measures on the CPU only.
        rounds: Rounds, each of which gives a latency of every depth.
        img_size: Side of the images in pixels, the model's if None.
        device: 'cpu' or a CUDA device; the first of these if there is one, else the CPU, if None.
        accuracies: Top-1 accuracy in percent by depth, to stand beside the costs.
        on_step: Called with a line of text before each step, for a display of progress.

    Returns:
        The profile, see the head of this module.

    Raises:
        ValueError: If an argument is out of its range, a runtime is not installed, or a depth does not run, for
            example because memory is too small.
    """
    from torch._inductor.utils import fresh_cache  # slow to import, as Timer below; `choose` needs neither
    from torch.utils.benchmark.utils.common import set_torch_threads

    threads = (torch.get_num_threads(),) if threads is None else threads
    for name, values in {'batch_sizes': batch_sizes, 'threads': threads, 'rounds': (rounds,)}.items():
        if not values or min(values) < 1:
            raise ValueError(f'{name} must be integers of at least 1, got {values}')
    if max(threads) > os.cpu_count():
        raise ValueError(f'threads must be at most the {os.cpu_count()} cores of this machine, got {max(threads)}')
    device = _check_device(device)
    _check_runtimes(runtimes, device)
    depths = model.resolve_depths('all' if depths is None else tuple(depths))[0]
    input_size = resolve_input_data_config(model, args={'img_size': img_size})['input_size']

    on_step('counting')
    trained = [depth for depth in model.trained_depths if depth in depths]
    model = copy.deepcopy(model).to(device).eval()
    rows = [row for row in count_costs(model, input_size) if row['depth'] in depths]
    for row in rows:
        if accuracies and row['depth'] in accuracies:
            row['top1'] = accuracies[row['depth']]

    measurements = []
    with tempfile.TemporaryDirectory() as folder:
        for runtime in dict.fromkeys(runtimes):
            files = {}
            if runtime == 'onnxruntime':
                for depth in depths:
                    on_step(f'exporting depth {depth} to ONNX')
                    files[depth] = _run_or_name(
                        f'depth {depth}, {runtime}', _export, model.extract(depth), Path(folder, str(depth)),
                        input_size, batch_sizes)
            memory = {}
            for depth in depths:
                on_step(f'{runtime}, depth {depth}: memory')
                args = dict(runtime=runtime, input_size=input_size, batch_sizes=tuple(dict.fromkeys(batch_sizes)))
                memory[depth] = _run_or_name(
                    f'depth {depth}, {runtime}',
                    functools.partial(measure_memory_cuda, device=device, **args) if device.type == 'cuda' else
                    functools.partial(measure_memory, threads=max(threads), onnx_files=files.get(depth), **args),
                    model.extract(depth).cpu(),
                )
            for count in dict.fromkeys(threads):
                for batch_size in dict.fromkeys(batch_sizes):
                    setting = {'runtime': runtime, 'batch_size': batch_size, 'threads': count}
                    cache = fresh_cache(dir=folder) if runtime == 'compiled' else nullcontext()
                    with set_torch_threads(count), torch.inference_mode(), cache:
                        latencies = _measure_latency(
                            model, depths, input_size, rounds, files, on_step, **setting)
                    measurements += [
                        {'depth': depth, **setting, **latencies[depth], 'memory_mb': memory[depth][batch_size] / 1e6}
                        for depth in depths
                    ]
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'trained_depths': trained,
        'input_size': list(input_size),
        'device': str(device),
        'depths': rows,
        'measurements': measurements,
        **_describe(runtimes),
    }


def _check_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'cpu' or a CUDA device such as 'cuda:0', got {device!r}") from None
    gpus = torch.cuda.device_count()
    if device.type not in ('cpu', 'cuda') or (device.type == 'cuda' and (device.index or 0) >= gpus):
        raise ValueError(f"device must be 'cpu' or one of the {gpus} CUDA devices here, got '{device}'")
    return device


def _check_runtimes(runtimes: Sequence[str], device: torch.device) -> None:
    unknown = [runtime for runtime in runtimes if runtime not in RUNTIMES]
    if unknown or not runtimes:
        raise ValueError(f'runtimes must be some of {", ".join(RUNTIMES)}, got {", ".join(runtimes)!r}')
    if 'onnxruntime' in runtimes:
        if device.type != 'cpu':
            raise ValueError(f"runtime onnxruntime is measured on the CPU, got device '{device}'")
        missing = [package for package in ('onnx', 'onnxscript', 'onnxruntime') if not find_spec(package)]
        if missing:
            raise ValueError(
                f"runtime onnxruntime needs the packages {', '.join(missing)}: pip install 'timm-ddnn[export]'")


def _run_or_name(what: str, function: Callable[..., Any], *args: Any) -> Any:
    """Run what may exceed this machine, and name it when it does."""
    try:
        return function(*args)
    except RuntimeError as e:  # also that memory is too small, and everything that torch.compile raises
        raise ValueError(f'{what} does not run here: {(str(e).strip() or repr(e)).splitlines()[0]}') from e


def _export(net: nn.Module, folder: Path, input_size: Sequence[int], batch_sizes: Sequence[int]) -> dict[int, Path]:
    """Write a plain net as ONNX files, one per batch size."""
    folder.mkdir()
    files = {batch_size: folder / f'{batch_size}.onnx' for batch_size in batch_sizes}
    for batch_size, path in files.items():
        images = torch.zeros(batch_size, *input_size)
        torch.onnx.export(net.eval(), (images,), path, dynamo=True, external_data=False, verbose=False)
    return files


def _measure_latency(
        model: nn.Module,
        depths: Sequence[int],
        input_size: Sequence[int],
        rounds: int,
        files: Mapping[int, Mapping[int, Path]],
        on_step: Callable[[str], None],
        *,
        runtime: str,
        batch_size: int,
        threads: int,
) -> dict[int, dict[str, Any]]:
    """Measure the latency of every depth in turn: median_ms, p90_ms, runs and compile_s by depth."""
    from torch.utils.benchmark import Timer

    images = torch.randn(batch_size, *input_size, device=next(model.parameters()).device)
    functions, compile_s = {}, dict.fromkeys(depths)
    if runtime == 'compiled':
        torch._dynamo.reset()  # each setting has its own code, and past some number of it nothing is compiled any more
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=max(8, len(depths))):
        for depth in depths:
            step = f'depth {depth}, {runtime}, batch of {batch_size}, threads: {threads}'
            if runtime == 'onnxruntime':
                functions[depth] = functools.partial(
                    onnx_function(files[depth][batch_size], threads), images.cpu().numpy())
            else:
                net = compiled if runtime == 'compiled' else model
                functions[depth] = functools.partial(net, images, depth=depth)
            on_step(f'{step}: first call')
            start = time.perf_counter()
            _run_or_name(step, functions[depth])
            if runtime == 'compiled':
                compile_s[depth] = time.perf_counter() - start
        timers = {
            depth: Timer('f()', globals={'f': function}, num_threads=threads) for depth, function in functions.items()}
        latencies = {depth: [] for depth in depths}
        for i in range(rounds):
            on_step(f'{runtime}, batch of {batch_size}, threads: {threads}: round {i + 1} of {rounds}')
            for depth, timer in timers.items():
                latencies[depth].append(1000 * timer.timeit(1).median)  # after two calls that it does not count
    return {
        depth: {
            'median_ms': statistics.median(values),
            'p90_ms': percentile_90(values),
            'runs': len(values),
            'compile_s': compile_s[depth],
        }
        for depth, values in latencies.items()
    }


def _describe(runtimes: Collection[str]) -> dict[str, Any]:
    machine = describe_machine()
    if 'onnxruntime' in runtimes:
        machine['versions']['onnxruntime'] = (
            importlib.import_module('onnxruntime').__version__ if find_spec('onnxruntime') else 'none')
    return machine


def compare_machines(profile: Mapping[str, Any]) -> list[str]:
    """Name what of this machine differs from that of a profile: hardware, and versions of what runs the nets.

    Args:
        profile: Profile.

    Returns:
        Texts such as "torch '2.9.1' there, '2.14.1' here", none if nothing differs.
    """
    here, differences = _describe({m.get('runtime') for m in profile['measurements']}), []
    for part in ('hardware', 'versions'):
        there = profile.get(part)
        for name, value in here[part].items():
            other = there.get(name, 'unknown') if isinstance(there, Mapping) else 'unknown'
            if value != other and name in (*here['hardware'], *_RUNNING):
                differences.append(f'{name} {other!r} there, {value!r} here')
    return differences


def plot_profile(path: Path, profile: Mapping[str, Any], title: str) -> None:
    """Draw accuracy over latency, or latency by depth where an accuracy is not known: a panel per batch size.

    A point is the median of a depth; a line goes from it to the 90th percentile. The axis of latency is logarithmic
    where medians of one panel are more than ten times apart.

    Args:
        path: PNG file to write.
        profile: Profile.
        title: Title.
    """
    rows = {row['depth']: row for row in profile['depths']}
    known = all('top1' in row for row in rows.values())
    measurements = profile['measurements']
    batch_sizes = sorted({m['batch_size'] for m in measurements})
    ways = list(dict.fromkeys((m['runtime'], m['threads']) for m in measurements))
    figure = Figure(figsize=(max(6, 4.5 * len(batch_sizes)), 4.6), layout='constrained')
    figure.suptitle(title)
    panels = figure.subplots(1, len(batch_sizes), squeeze=False, sharey=known)[0]
    for axes, batch_size in zip(panels, batch_sizes, strict=True):
        for i, (runtime, threads) in enumerate(ways):
            way = (runtime, threads, batch_size)
            points = [m for m in measurements if (m['runtime'], m['threads'], m['batch_size']) == way]
            latency = [m['median_ms'] for m in points]
            spread = [[0] * len(points), [m['p90_ms'] - m['median_ms'] for m in points]]
            label = f'{runtime}, {threads} thread{"s"[:threads != 1]}'
            if known:
                top1 = [rows[m['depth']]['top1'] for m in points]
                axes.errorbar(latency, top1, xerr=spread, marker='o', capsize=3, color=f'C{i}', label=label)
            else:
                depths = [m['depth'] for m in points]
                axes.errorbar(depths, latency, yerr=spread, marker='o', capsize=3, color=f'C{i}', label=label)
        axes.set_title(f'batch of {batch_size}', fontsize='medium')
        axes.grid(alpha=0.3)
        medians = [m['median_ms'] for m in measurements if m['batch_size'] == batch_size]
        wide = max(medians) > 10 * min(medians)
        if known:
            axes.set(xlabel='latency of a batch (ms)', **({'xscale': 'log'} if wide else {'xlim': (0, None)}))
            latency_axis = axes.xaxis
            for row in rows.values():
                axes.axhline(row['top1'], color='grey', linewidth=0.5, linestyle=':')
        else:
            axes.set(xlabel='depth', xticks=[*rows], **({'yscale': 'log'} if wide else {'ylim': (0, None)}))
            latency_axis = axes.yaxis
        if wide:
            latency_axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            latency_axis.set_major_formatter('{x:g}')
            latency_axis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel('top-1 accuracy (%)' if known else 'latency of a batch (ms)')
    if known:
        right = panels[-1].secondary_yaxis('right')
        ticks = _apart({depth: row['top1'] for depth, row in rows.items()})
        right.set_yticks([*ticks], [f'depth {", ".join(map(str, depths))}' for depths in ticks.values()])
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, fontsize='small',
        title='median, and line to the 90th percentile', title_fontsize='small',
    )
    save_figure(figure, path)


def _apart(heights: Mapping[int, float]) -> dict[float, list[int]]:
    """Group what labels at the side of a panel would overlap, by the height of the lowest."""
    groups: dict[float, list[int]] = {}
    span = max(heights.values()) - min(heights.values())
    for depth, height in sorted(heights.items(), key=lambda item: item[1]):
        if groups and height - (last := next(reversed(groups))) <= 0.05 * span:
            groups[last].append(depth)
        else:
            groups[height] = [depth]
    return groups

_logger = logging.getLogger(__name__)


def profile_saved(
        name: str,
        output: str | Path | None = None,
        *,
        evaluation: str | Path | None = None,
        **kwargs: Any,
) -> dict[str, Any]:
    """Load a model, profile it, and write profile.json and profile.png.

    Args:
        name: Name in timm's registry, created untrained unless its weights come with this library; or
            'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.
        output: Folder to write to, none if None.
        evaluation: JSON file with accuracies, as for `read_accuracies`; those saved with the model if None.
        **kwargs: Further arguments of `profile_model`.

    Returns:
        model (the name), and what `profile_model` gives.

    Raises:
        ValueError: If there is no such model, or an argument is out of its range.
        OSError: If a file cannot be read or written.
    """
    registered = ':' not in name and timm.is_model(name.split('.')[0])
    model = create_ddnn(name) if registered else load_model(name)
    trained = not registered or 'file' in model.pretrained_cfg
    if registered and trained:  # other weights would be downloaded, and costs do not depend on them
        model = load_model(name)
    own_size = resolve_input_data_config(model)['input_size']
    input_size = resolve_input_data_config(model, args={'img_size': kwargs.get('img_size')})['input_size']
    if evaluation is None:
        rows = saved_results(model) if trained else []
        accuracies = {row['depth']: row['top1'] for row in rows if row.get('top1') is not None}
        if accuracies and input_size != own_size:
            _logger.warning(
                f'accuracies of {name} are left out: they are of images {list(own_size)}, not {list(input_size)}')
            accuracies = {}
    else:
        accuracies = read_accuracies(Path(evaluation), model.pretrained_cfg['architecture'], input_size, name)
        missing = [depth for depth in kwargs.get('depths') or model.depths if depth not in accuracies]
        if missing:
            raise ValueError(f'{evaluation} must have the accuracy of depths {missing}, got {[*accuracies]}')
    if output is None:
        return {'model': name, **profile_model(model, accuracies=accuracies, **kwargs)}
    with staged_folder(output) as folder:
        profile = {'model': name, **profile_model(model, accuracies=accuracies, **kwargs)}
        plot_profile(folder / 'profile.png', profile, _title(profile))
        write_json(folder / 'profile.json', profile)
    return profile


def _title(profile: Mapping[str, Any]) -> str:
    pixels = ' x '.join(map(str, profile['input_size'][1:]))
    chip = profile['hardware']['cpu'] if profile['device'] == 'cpu' else ', '.join(profile['hardware']['gpus'])
    return f'{profile["architecture"]}, {pixels} px, {chip}'
