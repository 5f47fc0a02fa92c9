"""Models from a name that a user typed: of timm's registry, a folder or the Hub.

Whatever is wrong with a name, its configuration, its weights or the arguments is an `InputError` here.
"""
import difflib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model, is_model_pretrained, list_pretrained, parse_model_name
from torch import nn

from ..utils.costs import count_costs
from ..utils.environment import total_memory
from ..utils.errors import InputError
from ..utils.files import write_json
from ..utils.schema import judge
from ..weights.build import judge_arguments
from ..weights.config_checks import CONFIG
from ..weights.download import ARCHITECTURES, read_config
from ..weights.timm_runs import read_timm_run
from ..weights.weight_checks import check_tensors, read_checkpoint

__all__ = [
    'add_temperatures', 'class_names', 'create_ddnn', 'find_config', 'list_models', 'load_model', 'load_teacher',
    'resolve_name', 'save_temperatures', 'saved_results', 'warn_of_untrained',
]


_logger = logging.getLogger(__name__)


def resolve_name(name: str) -> str:
    """Make the name that timm takes of a model's folder; any other name stays as it is.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a model. A folder with a
            config.json goes before a model of the same name.
    """
    holds_model = any(os.path.isfile(os.path.join(name, file)) for file in ('config.json', 'args.yaml'))
    return f'local-dir:{name}' if holds_model or (os.path.isdir(name) and not _is_registered(name)) else name


def _is_registered(name: str) -> bool:
    return is_model(name.split('.')[0])


def _resolve_aloud(name: str) -> str:
    """Resolve a name, and log a warning if it is that of a folder and of a registered model."""
    resolved = resolve_name(name)
    if os.path.isdir(name) and _is_registered(name):
        loaded = 'registered model' if resolved == name else 'folder'
        _logger.warning(f'{name!r} names a folder and a registered model: the {loaded} is loaded')
    return resolved


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
        model = judge_arguments(partial(timm.create_model, name), name.split('.')[0], **trial)
        need = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 2 ** 30
        memory = total_memory()
        if memory and need > memory:
            raise InputError(f'memory must be {need:.0f} GiB or more for the model alone, got {memory} GiB')
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
    name = _resolve_aloud(name)
    known = [*timm.list_models('ddnn_*'), 'dynamic_timm']
    similar = difflib.get_close_matches(name, known, n=3) or ('ddnn_resnet50', 'ddnn_convnext_tiny')
    wrong = InputError(
        f'model must be a dynamic-depth model such as {", ".join(similar)} (`timm-ddnn list`), or a model of timm '
        f'that can be made one, got {name!r}')
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
            folder, file = os.path.split(checkpoint_path)
            model.base_models, model.saved_results = [], []
            if file == 'model.safetensors' and os.path.isfile(os.path.join(folder, 'config.json')):  # of a run
                config = read_config(f'local-dir:{folder or "."}')
                model.base_models, model.pretrained_cfg['label_names'] = config.base_models, config.get('label_names')
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

    Returns:
        The net. Its attribute `base_models` names the published weights that its own are or come from, see `Weights`.

    Raises:
        InputError: If there is no such net, or its weights are missing, damaged or of another net.
    """
    name = _resolve_aloud(name)
    with _naming(name):
        found, saved = _find(name, True, None)
        if found.startswith(ARCHITECTURES):
            return _create(found, saved, pretrained=True)
        try:
            net = _create(found, saved, pretrained=True)
        except Exception as e:  # by which timm judges files of its own architectures
            raise InputError(str(e) or type(e).__name__) from e
        check_tensors(dict(net.named_parameters()), net, name, whole=False)
    if 'pretrained_cfg' in saved:
        net.base_models = saved['pretrained_cfg'].base_models
    else:  # a tag of timm, or the folder of its training script
        net.base_models = [net.pretrained_cfg['hf_hub_id']] if not saved and net.pretrained_cfg.get('hf_hub_id') else []
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
        Rows for depths of the model: depth, and what is known of blocks, parameters, macs, accuracies and temperature.
    """
    return [dict(row) for row in getattr(model, 'saved_results', []) if row['depth'] in model.depths]


def add_temperatures(rows: Iterable[Mapping[str, Any]], temperatures: Mapping[int, float]) -> list[dict[str, Any]]:
    """Add the temperatures of depths to rows of results; a depth without a row gets one."""
    rows = {row['depth']: dict(row) for row in rows}
    for depth, temperature in temperatures.items():
        rows.setdefault(depth, {'depth': depth})['temperature'] = temperature
    return list(rows.values())


def find_config(name: str) -> Path:
    """Find the config.json of a model in a folder, where what is measured of it can be stored.

    Args:
        name: As for `load_model`.

    Raises:
        InputError: If the model is not in a folder, or in one without a config.json, as timm's training script leaves.
    """
    source, _, place = resolve_name(name).partition(':')
    path = Path(place, 'config.json')
    if source != 'local-dir' or not path.is_file():
        raise InputError(f'model must be a folder with a config.json to store temperatures in, got {name!r}')
    return path


def save_temperatures(path: Path, temperatures: Mapping[int, float], content: bytes) -> None:
    """Save temperatures in the config.json of a model, where `temperature` of the loaded model finds them.

    Args:
        path: What `find_config` gives.
        temperatures: Temperature by depth.
        content: What stood in the file before the model was loaded.

    Raises:
        InputError: If another model was saved there since.
        OSError: If the file cannot be written.
    """
    if path.read_bytes() != content:
        raise InputError(f'another model was saved in {path.parent} while this one was measured: measure it again')
    config = json.loads(content)
    config['depths'] = add_temperatures(config.get('depths', []), temperatures)
    judge(config, CONFIG, str(path))
    write_json(path, config)


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
