"""Models built as timm builds them, from verified weights and checked configurations only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from .config_checks import check_config, check_names, check_size
from .download import find_weights

__all__ = ['build_model']


def build_model(
        cls: type[nn.Module],
        variant: str,
        pretrained: bool,
        *,
        construct: Callable[..., nn.Module] | None = None,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Build a model as timm's `build_model_with_cfg` does, from verified weights only.

    Args:
        cls: Class of the model.
        variant: Name of its entrypoint.
        pretrained: Whether to load weights.
        construct: Makes the net from the arguments of the class, the class itself if None.
        pretrained_cfg: As for `build_model_with_cfg`; of a folder or a repository, the content of its config.json.
        pretrained_cfg_overlay: As for `build_model_with_cfg`.
        cache_dir: As for `build_model_with_cfg`.
        **kwargs: Further arguments of `build_model_with_cfg`.

    Raises:
        ValueError: If a config.json asks for what `check_config` or `check_size` refuse.
        OSError: If there are no weights, they cannot be reached, or they are damaged.
    """
    foreign = isinstance(pretrained_cfg, dict) and pretrained_cfg.get('source') in ('local-dir', 'hf-hub')
    overlay, weights = dict(pretrained_cfg_overlay or {}), None
    if foreign:
        check_config(pretrained_cfg)
        check_names(cls, kwargs.get('pretrained_model_args') or {})
    elif any(overlay.get(key) for key in ('file', 'url', 'state_dict', 'hf_hub_id')):
        overlay = {'source': None, 'file': None, **overlay}  # weights that come with this library do not go before it
    if pretrained:
        source = resolve_pretrained_cfg(variant, pretrained_cfg, overlay).to_dict()
        weights = find_weights(source, cache_dir)
        if weights:
            overlay |= {'source': 'file', 'file': str(weights), 'state_dict': None}

    def build(**model_args: Any) -> nn.Module:
        if foreign:
            check_size(cls, model_args, weights)
        return (construct or cls)(**model_args)

    model = build_model_with_cfg(
        build,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        cache_dir=cache_dir,
        **kwargs,
    )
    if weights:  # the model says where its weights come from, not where they lie
        for key in ('source', 'file'):
            model.pretrained_cfg.pop(key, None)
            if key in source:
                model.pretrained_cfg[key] = source[key]
    if not (pretrained or foreign):
        model.pretrained_cfg.pop('label_names', None)  # of the classes that the default weights know, not this model
    return model
