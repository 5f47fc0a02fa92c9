"""Models from a name that a user typed: of timm's registry, a folder or the Hub."""
import difflib
import json
import logging
import os
import pickle
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..utils.costs import count_costs
from ..weights.download import fetch, read_config
from .dynamic_depth import DynamicDepthMixin

__all__ = [
    'create_ddnn', 'list_models', 'load_model', 'load_teacher', 'resolve_name', 'saved_results', 'warn_of_untrained',
]


_logger = logging.getLogger(__name__)


def resolve_name(name: str) -> str:
    """Make the name that timm takes of a model's folder; any other name, and one in timm's registry, stays as it is.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.
    """
    return f'local-dir:{name}' if os.path.isdir(name) and not timm.is_model(name.split('.')[0]) else name


@contextmanager
def _creation_errors(name: str, checkpoint_path: str = '') -> Iterator[None]:
    try:
        yield
    except Exception as e:  # timm and its loaders raise many types, and none that they share
        weights = f' with the weights in {checkpoint_path!r}' if checkpoint_path else ''
        pickled = isinstance(e.__cause__, pickle.UnpicklingError)  # timm's advice is to execute what stands there
        reason = 'it is no file of weights alone' if pickled else e
        raise ValueError(f'model {name!r} cannot be created{weights}: {textwrap.shorten(str(reason), 600)}') from e


def create_ddnn(name: str, checkpoint_path: str = '', **kwargs: Any) -> nn.Module:
    """Create a dynamic-depth model by `timm.create_model`, every failure being an error of the user's input.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.
        checkpoint_path: File with weights.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        ValueError: If there is no such model, it has not several depths, or timm cannot make it from the arguments.
    """
    name = resolve_name(name)
    known = timm.list_models('ddnn_*')
    similar = difflib.get_close_matches(name, known, n=3) or known
    wrong = ValueError(f'model must be a dynamic-depth model such as {", ".join(similar)}, got {name!r}')
    if ':' not in name and name.split('.')[0] not in known:
        if '/' in name:
            raise ValueError(f"model must be a folder of a model, 'hf-hub:OWNER/NAME' or a name, got {name!r}")
        raise wrong
    with _creation_errors(name, checkpoint_path):
        if name.startswith(('local-dir:', 'hf-hub:')):
            read_config(name, kwargs.get('cache_dir'))
        model = timm.create_model(name, checkpoint_path=checkpoint_path, **kwargs)
    if not isinstance(model, DynamicDepthMixin):  # classes of timm have an attribute `depths`, too
        raise wrong
    return model


def load_model(name: str) -> nn.Module:
    """Load a model with its weights, in eval mode.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.

    Raises:
        ValueError: If there is no such model or it has no weights.
    """
    return create_ddnn(name, pretrained=True).eval()


def load_teacher(name: str) -> nn.Module:
    """Load any trained net of timm, dynamic-depth models among them, for `EKDTask.set_teacher`.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.

    Raises:
        ValueError: If there is no such net or it has no weights.
    """
    name = resolve_name(name)
    with _creation_errors(name):
        return timm.create_model(name, pretrained=True)


def saved_results(model: nn.Module) -> list[dict[str, Any]]:
    """Find the results per depth that were saved with the weights of a model, none if none were.

    Args:
        model: What `load_model` returned.

    Returns:
        Rows as at the head of `report.py`.
    """
    cfg = model.pretrained_cfg
    try:
        if cfg.get('file'):
            file = Path(cfg['file'])
            config = (file if file.is_dir() else file.parent) / 'config.json'
        else:
            repo_id, _, revision = cfg['hf_hub_id'].partition('@')
            config = fetch(repo_id, 'config.json', revision=revision or None)
        rows = json.loads(config.read_text())['depths']
        return [dict(row) for row in rows if row['depth'] in model.depths]
    except (KeyError, AttributeError, TypeError, ValueError, OSError):  # not saved by this library
        return []


def warn_of_untrained(model: nn.Module, depths: Sequence[int]) -> None:
    """Log a warning if some of the depths that are to be written were not trained."""
    untrained = [depth for depth in depths if depth not in model.trained_depths]
    if untrained:
        _logger.warning(f'of depths {untrained} the weights or statistics are not trained')


def list_models(pattern: str = '*') -> list[dict[str, Any]]:
    """Describe the dynamic-depth models that timm can create.

    Args:
        pattern: Names, with wildcards.

    Returns:
        For each model its name, tags (the default one first), input_size and depths: rows with depth, blocks,
        parameters and macs (multiply-accumulates of one image), the full-net's first.
    """
    models = []
    for name in timm.list_models(pattern):
        if name.startswith('ddnn_'):
            model = timm.create_model(name, device='meta')
            input_size = model.pretrained_cfg['input_size']
            models.append({
                'model': name,
                'tags': [tag.partition('.')[2] for tag in timm.list_pretrained(f'{name}.*')],
                'input_size': list(input_size),
                'depths': count_costs(model, input_size),
            })
    return models
