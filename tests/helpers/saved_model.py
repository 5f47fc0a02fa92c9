"""A model folder as a training run writes it, commands that must fail, and processes that lack packages."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from helpers.models import create
from timm_ddnn.hub.save import save_model
from timm_ddnn_cli.main import main

CONFIG = dict(
    input_size=(3, 24, 24), interpolation='bilinear', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8,
    crop_mode='center',
)
TRANSFORM = create_transform(**CONFIG)


def save(folder, name='ddnn_resnet20', **kwargs):
    """Write a model folder as a training run does; return its model."""
    model = create(name, **kwargs)
    model.mark_trained(model.depths)
    folder.mkdir(exist_ok=True, parents=True)
    rows = [{'depth': d, 'blocks': list(model.blocks(d)), 'top1': d + 0.5, 'top5': d + 1.5} for d in model.depths]
    names = [f'class {i}' for i in range(model.num_classes)]
    save_model(model, folder, data_config=CONFIG, class_names=names, rows=rows)
    return model


def photograph():
    return Image.fromarray(load_sample_image('flower.jpg'))


def child(folder, code, *forbidden):
    """Run code in a process that cannot import some packages, with the images of x.npy as `x`; it prints JSON."""
    np.save(folder / 'x.npy', torch.stack([TRANSFORM(photograph()), TRANSFORM(photograph()).flip(-1)] * 3).numpy())
    head = f'import json, sys\nimport numpy as np\nx = np.load("x.npy")\nsys.modules |= dict.fromkeys({forbidden!r})\n'
    environment = dict(os.environ, PYTHONPATH='', OMP_NUM_THREADS=str(torch.get_num_threads()))
    run = subprocess.run(
        [sys.executable, '-c', head + code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def arrays(folder, model, depth, file='y.npy'):
    """What the child process computed, and what the model computes."""
    with torch.no_grad():
        return np.load(folder / file), model(torch.from_numpy(np.load(folder / 'x.npy')), depth=depth).numpy()


def failing(capsys, *args, status=2):
    """Run a command that must end with one line; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith('error: ')]  # others may warn besides
    assert (error.value.code, captured.out, len(errors)) == (status, '', 1), captured.err
    assert 'Traceback' not in captured.err
    return errors[0]


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob('*'))}
