"""What several test files share: models whose depths really differ, images for them, and the modules of benchmarks."""
import importlib
from types import SimpleNamespace

import datasets
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.training import ROOT

import timm_ddnn  # noqa: F401  the import registers the models
from timm_ddnn.utils.modules import find_norms

EXPECTED_DEPTHS = {
    'ddnn_resnet18': (18, 10),
    'ddnn_resnet34': (34, 18, 10),
    'ddnn_resnet50': (50, 26, 14),
    'ddnn_resnet50d': (50, 26, 14),
    'ddnn_seresnet50': (50, 26, 14),
    'ddnn_resnext50_32x4d': (50, 26, 14),
    'ddnn_resnet101': (101, 50, 26),
    'ddnn_resnet152': (152, 101, 50),
    'ddnn_resnet20': (20, 14, 8),
    'ddnn_resnet32': (32, 20, 8),
    'ddnn_resnet44': (44, 32, 20),
    'ddnn_resnet56': (56, 32, 20),
    'ddnn_resnet110': (110, 56, 20),
    'ddnn_cifar_resnet18': (18, 10),
    'ddnn_cifar_resnet34': (34, 18, 10),
    'ddnn_cifar_resnet50': (50, 26, 14),
}


def randomize_norms(model, seed=0):
    """Give every norm its own weights and statistics: timm's initial ones make all depths compute the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in find_norms(model):
            norm.weight.uniform_(0.3, 0.7, generator=generator)
            norm.bias.uniform_(-0.2, 0.2, generator=generator)
            norm.running_mean.uniform_(-0.2, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return randomize_norms(timm.create_model(name, **kwargs), seed).eval()


def images(model, batch=2, size=64):
    size = min(size, model.pretrained_cfg['input_size'][-1])
    return torch.randn(batch, model.in_chans, size, size, generator=torch.Generator().manual_seed(1))


def logits_by_depth(model, x):
    with torch.no_grad():
        return {depth: model(x, depth=depth) for depth in model.depths}


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
    names = 'card', 'comparison', 'experiments', 'make_tag', 'matrix', 'results', 'train_method'
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for module in vars(modules).values():
        for place in {'RESULTS', 'WORK', 'WEIGHTS'} & vars(module).keys():
            monkeypatch.setattr(module, place, tmp_path / place.lower())
    AcceleratorState._reset_state(reset_partial_state=True)  # precision is set once per process
    yield modules
    AcceleratorState._reset_state(reset_partial_state=True)
