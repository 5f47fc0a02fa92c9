"""Fixtures of several test files: a small model, an environment for the training script, the modules of benchmarks."""
import importlib
from types import SimpleNamespace

import datasets
import pytest
from accelerate.state import AcceleratorState
from helpers.models import create
from helpers.training import ROOT


@pytest.fixture
def small():
    """A trained-looking ddnn_resnet20: small enough for tests that run it often."""
    return create('ddnn_resnet20')


@pytest.fixture
def surroundings(monkeypatch, tmp_path):
    """A folder, a cache and an environment of its own for the training script, without a network."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(datasets.config, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """Import modules of benchmarks/ whose files go to a temporary folder."""
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    names = 'experiments', 'make_tag', 'matrix', 'model_card', 'results', 'train_method'
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for module in vars(modules).values():
        for place in {'RESULTS', 'WORK', 'WEIGHTS'} & vars(module).keys():
            monkeypatch.setattr(module, place, tmp_path / place.lower())
    AcceleratorState._reset_state(reset_partial_state=True)  # precision is set once per process
    yield modules
    AcceleratorState._reset_state(reset_partial_state=True)
