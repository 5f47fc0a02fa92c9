"""Peak memory of the plain net of one depth, or of an ONNX file, in a process that does nothing else.

A profile runs this module once for a net and a runtime: what a process has ever held says nothing of the nets that come
second. The memory of a GPU is counted by PyTorch's allocator, and needs no process of its own.
"""
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from ..utils.errors import InputError

__all__ = ['is_out_of_memory', 'measure_memory', 'measure_memory_cuda', 'measure_memory_file', 'onnx_function']


_CALLS = 3  # the caches of the allocators are full after two
_EXIT_NO_MEMORY = 12  # ENOMEM


def measure_memory(
        net: nn.Module,
        *,
        runtime: str,
        input_size: Sequence[int],
        batch_sizes: Sequence[int],
        threads: int,
        onnx_files: Mapping[int, Path] | None = None,
) -> dict[int, int]:
    """Measure the peak resident memory that a net takes on the CPU, in a process of its own.

    It is the growth of the peak from after the imports to after some batches: weights (held once, as a random
    initialization leaves them), feature maps, what the runtime allocates, and for 'compiled' also the compilation.
    Libraries are left out.

    Args:
        net: Plain net, from a model's `extract`, which timm can create anew by its name and arguments.
        runtime: 'eager', 'compiled' or 'onnxruntime'.
        input_size: Size of an image, (C, H, W).
        batch_sizes: Batch sizes, run from the smallest on in one process.
        threads: Threads.
        onnx_files: For 'onnxruntime' the net by batch size.

    Returns:
        Bytes by batch size.

    Raises:
        InputError: If memory is too small, or the net was built with an argument that JSON cannot hold.
        RuntimeError: If the process ends with another error.
    """
    task = {
        'runtime': runtime,
        'threads': threads,
        'inputs': [[batch_size, *input_size] for batch_size in sorted(batch_sizes)],
        'files': [str(onnx_files[batch_size]) for batch_size in sorted(batch_sizes)] if onnx_files else None,
        'architecture': net.pretrained_cfg['architecture'],
        'model_args': {**net._model_args, 'num_classes': net.num_classes},
    }
    try:
        task_text = json.dumps(task)
    except TypeError as e:
        raise InputError(
            f'memory is measured of models built with numbers, strings and lists of them, got {net._model_args}'
        ) from e
    return _run_process(task_text, task['architecture'], input_size, batch_sizes, threads)


def measure_memory_file(
        path: Path,
        depths: Sequence[int],
        *,
        input_size: Sequence[int],
        batch_sizes: Sequence[int],
        threads: int,
) -> dict[int, int]:
    """Measure the peak resident memory of an ONNX file as `measure_memory` does; -> bytes by batch size.

    Args:
        path: The file.
        depths: Depths to run one after another; none if the file has no input `depth`.
        input_size: Size of an image, (C, H, W).
        batch_sizes: Batch sizes, each in a session of its own.
        threads: Threads.

    Raises:
        InputError: If memory is too small.
        RuntimeError: If the process ends with another error.
    """
    task = {
        'runtime': 'onnxruntime',
        'threads': threads,
        'inputs': [[batch_size, *input_size] for batch_size in sorted(batch_sizes)],
        'files': [str(path)] * len(batch_sizes),
        'depths': list(depths),
    }
    return _run_process(json.dumps(task), str(path), input_size, batch_sizes, threads)


def _run_process(
        task_text: str,
        name: str,
        input_size: Sequence[int],
        batch_sizes: Sequence[int],
        threads: int,
) -> dict[int, int]:
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get('PYTHONPATH')]
    with tempfile.TemporaryDirectory() as cache:  # else memory would depend on whether it was compiled before
        run = subprocess.run(
            [sys.executable, '-P', '-m', 'timm_ddnn.deploy.peak_memory', task_text],
            capture_output=True,
            encoding='utf-8',
            errors='replace',
            env={
                **os.environ,
                'PYTHONPATH': os.pathsep.join(filter(None, paths)),
                'OMP_NUM_THREADS': str(threads),
                'TORCHINDUCTOR_CACHE_DIR': cache,
            },
        )
    if run.returncode in (_EXIT_NO_MEMORY, -signal.SIGKILL):  # the kernel kills where memory runs out
        raise InputError(
            f'memory must be larger for {name} with batches of {max(batch_sizes)} images {list(input_size)}')
    if run.returncode:
        raise RuntimeError(f'the process that measures memory ended with status {run.returncode}:\n{run.stderr}')
    return dict(zip(sorted(batch_sizes), json.loads(run.stdout.splitlines()[-1]), strict=True))


def measure_memory_cuda(
        net: nn.Module,
        *,
        runtime: str,
        input_size: Sequence[int],
        batch_sizes: Sequence[int],
        device: torch.device,
) -> dict[int, int]:
    """Measure the peak memory that tensors of a net take on a GPU: weights, feature maps and workspaces.

    It is the growth of `torch.cuda.max_memory_allocated`; the CUDA context and the compilation are left out.

    Args:
        net: Plain net on the CPU.
        runtime: 'eager' or 'compiled'.
        input_size: Size of an image, (C, H, W).
        batch_sizes: Batch sizes.
        device: The GPU.

    Returns:
        Bytes by batch size.
    """
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    net = net.to(device).eval()
    function = _prepare(net, runtime)
    peaks = {}
    for batch_size in sorted(batch_sizes):
        torch.cuda.reset_peak_memory_stats(device)
        _run(function, torch.randn(batch_size, *input_size, device=device))
        peaks[batch_size] = torch.cuda.max_memory_allocated(device) - before
    return peaks


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an error of too little memory, for which PyTorch's allocator of the CPU has no type, from others."""
    # PyTorch's, its on Windows, ONNX Runtime's
    texts = "can't allocate memory", 'not enough memory', 'Failed to allocate memory'
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def _prepare(net: nn.Module, runtime: str) -> Callable[[Any], Any]:
    return torch.compile(net, fullgraph=True, dynamic=False) if runtime == 'compiled' else net


def onnx_function(path: str | Path, threads: int) -> Callable[..., list[np.ndarray]]:
    """Open an ONNX file as a function of images, [B, C, H, W] in float32, and a depth if it has several, on the CPU.

    Args:
        path: The file.
        threads: Threads that it runs on.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    names = [value.name for value in session.get_inputs()]
    return lambda *values: session.run(None, dict(zip(names, map(np.asarray, values), strict=True)))


@torch.inference_mode()
def _run(function: Callable[..., Any], images: Any, depths: Sequence[int] = ()) -> None:
    for arguments in [(depth,) for depth in depths] or [()]:
        for _ in range(_CALLS):
            function(images, *arguments)


def _peak_memory(reset: bool = False) -> int:
    """Bytes of the most memory that this process has had resident, since the reset if the system can do that."""
    status = Path('/proc/self/status')
    if not status.exists():
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == 'darwin' else peak * 1024
    if reset:
        Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')
    line = next(line for line in status.read_text(encoding='utf-8').splitlines() if line.startswith('VmHWM:'))
    return int(line.split()[1]) * 1024


def _main(task: Mapping[str, Any]) -> list[int]:
    torch.set_num_threads(task['threads'])
    if task['runtime'] == 'onnxruntime':
        importlib.import_module('onnxruntime')  # a library, which does not count
    elif task['runtime'] == 'compiled':
        importlib.import_module('torch._inductor.compile_fx')  # else the first call would
    gc.collect()
    before = _peak_memory(reset=True)
    if task['runtime'] != 'onnxruntime':
        function = _prepare(timm.create_model(task['architecture'], **task['model_args']).eval(), task['runtime'])
    peaks = []
    for i, size in enumerate(task['inputs']):
        images = torch.randn(size)
        if task['runtime'] == 'onnxruntime':
            function = None  # the session before, whose weights would count as well
            gc.collect()
            function, images = onnx_function(task['files'][i], task['threads']), images.numpy()
        _run(function, images, task.get('depths', ()))
        peaks.append(_peak_memory() - before)
    return peaks


if __name__ == '__main__':
    try:
        print(json.dumps(_main(json.loads(sys.argv[1]))))
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        sys.exit(_EXIT_NO_MEMORY)
