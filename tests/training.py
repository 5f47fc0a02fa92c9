"""Runs of the training script, and what they write."""
import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'train_scripts' / 'train_ekd.py'
# Blocks that begin as identities: rounding grows little in a few steps, so runs that ought to be equal stay close
MODEL = [
    '--img-size', '16', '--model-kwargs', 'channels=8,16,32', 'layers=2,2,2', 'zero_init_last=True',
    '--subnets', '1,1,1',
]
FAST = [*MODEL, '-b', '32', '--opt', 'adamw', '--lr', '0.02', '--weight-decay', '0', '--warmup-epochs', '0', '-j', '0']


def run(*args, on_gpu=False):
    """Run the script in this process: importing torch again takes longer than most of these runs.

    It is on the CPU unless a test is of GPUs, since on the CPU alone two runs are equal bit by bit.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    argv, sys.argv = sys.argv, [str(SCRIPT), *map(str, args)]
    try:
        with mock.patch.dict(os.environ, {} if on_gpu else {'ACCELERATE_USE_CPU': '1'}):
            runpy.run_path(str(SCRIPT), run_name='__main__')
    finally:
        sys.argv = argv
        for worker in multiprocessing.active_children():
            worker.terminate()  # else the garbage collector waits five seconds for each, in any later test


def read(folder, file='summary.json'):
    return json.loads((Path(folder) / file).read_text())


def history(folder):
    return [json.loads(line) for line in (Path(folder) / 'metrics.jsonl').read_text().splitlines()]


def top1(summary):
    return {row['depth']: row['top1'] for row in summary['depths']}


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob('checkpoints/*'))


def assert_same_run(folder, expected):
    """Weights of the model are equal bit by bit, and so are the metrics of every epoch."""
    mine, other = (load_file(Path(f) / 'model.safetensors') for f in (folder, expected))
    assert mine.keys() == other.keys()
    assert not [name for name in mine if not torch.equal(mine[name], other[name])]
    mine, other = ([{k: v for k, v in r.items() if 'second' not in k} for r in history(f)] for f in (folder, expected))
    assert mine == other
