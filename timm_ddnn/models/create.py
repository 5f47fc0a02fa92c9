"""Dynamic-depth models of plain nets, for the entrypoints in `ddnn_resnet.py` and `ddnn_timm.py`."""
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from timm.models import create_model, is_model
from torch import nn

from ..utils.errors import InputError
from ..weights.build import build_model
from .dynamic_depth import FAMILIES, DynamicDepthMixin

__all__ = ['convert', 'create_dynamic', 'create_of_base', 'create_shallow', 'find_family']


def convert(net: nn.Module, subnets: Sequence[Sequence[int]] | None = None, **kwargs: Any) -> DynamicDepthMixin:
    """Make a net of a family the full-net of a dynamic-depth model.

    Args:
        net: The net, whose modules are taken over.
        subnets: As for `make_dynamic`.
        **kwargs: `depth` and `private` as for `make_dynamic`.

    Raises:
        InputError: If the net is of no family, or does not take the arguments.
    """
    return find_family(type(net)).from_net(net, subnets, **kwargs)


def find_family(plain_cls: type[nn.Module]) -> type[DynamicDepthMixin]:
    """Find the dynamic class for nets of a class of timm.

    Raises:
        InputError: If there is none.
    """
    if plain_cls not in FAMILIES:
        known = ', '.join(sorted(cls.__name__ for cls in FAMILIES))
        raise InputError(f'nets of several depths are made of {known}, not of {plain_cls.__name__}')
    return FAMILIES[plain_cls]


@cache
def _class_of(architecture: str) -> type[nn.Module]:
    """Find the class that an entrypoint makes a net of."""
    if not is_model(architecture):
        raise InputError(f'base must be the name of a model of timm, got {architecture!r}')
    return type(create_model(architecture, device='meta'))


def create_dynamic(
        cls: type[DynamicDepthMixin],
        variant: str,
        pretrained: bool = False,
        *,
        make: Callable[..., DynamicDepthMixin] | None = None,
        feature_cfg: Mapping[str, Any] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Create a dynamic-depth model for an entrypoint, or an extractor of features of one depth.

    Args:
        cls: Class of the model.
        variant: Name of the entrypoint.
        pretrained: Whether to load weights.
        make: Makes the model, the class if None.
        feature_cfg: As for timm's `build_model_with_cfg`, that of the class if None.
        **kwargs: Further arguments of `build_model`.
    """
    make = make or cls
    if not kwargs.get('features_only', False):
        return build_model(cls, variant, pretrained, make=make, pretrained_filter_fn=cls.filter_fn, **kwargs)

    # timm's extractors take a net apart and rebuild it from its children, so each gets the plain net of one depth
    model = None

    def construct(**model_args: Any) -> nn.Module:
        nonlocal model
        model = make(**model_args)
        return model.extract()

    def select(state_dict: dict[str, torch.Tensor], net: nn.Module) -> dict[str, torch.Tensor]:
        return model.extract_state_dict(cls.filter_fn(state_dict, model) if cls.filter_fn else state_dict)

    return build_model(
        cls,
        variant,
        pretrained,
        make=make,
        construct=construct,
        pretrained_filter_fn=select,
        feature_cfg=dict(feature_cfg or cls.feature_cfg),
        **kwargs,
    )


def create_of_base(
        variant: str,
        base: str,
        pretrained: bool = False,
        blocks: Sequence[int] | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Create a dynamic-depth model of a model of timm, for an entrypoint.

    Args:
        variant: Name of the entrypoint.
        base: Name of timm's model, without a tag.
        pretrained: Whether to load weights.
        blocks: Number of blocks per stage of the full-net, the base's if None.
        **kwargs: Arguments of the model: `subnets`, `depth` and `private` as for `make_dynamic`, others of timm's.
    """
    def make(
            subnets: Sequence[Sequence[int]] | None = None,
            depth: int | None = None,
            private: Sequence[str] = (),
            **model_args: Any,
    ) -> DynamicDepthMixin:
        net = _create_plain(base, blocks, **model_args)
        return convert(net, subnets, depth=depth, private=private)

    return create_dynamic(find_family(_class_of(base)), variant, pretrained, make=make, **_without_base(kwargs))


def create_shallow(
        variant: str,
        base: str,
        blocks: Sequence[int],
        pretrained: bool = False,
        **kwargs: Any,
) -> nn.Module:
    """Create a plain net of timm with fewer blocks, for an entrypoint.

    Args:
        variant: Name of the entrypoint.
        base: Name of timm's model, without a tag.
        blocks: Number of blocks per stage, between 1 and the model's.
        pretrained: Whether to load weights.
        **kwargs: Arguments of timm's model.
    """
    cls, make = find_family(_class_of(base)), partial(_create_plain, base, blocks)
    return build_model(
        cls, variant, pretrained, make=make, pretrained_filter_fn=cls.filter_fn, feature_cfg=dict(cls.feature_cfg),
        **_without_base(kwargs))


def _create_plain(base: str, blocks: Sequence[int] | None, **kwargs: Any) -> nn.Module:
    """Create a net of timm, with other blocks than its own if they are given."""
    cls = find_family(_class_of(base))
    if blocks is not None and cls.depth_argument == 'depth':  # which names another argument in entrypoints of ours
        kwargs['depth'], blocks = cls.blocks_argument(tuple(blocks)), None
    net = create_model(base, **kwargs)
    del net._model_args, net.pretrained_cfg  # timm notes those of the entrypoint that calls this
    if blocks is None:
        return net
    model = convert(net, ())
    return net if tuple(blocks) == model.blocks(None) else model.extract(model.add_subnet(blocks))


def _without_base(kwargs: dict[str, Any]) -> dict[str, Any]:
    saved = kwargs.get('pretrained_model_args')  # of a config.json
    if saved:
        kwargs['pretrained_model_args'] = {k: v for k, v in saved.items() if k not in ('base', 'blocks')}
    return kwargs
