"""What an exported ONNX file costs on this machine: a profile as in `profile.py`, with rows of the file's depths.

A measurement has besides:

    switch_ms      median latency of a first call at the depth, after one at another depth; null of a file of one depth
    memory_all_mb  peak memory after calls at all depths

and the profile has file, bytes (of the file) and load_s (seconds to open it). Latencies are of calls in turn: a round
visits the depths one after another, so that the first call of each follows one at another depth, and times a second.
"""
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.environment import describe_machine
from ..utils.errors import InputError
from ..utils.files import staged_folder, write_json
from ..utils.schema import brief, flag, integer, items, judge, number, optional, parse_json, record, text
from .choose import percentile_90
from .formats import ONNX_PACKAGES, require_packages
from .peak_memory import measure_memory_file, onnx_function
from .profile import check_settings

__all__ = ['profile_file', 'read_metadata']


_COUNT = integer(1, 10 ** 6)
_ROW = record(
    {'depth': _COUNT, 'blocks': items(_COUNT, least=1), 'macs': number(1, 1e18)}, {'top1': optional(number(0, 100))})
_METADATA = record(
    {
        'model': text(), 'input_size': items(_COUNT, least=3, most=3), 'depths': items(_ROW, least=1, key='depth'),
        'num_classes': _COUNT, 'mean': items(number(), least=1), 'std': items(number(above=0), least=1),
    },
    {'label_names': items(text(), most=10 ** 6), 'dynamic_batch': flag},
)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what `timm-ddnn export` wrote into an ONNX file, see `describe_net`.

    Args:
        path: The file.

    Returns:
        The description; `depths` are rows also of a file of one depth.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If onnxruntime cannot read it, or it is of another producer or not what it says of itself.
    """
    import onnxruntime

    if not Path(path).is_file():
        raise FileNotFoundError(f'there must be an ONNX file, got {str(path)!r}')
    try:
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    except Exception as e:  # its errors have no class in common
        raise InputError(f'{str(path)!r} must be an ONNX file: {e}') from e
    metadata = {}
    for key, value in session.get_modelmeta().custom_metadata_map.items():
        try:
            metadata[key] = parse_json(value, key)
        except InputError:
            metadata[key] = value
    if 'depth' in metadata:
        metadata['depths'] = [{key: metadata[key] for key in ('depth', 'blocks', 'macs', 'top1') if key in metadata}]
    judge(metadata, _METADATA, f'metadata of {str(path)!r}, as `timm-ddnn export --format onnx` writes them')
    inputs = {put.name: [size for size in put.shape if isinstance(size, int)] for put in session.get_inputs()}
    batch = [] if metadata.get('dynamic_batch') else [1]
    described = {'images': batch + metadata['input_size'], **({} if 'depth' in metadata else {'depth': []})}
    if inputs != described:
        raise InputError(f'inputs of {str(path)!r} must be {described} as its metadata say, got {brief(inputs)}')
    return metadata


def profile_file(
        path: str | Path,
        output: str | Path | None = None,
        *,
        depths: Sequence[int] | None = None,
        batch_sizes: Sequence[int] = (1,),
        threads: Sequence[int] = (1,),
        rounds: int = 20,
        on_step: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure what every depth of an exported ONNX file costs on this machine, and write profile.json and profile.png.

    Args:
        path: The file.
        output: Folder to write to, none if None.
        depths: Some of its depths, all if None.
        batch_sizes: Images per batch, 1 alone if the file takes no more.
        threads: Numbers of threads.
        rounds: Rounds, each of which gives a latency of every depth.
        on_step: Called with a line of text before each step, for a display of progress.

    Returns:
        The profile, see the head of this module.

    Raises:
        InputError: If an argument is out of its range, or that is no such file.
        OSError: If a file cannot be read or written.
    """
    require_packages('a profile of a file', ONNX_PACKAGES)
    check_settings(batch_sizes, threads, rounds)
    metadata = read_metadata(path)
    known = [row['depth'] for row in metadata['depths']]
    chosen = known if depths is None else [depth for depth in known if depth in depths]
    if depths is not None and len(chosen) < len(set(depths)):
        raise InputError(f'depths must be of {known}, got {list(depths)}')
    if not metadata.get('dynamic_batch') and set(batch_sizes) != {1}:
        raise InputError(f'batch_sizes must be 1 for {str(path)!r}, of one image, got {list(batch_sizes)}')
    with staged_folder(output) if output else nullcontext() as folder:  # before minutes are spent
        measurements, load_s = _measure(path, metadata, chosen, batch_sizes, threads, rounds, on_step)
        profile = {
            'model': str(path),
            'file': str(path),
            'bytes': Path(path).stat().st_size,
            'load_s': load_s,
            'architecture': metadata['model'],
            'trained_depths': chosen,
            'input_size': metadata['input_size'],
            'device': 'cpu',
            'depths': [row for row in metadata['depths'] if row['depth'] in chosen],
            'measurements': measurements,
            **describe_machine(),
        }
        if folder:
            from .plots import plot_profile  # matplotlib is needed here alone

            write_json(folder / 'profile.json', profile)
            plot_profile(folder / 'profile.png', profile)
    return profile


def _measure(
        path: str | Path,
        metadata: Mapping[str, Any],
        depths: Sequence[int],
        batch_sizes: Sequence[int],
        threads: Sequence[int],
        rounds: int,
        on_step: Callable[[str], None],
) -> tuple[list[dict[str, Any]], float]:
    """Measure memory and latency of some depths of a file; -> rows of measurements, seconds to open the file."""
    has_switch, input_size = 'depth' not in metadata, metadata['input_size']

    def measure_memory(*values: int) -> dict[int, int]:
        on_step(f'memory at depth {", ".join(map(str, values))}')
        return measure_memory_file(
            Path(path), values if has_switch else (), input_size=input_size, batch_sizes=batch_sizes,
            threads=max(threads))

    memory = {depth: measure_memory(depth) for depth in depths}
    memory_all = measure_memory(*depths) if len(depths) > 1 else memory[depths[0]]
    measurements, load_s = [], []
    for count in dict.fromkeys(threads):
        start = time.perf_counter()
        run = onnx_function(path, count)
        load_s.append(time.perf_counter() - start)
        for batch_size in dict.fromkeys(batch_sizes):
            on_step(f'latency, batch of {batch_size}, threads: {count}')
            images = np.random.default_rng(0).standard_normal((batch_size, *input_size), np.float32)
            latencies = _measure_latency(run, images, depths, has_switch, rounds)
            measurements += [
                {
                    'depth': depth, 'runtime': 'onnxruntime', 'batch_size': batch_size, 'threads': count,
                    **latencies[depth], 'compile_s': None, 'memory_mb': memory[depth][batch_size] / 1e6,
                    'memory_all_mb': memory_all[batch_size] / 1e6,
                }
                for depth in depths
            ]
    return measurements, min(load_s)


def _measure_latency(
        run: Callable[..., Any],
        images: np.ndarray,
        depths: Sequence[int],
        has_switch: bool,
        rounds: int,
) -> dict[int, Mapping[str, Any]]:
    first: dict[int, list[float]] = {depth: [] for depth in depths}
    second: dict[int, list[float]] = {depth: [] for depth in depths}
    for i in range(rounds + 2):  # two do not count
        for depth in depths:
            arguments = (images, depth) if has_switch else (images,)
            for times in (first[depth], second[depth]):
                start = time.perf_counter()
                run(*arguments)
                if i > 1:
                    times.append(1000 * (time.perf_counter() - start))
    return {
        depth: {
            'median_ms': statistics.median(second[depth]),
            'p90_ms': percentile_90(second[depth]),
            'runs': rounds,
            'switch_ms': statistics.median(first[depth]) if len(depths) > 1 else None,
        }
        for depth in depths
    }
