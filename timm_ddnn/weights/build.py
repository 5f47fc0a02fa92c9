"""Models built as timm builds them, from verified weights and checked configurations only.

To import this module is to call `verify_configs`: `timm.create_model` then verifies what it reads.
"""
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, _factory, build_model_with_cfg, create_model, resolve_pretrained_cfg
from torch import nn

from ..utils.errors import InputError
from ..utils.schema import brief
from .config_checks import check_arguments, check_size
from .download import SavedConfig, find_weights, read_config
from .weight_checks import check_tensors, check_weights

__all__ = ['ABOUT_WEIGHTS', 'build_model', 'judge_arguments', 'verify_configs']


# What timm's pretrained configuration says of published weights alone, and not of a model or its classes
ABOUT_WEIGHTS = 'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes'

def build_model(
        cls: type[nn.Module],
        variant: str,
        pretrained: bool,
        *,
        make: Callable[..., nn.Module] | None = None,
        construct: Callable[..., nn.Module] | None = None,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Build a model as timm's `build_model_with_cfg` does, from verified weights only.

    Args:
        cls: Class of the model, which says what arguments there are.
        variant: Name of its entrypoint.
        pretrained: Whether to load weights.
        make: Makes the model, the class itself if None.
        construct: Makes the net that is returned, if it is not the model itself.
        pretrained_cfg: As for `build_model_with_cfg`; of a folder or a repository, the content of its config.json.
        pretrained_cfg_overlay: As for `build_model_with_cfg`.
        cache_dir: As for `build_model_with_cfg`.
        **kwargs: Further arguments of `build_model_with_cfg`.

    Returns:
        The model. Its attribute `saved_results` holds the rows of results, one per depth, that were saved with the
        weights; it is empty for other weights, and for another number of classes. Its attribute `base_models` names
        the published weights that its own are or come from, see `Weights`.

    Raises:
        InputError: If the class does not take the arguments, or the weights cannot be right.
        OSError: If there are no weights, they cannot be reached, or they are damaged.
    """
    saved = pretrained_cfg if isinstance(pretrained_cfg, SavedConfig) else None
    given = pretrained_cfg if isinstance(pretrained_cfg, dict) else {}
    from_config = given.get('source') in ('local-dir', 'hf-hub')  # its arguments are those of a config.json
    if from_config:
        check_arguments(cls, kwargs.get('pretrained_model_args') or {}, saved=True)
    overlay, weights = dict(pretrained_cfg_overlay or {}), None
    for tensors in (given.get('state_dict'), overlay.get('state_dict')):
        if tensors is not None and not (isinstance(tensors, Mapping) and tensors and all(
                isinstance(tensor, torch.Tensor) for tensor in tensors.values())):
            raise InputError(f'state_dict must be tensors by their names, got {brief(tensors)}')
    # weights that the caller names go before those that come with this library or lie beside a config.json
    if any(overlay.get(key) for key in ('file', 'url', 'state_dict', 'hf_hub_id')):
        overlay, saved = {**dict.fromkeys(('source', 'file', 'tag', 'label_names')), **overlay}, None
    elif given.get('state_dict'):
        overlay, saved = {'source': None, 'file': None, **overlay}, None
    if pretrained:
        cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay).to_dict()
        weights = find_weights(cfg, saved, cache_dir)
    make, filter_fn, tensors = make or cls, kwargs.pop('pretrained_filter_fn', None), {}
    if weights:
        # what is loaded is what was verified; as `state_dict` timm would copy it
        overlay |= {'source': None, 'file': None, 'state_dict': {'verified': weights.source}}

    def build(**model_args: Any) -> nn.Module:
        check_arguments(cls, model_args)
        if from_config:
            check_size(judge_arguments(make, variant, **{**model_args, 'device': 'meta'}), weights and weights.tensors)
        model = (construct or make)(**model_args)
        if weights:
            tensors.update(weights.tensors if filter_fn is None else filter_fn(weights.tensors, model))
            whole = kwargs.get('pretrained_strict', True) and construct is None
            check_weights(tensors, model, cfg, weights.source, whole=whole)
        return model

    model = build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=(lambda *_: tensors) if weights else filter_fn,
        cache_dir=cache_dir,
        **kwargs,
    )
    model.pretrained_cfg.pop('state_dict', None)
    model.saved_results = []
    model.base_models = list(weights.base_models) if weights else []
    if weights:
        for key in ('source', 'file'):  # the model says where its weights come from, not where they lie
            model.pretrained_cfg.pop(key, None)
            if key in cfg:
                model.pretrained_cfg[key] = cfg[key]
        if weights.saved and getattr(model, 'num_classes', None) == cfg['num_classes']:
            model.saved_results = weights.saved.depths
    elif pretrained:  # from a URL
        check_tensors(model.state_dict(), model, cfg.get('url') or 'the weights', whole=False)
    if not pretrained:
        for key in ABOUT_WEIGHTS if from_config else (*ABOUT_WEIGHTS, 'label_names'):
            model.pretrained_cfg.pop(key, None)  # of the default weights, which this model has not
    return model


def judge_arguments(make: Callable[..., nn.Module], variant: str, /, **kwargs: Any) -> nn.Module:
    """Make a model with arguments that may be wrong.

    Args:
        make: Makes the model.
        variant: Name of its entrypoint.
        **kwargs: Arguments of `make`.

    Raises:
        InputError: If that fails because of the arguments; any other failure is a bug and keeps its type.
    """
    try:
        return make(**kwargs)
    except InputError:
        raise
    except Exception as e:  # timm and torch judge arguments by many types of exceptions
        create_model(variant, device='meta')  # fails as well where the arguments are not to blame
        raise InputError(f'{variant} cannot be made with the arguments given: {e or type(e).__name__}') from e


def verify_configs() -> None:
    """Let `timm.create_model` read the config.json of folders and repositories by `read_config`.

    timm parses what it finds in the cache, damaged or not, and has no hook before that. What is valid is passed on as
    timm passes it, of any architecture.
    """
    def parse(config: SavedConfig) -> tuple[dict[str, Any], str, dict[str, Any]]:
        return config, config.architecture, config.model_args

    _factory.load_model_config_from_hf = lambda model_id, cache_dir=None: parse(
        read_config(f'hf-hub:{model_id}', cache_dir))
    _factory.load_model_config_from_path = lambda model_path: parse(read_config(f'local-dir:{model_path}'))


verify_configs()
