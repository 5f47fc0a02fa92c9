"""Dynamic-depth models of timm's other families: entrypoints for some, and one for any by the name of timm's model."""
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, create_model, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

from ..utils.errors import InputError
from . import families  # noqa: F401  its classes are found by those of timm
from .create import convert, create_of_base, create_shallow
from .dynamic_depth import DynamicDepthMixin

__all__ = ['make_dynamic']


def make_dynamic(
        model: str | nn.Module,
        subnets: Sequence[Sequence[int]] | None = None,
        *,
        depth: int | None = None,
        private: Sequence[str] = (),
        **kwargs: Any,
) -> DynamicDepthMixin:
    """Make a model of several depths out of one of timm's.

    Args:
        model: Name in timm's registry, with or without a tag, or a net of one of its families. Such a net is taken over
            with its weights: what is done to them in one shows in the other. Its full-net counts as trained.
        subnets: Number of blocks per stage of every sub-net, between 1 and the net's. Two thirds and one third of the
            blocks of each stage if None, rounded, at least one; of Swin, pairs of blocks.
        depth: The depth that `forward` runs when it is given none. The full-net's if None.
        private: What sub-nets have for themselves besides statistics, of 'affine', 'final_norm', 'classifier' and
            'conv', see `SharedWeightsMixin`. Nothing by default.
        **kwargs: With a name, further arguments of `timm.create_model`, such as `pretrained`.

    Returns:
        A model as `ddnn_resnet50` is one, see `DynamicDepthMixin`. A depth is named by its layers in ResNets, as the
        field does, and by its blocks elsewhere: of `vit_small_patch16_224` depths are 12, 8 and 4.

    Raises:
        InputError: If the net is of none of the families, or does not take the arguments.
    """
    own = dict(subnets=subnets, depth=depth, private=private)
    if isinstance(model, str):
        return create_model('dynamic_timm', base=model, **own, **kwargs)
    if kwargs:
        raise InputError(f'arguments must be of {sorted(own)} where a net is given, got {sorted(kwargs)}')
    dynamic = convert(model, **own)
    dynamic.mark_trained(dynamic.depths[:1])
    if hasattr(model, 'pretrained_cfg'):
        dynamic.pretrained_cfg = dynamic.default_cfg = {**model.pretrained_cfg, 'architecture': 'dynamic_timm'}
        args = {'base': model.pretrained_cfg['architecture'], **dynamic._model_args, 'private': list(private)}
        if dynamic.depth_argument == 'depth' and args.pop('depth', None):  # which names the default depth here
            args['blocks'] = list(dynamic.blocks(dynamic.depths[0]))
        dynamic._model_args = args
    return dynamic


# timm's own weights make a full-net, whose sub-nets are to be trained
default_cfgs = generate_default_cfgs({
    f'ddnn_{name}': get_pretrained_cfg(name) for name in (
        'convnext_atto.d2_in1k',
        'convnext_nano.in12k_ft_in1k',
        'convnext_tiny.in12k_ft_in1k',
        'convnext_small.in12k_ft_in1k',
        'vit_tiny_patch16_224.augreg_in21k_ft_in1k',
        'vit_small_patch16_224.augreg_in21k_ft_in1k',
        'vit_base_patch16_224.augreg2_in21k_ft_in1k',
        'deit_small_patch16_224.fb_in1k',
        'swin_tiny_patch4_window7_224.ms_in1k',
        'regnety_004.tv2_in1k',
        'regnety_016.tv2_in1k',
        'efficientnet_b0.ra_in1k',
        'mobilenetv3_large_100.ra_in1k',
        'resnetv2_50.a1h_in1k',
    )
})


def _base_cfg(base: str, cfg: Any, variant: str) -> Any:
    """Find the configuration of timm's weights for a base with or without a tag; any that is given stands."""
    if isinstance(cfg, (dict, PretrainedCfg)):
        return cfg
    try:
        found = get_pretrained_cfg(f'{base.partition(".")[0]}.{cfg}' if cfg else base)
    except RuntimeError as e:
        raise InputError(f'base must be a model of timm, with or without one of its tags: {e}') from None
    return replace(found or PretrainedCfg(), architecture=variant)


@register_model
def dynamic_timm(pretrained: bool = False, base: str = 'resnet18', **kwargs: Any) -> nn.Module:
    """Construct a model of several depths of any net of timm that has a family here, by its name."""
    kwargs['pretrained_cfg'] = _base_cfg(base, kwargs.get('pretrained_cfg'), 'dynamic_timm')
    return create_of_base('dynamic_timm', base.partition('.')[0], pretrained, **kwargs)


@register_model
def shallow_timm(
        pretrained: bool = False, base: str = 'resnet18', blocks: Any = (1, 1, 1, 1), **kwargs: Any) -> nn.Module:
    """Construct a plain net of timm with fewer blocks, for which timm itself has no argument."""
    cfg = _base_cfg(base, kwargs.get('pretrained_cfg'), 'shallow_timm')
    if isinstance(cfg, PretrainedCfg):  # timm's weights are those of all blocks
        cfg = replace(cfg, **dict.fromkeys(('url', 'file', 'hf_hub_id', 'source')))
    kwargs['pretrained_cfg'] = cfg
    return create_shallow('shallow_timm', base.partition('.')[0], blocks, pretrained, **kwargs)


@register_model
def ddnn_convnext_atto(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic ConvNeXt-Atto of 12, 7 and 5 blocks."""
    return create_of_base('ddnn_convnext_atto', 'convnext_atto', pretrained, **kwargs)


@register_model
def ddnn_convnext_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic ConvNeXt-Nano of 14, 8 and 6 blocks."""
    return create_of_base('ddnn_convnext_nano', 'convnext_nano', pretrained, **kwargs)


@register_model
def ddnn_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic ConvNeXt-Tiny of 18, 12 and 6 blocks."""
    return create_of_base('ddnn_convnext_tiny', 'convnext_tiny', pretrained, **kwargs)


@register_model
def ddnn_convnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic ConvNeXt-Small of 36, 24 and 12 blocks."""
    return create_of_base('ddnn_convnext_small', 'convnext_small', pretrained, **kwargs)


@register_model
def ddnn_vit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic ViT-Tiny of 12, 8 and 4 blocks."""
    return create_of_base('ddnn_vit_tiny_patch16_224', 'vit_tiny_patch16_224', pretrained, **kwargs)


@register_model
def ddnn_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic ViT-Small of 12, 8 and 4 blocks."""
    return create_of_base('ddnn_vit_small_patch16_224', 'vit_small_patch16_224', pretrained, **kwargs)


@register_model
def ddnn_vit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic ViT-Base of 12, 8 and 4 blocks."""
    return create_of_base('ddnn_vit_base_patch16_224', 'vit_base_patch16_224', pretrained, **kwargs)


@register_model
def ddnn_deit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic DeiT-Small, without distillation token, of 12, 8 and 4 blocks."""
    return create_of_base('ddnn_deit_small_patch16_224', 'deit_small_patch16_224', pretrained, **kwargs)


@register_model
def ddnn_swin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic Swin-Tiny of 12, 10 and 8 blocks."""
    return create_of_base('ddnn_swin_tiny_patch4_window7_224', 'swin_tiny_patch4_window7_224', pretrained, **kwargs)


@register_model
def ddnn_regnety_004(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic RegNetY-400MF of 16, 11 and 6 blocks."""
    return create_of_base('ddnn_regnety_004', 'regnety_004', pretrained, **kwargs)


@register_model
def ddnn_regnety_016(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic RegNetY-1.6GF of 27, 17 and 10 blocks."""
    return create_of_base('ddnn_regnety_016', 'regnety_016', pretrained, **kwargs)


@register_model
def ddnn_efficientnet_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic EfficientNet-B0 of 16, 11 and 7 blocks."""
    return create_of_base('ddnn_efficientnet_b0', 'efficientnet_b0', pretrained, **kwargs)


@register_model
def ddnn_mobilenetv3_large_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic MobileNetV3-Large of 16, 11 and 7 blocks."""
    return create_of_base('ddnn_mobilenetv3_large_100', 'mobilenetv3_large_100', pretrained, **kwargs)


@register_model
def ddnn_resnetv2_50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Construct a dynamic pre-activation ResNet-50 of depths 50, 35 and 17."""
    return create_of_base('ddnn_resnetv2_50', 'resnetv2_50', pretrained, **kwargs)
