"""Runs of the training command, and what they write."""
import functools
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from timm_ddnn_cli.main import main

from .image_files import write_parquet

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / 'train_scripts' / 'train_ekd.py'
# Blocks that begin as identities: rounding grows little in a few steps, so runs that ought to be equal stay close
MODEL = [
    '--img-size', '16', '--model-kwargs', 'channels=8,16,32', 'layers=2,2,2', 'zero_init_last=True',
    '--subnets', '1,1,1',
]
FAST = [*MODEL, '-b', '32', '--opt', 'adamw', '--lr', '0.02', '--weight-decay', '0', '--warmup-epochs', '0', '-j', '0']


@functools.cache
def few_digits():
    """Options for a data set of 352 and 40 digits: 44 batches of 8, 11 of 32."""
    folder = tempfile.TemporaryDirectory(prefix='digits-')
    few_digits.folder = folder  # removed when the program ends
    write_parquet(Path(folder.name) / 'train.parquet', range(352))
    write_parquet(Path(folder.name) / 'validation.parquet', range(400, 440))
    return ['--dataset', folder.name]


def run(*args, on_gpu=False):
    """Run the command in this process: importing torch again takes longer than most of these runs.

    It is on the CPU unless a test is of GPUs, since on the CPU alone two runs are equal bit by bit.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with mock.patch.dict(os.environ, {} if on_gpu else {'ACCELERATE_USE_CPU': '1'}):
        main(['train', *map(str, args)])


def fork(*args, processes=1, before=None, log='log', program=run):
    """Start the command in forks of this process, which are ready at once; wait by `join`.

    Args:
        *args: Options of the command.
        processes: How many train together.
        before: Called in each of them at first, to patch what it runs.
        log: File that they write stdout and stderr to.
        program: Called with the options.
    """
    if not hasattr(os, 'fork'):
        pytest.skip('this system has no forks')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]

    def work(rank):
        os.setpgid(0, 0)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, 'w', buffering=1) for number in (1, 2))
        if processes > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
        PartialState._reset_state()
        torch.set_num_threads(1)
        if before:
            before()
        program(*args)

    forks = [multiprocessing.get_context('fork').Process(target=work, args=(rank,)) for rank in range(processes)]
    for process in forks:
        process.start()
    return forks


def join(forks, log='log', timeout=120):
    """Wait for forks; return their exit statuses, negative ones for signals, and what they wrote."""
    for process in forks:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in forks], Path(log).read_text(errors='replace')


def read(folder, file='summary.json'):
    return json.loads((Path(folder) / file).read_text())


def history(folder):
    return [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def top1(summary):
    return {row['depth']: row['top1'] for row in summary['depths']}


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob('checkpoints/*') if path.name != '.lock')


def assert_same_run(folder, expected):
    """Weights of the last and the best epoch are equal bit by bit, and so are the metrics of every epoch."""
    for place in ('.', 'best'):
        mine, other = (load_file(Path(f) / place / 'model.safetensors') for f in (folder, expected))
        assert mine.keys() == other.keys()
        assert not [name for name in mine if not torch.equal(mine[name], other[name])]
        assert read(Path(folder) / place, 'config.json') == read(Path(expected) / place, 'config.json')
    mine, other = ([{k: v for k, v in r.items() if 'second' not in k} for r in history(f)] for f in (folder, expected))
    assert mine == other


def error_lines(capfd, without=()):
    """Lines on stderr, without those that begin with something."""
    return [line for line in capfd.readouterr().err.splitlines() if not line.startswith(tuple(without))]
