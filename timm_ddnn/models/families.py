"""The families of timm that can be made dynamic, a class each; ResNets are in `ddnn_resnet.py`.

A class says where timm's has its stem, stages, final norm and head, see `DynamicDepthMixin`; it computes nothing else.
"""
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from timm.models import convnext, regnet, swin_transformer, vision_transformer
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..utils.errors import InputError
from .dynamic_depth import DynamicDepthMixin
from .shared_weights import Blocks, count_resnet_layers

__all__ = [
    'BlocksFamily', 'DynamicDepthConvNeXt', 'DynamicDepthEfficientNet', 'DynamicDepthMobileNetV3', 'DynamicDepthRegNet',
    'DynamicDepthResNetV2', 'DynamicDepthSwinTransformer', 'DynamicDepthVisionTransformer',
]


class DynamicDepthConvNeXt(DynamicDepthMixin, ConvNeXt):
    """timm's `ConvNeXt`, of version 2 too, that holds shallower ones, see `DynamicDepthMixin`."""

    plain_cls = ConvNeXt
    tail_names = ('norm_pre',)
    head_names = ('head',)
    depth_argument = 'depths'
    feature_cfg = MappingProxyType(dict(out_indices=(0, 1, 2, 3), flatten_sequential=True))
    filter_fn = staticmethod(convnext.checkpoint_filter_fn)

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name the stages, which begin with a downsampling."""
        return [(f'stages.{s}.downsample', f'stages.{s}.blocks') for s in range(len(self.stages))]

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map that the first stage takes, [B, C, H', W'], from images [B, C, H, W]."""
        return self.stem(x)


class _BlocksAndCounts:
    """The attribute `blocks` of a net in which timm calls a module so: that module, and called with a depth a count."""

    def __init__(self, module: nn.Module, count: Any) -> None:
        self._module, self._count = module, count

    def __call__(self, x: torch.Tensor | int | None) -> torch.Tensor | Blocks:
        """Run the module on a tensor, or return the number of blocks in every stage at a depth."""
        return self._module(x) if isinstance(x, (torch.Tensor, torch.fx.Proxy)) else self._count(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __iter__(self) -> Any:
        return iter(self._module)

    def __len__(self) -> int:
        return len(self._module)

    def __getitem__(self, index: int | slice) -> nn.Module:
        return self._module[index]


class BlocksFamily(DynamicDepthMixin):
    """What nets have in common in which timm calls a module `blocks`, the name that counts them here."""

    @property
    def blocks(self) -> _BlocksAndCounts:
        """The module of timm, and called with a depth the number of blocks in every stage, `model.blocks(8)`."""
        return _BlocksAndCounts(self._modules['blocks'], super().blocks)


class DynamicDepthVisionTransformer(BlocksFamily, VisionTransformer):
    """timm's `VisionTransformer`, of DeiT too, that holds shallower ones, see `DynamicDepthMixin`. It is one stage."""

    plain_cls = VisionTransformer
    tail_names = ('norm',)
    head_names = ('fc_norm',)
    depth_argument = 'depth'
    feature_cfg = MappingProxyType(dict(out_indices=3, feature_cls='getter'))
    filter_fn = staticmethod(vision_transformer.checkpoint_filter_fn)

    def check(self, net: nn.Module) -> None:
        """Refuse what has no map of all patches."""
        if not isinstance(net.patch_drop, nn.Identity):
            raise InputError(f'patch_drop_rate must be 0 in a net of several depths, got {net.patch_drop.prob}')

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name the only stage."""
        return [('blocks',)]

    @staticmethod
    def blocks_argument(blocks: Blocks) -> int:
        """Return the number of blocks."""
        return blocks[0]

    def trim(self, net: nn.Module, blocks: Blocks) -> None:
        """Leave out the features of blocks that are left out."""
        net.feature_info = net.feature_info[:blocks[0]]

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the tokens that the first block takes, [B, N, C], from images [B, C, H, W]."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def to_map(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Lay out the tokens of patches, those after class and register tokens, as [B, C, H', W']."""
        height, width = self.patch_embed.dynamic_feat_size(tuple(size))
        return x[:, self.num_prefix_tokens:].transpose(1, 2).unflatten(2, (height, width))


class DynamicDepthSwinTransformer(DynamicDepthMixin, SwinTransformer):
    """timm's `SwinTransformer` that holds shallower ones, see `DynamicDepthMixin`.

    Its blocks come in pairs, the second with shifted windows, so that default sub-nets keep pairs; any other number is
    timm's class as well.
    """

    plain_cls = SwinTransformer
    tail_names = ('norm',)
    head_names = ('head',)
    unit = 2
    depth_argument = 'depths'
    feature_cfg = MappingProxyType(dict(out_indices=(0, 1, 2, 3), flatten_sequential=True))
    filter_fn = staticmethod(swin_transformer.checkpoint_filter_fn)

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name the stages, which begin with a downsampling."""
        return [(f'layers.{s}.downsample', f'layers.{s}.blocks') for s in range(len(self.layers))]

    def trim(self, net: nn.Module, blocks: Blocks) -> None:
        """Correct the number of blocks that a stage knows."""
        for stage, count in zip(net.layers, blocks, strict=True):
            stage.depth = count

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map that the first stage takes, [B, H', W', C], from images [B, C, H, W]."""
        return self.patch_embed(x)

    def to_map(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Put the channels of a map [B, H', W', C] first."""
        return x.permute(0, 3, 1, 2)


class DynamicDepthRegNet(DynamicDepthMixin, RegNet):
    """timm's `RegNet` that holds shallower ones, see `DynamicDepthMixin`."""

    plain_cls = RegNet
    tail_names = ('final_conv',)
    head_names = ('head',)

    @staticmethod
    def filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Adapt pretrained weights of other libraries, as timm."""
        return regnet._filter_fn(state_dict)

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name the stages that are there."""
        return [(name,) for name in ('s1', 's2', 's3', 's4') if getattr(self, name)._modules]

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map that the first stage takes, [B, C, H', W'], from images [B, C, H, W]."""
        return self.stem(x)


class _EfficientNetFamily(BlocksFamily):
    """What timm's `EfficientNet` and `MobileNetV3` have in common."""

    blocks_keep_shape = False  # a stage is any list of blocks
    feature_cfg = MappingProxyType(dict(feature_cls='getter'))

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name the stages."""
        return [(f'blocks.{s}',) for s in range(len(self.blocks))]

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map that the first stage takes, [B, C, H', W'], from images [B, C, H, W]."""
        return self.bn1(self.conv_stem(x))


class DynamicDepthEfficientNet(_EfficientNetFamily, EfficientNet):
    """timm's `EfficientNet`, of MobileNetV2 and others too, that holds shallower ones, see `DynamicDepthMixin`."""

    plain_cls = EfficientNet
    tail_names = ('conv_head', 'bn2')


class DynamicDepthMobileNetV3(_EfficientNetFamily, MobileNetV3):
    """timm's `MobileNetV3`, of MobileNetV4 too, that holds shallower ones, see `DynamicDepthMixin`."""

    plain_cls = MobileNetV3
    head_names = ('norm_head',)


class DynamicDepthResNetV2(DynamicDepthMixin, ResNetV2):
    """timm's `ResNetV2`, with BatchNorm or GroupNorm, that holds shallower ones, see `DynamicDepthMixin`."""

    plain_cls = ResNetV2
    tail_names = ('norm',)
    head_names = ('head',)
    depth_argument = 'layers'
    feature_cfg = MappingProxyType(dict(flatten_sequential=True))

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name the stages."""
        return [(f'stages.{s}.blocks',) for s in range(len(self.stages))]

    def depth_of(self, blocks: Sequence[int]) -> int:
        """Count the layers: those of the blocks, the stem and the classifier."""
        return count_resnet_layers(self.stages[0].blocks[0], blocks)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map that the first stage takes, [B, C, H', W'], from images [B, C, H, W]."""
        return self.stem(x)
