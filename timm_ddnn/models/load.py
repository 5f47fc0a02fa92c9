"""Models from a name that a user typed: of timm's registry, a folder or the Hub.

Whatever is wrong with a name, its configuration, its weights or the arguments is an `InputError` here.
"""
import difflib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
from timm.models import is_model, is_model_pretrained, list_pretrained, parse_model_name
from torch import nn

from ..utils.costs import count_costs
from ..utils.errors import InputError
from ..weights.build import judge_arguments
from ..weights.download import ARCHITECTURES, read_config
from ..weights.timm_runs import read_timm_run
from ..weights.weight_checks import check_tensors, read_checkpoint

__all__ = [
    'class_names', 'create_ddnn', 'list_models', 'load_model', 'load_teacher', 'resolve_name', 'saved_results',
    'warn_of_untrained',
]


_logger = logging.getLogger(__name__)


def resolve_name(name: str) -> str:
    """Make the name that timm takes of a model's folder; any other name stays as it is.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a model. A folder with a
            config.json goes before a model of the same name.
    """
    registered = is_model(name.split('.')[0])
    if os.path.isfile(os.path.join(name, 'config.json')):
        if registered:
            _logger.warning(f'{name!r} names a folder and a registered model: the folder is loaded')
        return f'local-dir:{name}'
    return f'local-dir:{name}' if os.path.isdir(name) and not registered else name


@contextmanager
def _naming(name: str, checkpoint_path: str = '') -> Iterator[None]:
    """Name the model in errors of the user's input."""
    try:
        yield
    except (InputError, OSError) as e:
        weights = f' with the weights in {checkpoint_path!r}' if checkpoint_path else ''
        raise InputError(f'model {name!r} cannot be created{weights}: {e}') from e


def _find(name: str, pretrained: bool, cache_dir: str | None) -> tuple[str, dict[str, Any]]:
    """Find the architecture of a name, with its tag if it has one, and the arguments that were saved with it."""
    try:
        source, place = parse_model_name(name)
    except ValueError as e:
        raise InputError(str(e)) from None
    if source == 'local-dir' and not os.path.isfile(os.path.join(place, 'config.json')):
        run = read_timm_run(place)
        if run:
            return run
    if source:
        config = read_config(name, cache_dir)
        args = config.model_args
        name, saved = config.architecture, {**args, 'pretrained_model_args': dict(args), 'pretrained_cfg': config}
    else:
        saved = {}
    architecture, _, tag = name.partition('.')
    if not is_model(architecture):
        raise InputError(f'Unknown model ({name})')
    tags = [known.partition('.')[2] for known in list_pretrained(f'{architecture}.*')]
    if tag and tag not in tags:
        raise InputError(f'tag of {architecture} must be one of {tags}, got {tag!r}')
    if pretrained and not saved and not is_model_pretrained(architecture):
        raise InputError(f'No pretrained weights exist for {architecture}')
    return name, saved


def _create(name: str, saved: dict[str, Any], **kwargs: Any) -> nn.Module:
    kwargs = {**saved, **kwargs}
    if 'pretrained_cfg' not in saved and kwargs.keys() - {'pretrained', 'cache_dir'}:
        trial = {**kwargs, 'pretrained': False, 'device': 'meta'}
        judge_arguments(partial(timm.create_model, name), name.split('.')[0], **trial)
    return timm.create_model(name, **kwargs)


def create_ddnn(name: str, checkpoint_path: str = '', **kwargs: Any) -> nn.Module:
    """Create a dynamic-depth model by `timm.create_model`.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run, timm's too. A
            plain net of timm is made dynamic, see `make_dynamic`.
        checkpoint_path: File with weights, safetensors or a checkpoint of timm.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        InputError: If there is no such model, it has not several depths, it does not take the arguments, or its weights
            are missing, damaged or of another model.
    """
    name = resolve_name(name)
    known = [*timm.list_models('ddnn_*'), 'dynamic_timm']
    similar = difflib.get_close_matches(name, known, n=3) or known
    wrong = InputError(f'model must be a dynamic-depth model such as {", ".join(similar)}, got {name!r}')
    if ':' not in name and not is_model(name.split('.')[0]):
        if '/' in name:
            raise InputError(f"model must be a folder of a model, 'hf-hub:OWNER/NAME' or a name, got {name!r}")
        raise wrong
    with _naming(name, checkpoint_path):
        needed = kwargs.get('pretrained', False) and 'pretrained_cfg_overlay' not in kwargs
        found, saved = _find(name, needed, kwargs.get('cache_dir'))
        if found == name and name.split('.')[0] not in known:  # a model of timm
            found, saved = 'dynamic_timm', {'base': name}
    if found.split('.')[0] not in known:
        raise wrong
    with _naming(name, checkpoint_path):
        if 'device' in kwargs:
            raise InputError('device is not an argument of a model here: it is made on the CPU, and then moved')
        model = _create(found, saved, **kwargs)
        if checkpoint_path:
            tensors = read_checkpoint(checkpoint_path)
            check_tensors(tensors, model, checkpoint_path)
            model.load_state_dict(tensors)
    return model


def load_model(name: str) -> nn.Module:
    """Load a model with its weights, in eval mode.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run, timm's too.

    Raises:
        InputError: If there is no such model, or its weights are missing, damaged or of another model.
    """
    return create_ddnn(name, pretrained=True).eval()


def load_teacher(name: str) -> nn.Module:
    """Load any trained net of timm, dynamic-depth models among them, as a teacher.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run, timm's too.

    Raises:
        InputError: If there is no such net, or its weights are missing, damaged or of another net.
    """
    name = resolve_name(name)
    with _naming(name):
        found, saved = _find(name, True, None)
        if found.startswith(ARCHITECTURES):
            return _create(found, saved, pretrained=True)
        try:
            net = _create(found, saved, pretrained=True)
        except Exception as e:  # by which timm judges files of its own architectures
            raise InputError(str(e) or type(e).__name__) from e
        check_tensors(dict(net.named_parameters()), net, name, whole=False)
    return net


def class_names(model: nn.Module) -> list[str] | None:
    """Names of the classes of a model that were saved with its weights, None if none were.

    Args:
        model: timm model.
    """
    names = model.pretrained_cfg.get('label_names')
    return list(names) if names and len(names) == model.num_classes else None


def saved_results(model: nn.Module) -> list[dict[str, Any]]:
    """Find the results per depth that were saved with the weights of a model, none if none were.

    Args:
        model: What `load_model` returned.

    Returns:
        Rows with depth, blocks, parameters, macs and accuracies, for depths of the model.
    """
    return [dict(row) for row in getattr(model, 'saved_results', []) if row['depth'] in model.depths]


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
