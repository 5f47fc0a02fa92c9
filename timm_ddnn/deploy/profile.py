"""Latency, peak memory and multiply-accumulates of every depth on this machine; their plot is in `plots.py`.

A profile is a dict that JSON can hold:

    model              name of the model as it was given, where `profile_saved` made the profile
    architecture       timm's name of the model
    trained_depths     depths whose weights are trained; costs do not depend on it
    input_size         (C, H, W)
    device             'cpu' or, for example, 'cuda:0'
    depths             a row per depth: depth, blocks, parameters, macs (of one image), and top1 in percent if known
    measurements       a row per depth, runtime, batch size and number of threads:
        depth, runtime, batch_size, threads
        median_ms      median latency of a batch, in milliseconds
        p90_ms         its 90th percentile, see `percentile_90`
        runs           number of calls that these two are taken over
        compile_s      seconds of the first call, in which 'compiled' compiles, null for other runtimes; the disk's
                       cache begins empty, but what depths have in common is compiled with the first of them
        memory_mb      peak memory of the plain net of the depth alone, with the most of all threads asked for, in
                       10^6 bytes, see `peak_memory.py`: on the CPU growth of the resident memory of a process, on a
                       GPU what tensors hold. A model that switches depths takes what its deepest does.
    versions, hardware, git    of this machine, see `describe_machine`

Latency is that of `model(x, depth=depth)`, under ONNX Runtime of the exported `model.extract(depth)`, in float32 on
images in memory. A round visits the depths one after another, so that what else the machine does meets all of them,
and times one call of each after two that are not counted.
"""
import copy
import functools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from torch import nn

from ..models.load import create_ddnn, load_model, resolve_name, saved_results
from ..utils.costs import count_costs
from ..utils.environment import describe_machine, find_device
from ..utils.errors import InputError
from ..utils.files import staged_folder, write_json
from ..utils.schema import integer, items, judge
from .choose import percentile_90, read_accuracies
from .formats import ONNX_PACKAGES, require_packages
from .peak_memory import is_out_of_memory, measure_memory, measure_memory_cuda, onnx_function

__all__ = ['RUNTIMES', 'check_settings', 'compare_machines', 'profile_model', 'profile_saved']


RUNTIMES = ('eager', 'compiled', 'onnxruntime')
_VERSIONS = ('timm_ddnn', 'torch', 'timm')  # that latency depends on
_COUNT = integer(1, 100_000)
_logger = logging.getLogger(__name__)


def profile_model(
        model: nn.Module,
        *,
        depths: Sequence[int] | None = None,
        batch_sizes: Sequence[int] = (1,),
        threads: Sequence[int] | None = None,
        runtimes: Sequence[str] = ('eager',),
        rounds: int = 20,
        img_size: int | None = None,
        device: str | None = None,
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
        InputError: If an argument is out of its range, a runtime is not installed, or memory is too small for a depth.
    """
    threads = (torch.get_num_threads(),) if threads is None else threads
    device = _check_arguments(batch_sizes, threads, runtimes, rounds, img_size, device)
    depths = model.resolve_depths('all' if depths is None else tuple(depths))[0]
    input_size = resolve_input_data_config(model, args={'img_size': img_size})['input_size']
    batch_sizes, threads, runtimes = (tuple(dict.fromkeys(values)) for values in (batch_sizes, threads, runtimes))

    on_step('counting')
    trained = [depth for depth in model.trained_depths if depth in depths]
    model = copy.deepcopy(model).to(device).eval()
    rows = [row for row in count_costs(model, input_size) if row['depth'] in depths]
    for row in rows:
        if accuracies and row['depth'] in accuracies:
            row['top1'] = accuracies[row['depth']]
    measurements = []
    for runtime in runtimes:
        measurements += _measure(model, depths, runtime, input_size, batch_sizes, threads, rounds, on_step)
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'trained_depths': trained,
        'input_size': list(input_size),
        'device': str(device),
        'depths': rows,
        'measurements': measurements,
        **describe_machine(),
    }


def check_settings(batch_sizes: Sequence[int], threads: Sequence[int], rounds: int) -> None:
    """Check how often and in what ways something is to be measured, see `profile_model`.

    Raises:
        InputError: If a number is out of its range, or there is none.
    """
    judge(batch_sizes, items(_COUNT, least=1), 'batch_sizes')
    judge(threads, items(integer(1, os.cpu_count()), least=1), 'threads')
    judge(rounds, _COUNT, 'rounds')


def _check_arguments(
        batch_sizes: Sequence[int],
        threads: Sequence[int],
        runtimes: Sequence[str],
        rounds: int,
        img_size: int | None,
        device: str | None,
) -> torch.device:
    check_settings(batch_sizes, threads, rounds)
    if img_size is not None:
        judge(img_size, integer(1, 4096), 'img_size')
    unknown = [runtime for runtime in runtimes if runtime not in RUNTIMES]
    if unknown or not runtimes:
        raise InputError(f'runtimes must be some of {", ".join(RUNTIMES)}, got {", ".join(runtimes)!r}')
    device = find_device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type not in ('cpu', 'cuda'):
        raise InputError(f"device must be 'cpu' or a CUDA device, got '{device}'")
    if 'onnxruntime' in runtimes:
        if device.type != 'cpu':
            raise InputError(f"runtime onnxruntime is measured on the CPU, got device '{device}'")
        require_packages('runtime onnxruntime', ONNX_PACKAGES)
    return device


@contextmanager
def _memory_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        raise InputError(f'memory must be larger for {what}: {str(e).splitlines()[0]}') from e


def _measure(
        model: nn.Module,
        depths: Sequence[int],
        runtime: str,
        input_size: Sequence[int],
        batch_sizes: Sequence[int],
        threads: Sequence[int],
        rounds: int,
        on_step: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure memory and latency of all depths under one runtime; -> rows of measurements."""
    from torch._inductor.utils import fresh_cache  # slow to import
    from torch.utils.benchmark.utils.common import set_torch_threads

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        if runtime == 'onnxruntime':
            for depth in depths:
                on_step(f'exporting depth {depth} to ONNX')
                with _memory_errors(f'the export of depth {depth}'):
                    files[depth] = _export(model.extract(depth), Path(folder, str(depth)), input_size, batch_sizes)
        memory = {}
        for depth in depths:
            on_step(f'{runtime}, depth {depth}: memory')
            with _memory_errors(f'depth {depth}, {runtime}'):
                memory[depth] = _measure_memory(
                    model, depth, runtime, input_size, batch_sizes, max(threads), files.get(depth))
        for count in threads:
            for batch_size in batch_sizes:
                setting = {'runtime': runtime, 'batch_size': batch_size, 'threads': count}
                cache = fresh_cache(dir=folder) if runtime == 'compiled' else nullcontext()
                with set_torch_threads(count), torch.inference_mode(), cache:
                    latencies = _measure_latency(model, depths, input_size, rounds, files, on_step, **setting)
                rows += [
                    {'depth': depth, **setting, **latencies[depth], 'memory_mb': memory[depth][batch_size] / 1e6}
                    for depth in depths
                ]
    return rows


def _export(net: nn.Module, folder: Path, input_size: Sequence[int], batch_sizes: Sequence[int]) -> dict[int, Path]:
    """Write a plain net as ONNX files, one per batch size."""
    folder.mkdir()
    files = {batch_size: folder / f'{batch_size}.onnx' for batch_size in batch_sizes}
    for batch_size, path in files.items():
        images = torch.zeros(batch_size, *input_size)
        torch.onnx.export(net.eval(), (images,), path, dynamo=True, external_data=False, verbose=False)
    return files


def _measure_memory(
        model: nn.Module,
        depth: int,
        runtime: str,
        input_size: Sequence[int],
        batch_sizes: Sequence[int],
        threads: int,
        files: Mapping[int, Path] | None,
) -> dict[int, int]:
    """Measure the peak memory of a depth; -> bytes by batch size."""
    device, net = next(model.parameters()).device, model.extract(depth).cpu()
    args = dict(runtime=runtime, input_size=input_size, batch_sizes=batch_sizes)
    if device.type == 'cuda':
        return measure_memory_cuda(net, device=device, **args)
    return measure_memory(net, threads=threads, onnx_files=files, **args)


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
    from torch.utils.benchmark import Timer  # slow to import

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
            with _memory_errors(step):
                functions[depth]()
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


def compare_machines(profile: Mapping[str, Any]) -> list[str]:
    """Name what of this machine differs from that of a profile: hardware, and versions of what runs the nets.

    Args:
        profile: Profile.

    Returns:
        Texts such as "torch '2.9.1' there, '2.14.1' here", none if nothing differs.
    """
    here, differences = describe_machine(), []
    used = [runtime for runtime in ('onnxruntime',) if any(m['runtime'] == runtime for m in profile['measurements'])]
    for part, names in (('hardware', here['hardware']), ('versions', (*_VERSIONS, *used))):
        there = profile.get(part) or {}
        for name in names:
            was, value = there.get(name, 'unknown'), here[part].get(name, 'unknown')
            if was != value:
                differences.append(f'{name} {str(was)[:80]!r} there, {value!r} here')
    return differences


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
        The profile, with model (the name).

    Raises:
        InputError: If there is no such model, or an argument is out of its range.
        OSError: If a file cannot be read or written.
    """
    model, results = _load(name)
    input_size = resolve_input_data_config(model, args={'img_size': kwargs.get('img_size')})['input_size']
    if evaluation is None:
        accuracies = {row['depth']: row['top1'] for row in results if row.get('top1') is not None}
        own_size = resolve_input_data_config(model)['input_size']
        if accuracies and input_size != own_size:
            _logger.warning(
                f'accuracies of {name} are left out: they are of images {list(own_size)}, not {list(input_size)}')
            accuracies = {}
    else:
        accuracies = read_accuracies(evaluation, model.pretrained_cfg['architecture'], input_size, name)
        missing = [depth for depth in kwargs.get('depths') or model.depths if depth not in accuracies]
        if missing:
            raise InputError(f'{evaluation} must have the accuracy of depths {missing}, got {[*accuracies]}')
    with staged_folder(output) if output else nullcontext() as folder:
        profile = {'model': name, **profile_model(model, accuracies=accuracies, **kwargs)}
        if folder:
            from .plots import plot_profile  # matplotlib is needed here alone

            write_json(folder / 'profile.json', profile)
            plot_profile(folder / 'profile.png', profile)
    return profile


def _load(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Load a model with its results; a name of timm's registry without weights that would have to be downloaded."""
    if ':' not in resolve_name(name) and timm.is_model(name.split('.')[0]):
        model = create_ddnn(name)
        if 'file' not in model.pretrained_cfg:
            return model, []
    model = load_model(name)
    return model, saved_results(model)
