"""The families of timm that can be made dynamic, a class each; ResNets are in `ddnn_resnet.py`.

A class says where timm's has its stem, stages, final norm and head, see `DynamicDepthMixin`; it computes nothing else.
"""
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from timm.models import convnext, vision_transformer
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..utils.errors import InputError
from .dynamic_depth import DynamicDepthMixin
from .shared_weights import Blocks

__all__ = ['DynamicDepthConvNeXt', 'DynamicDepthVisionTransformer']


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


class _BlocksFamily(DynamicDepthMixin):
    """What nets have in common in which timm calls a module `blocks`, the name that counts them here."""

    @property
    def blocks(self) -> _BlocksAndCounts:
        """The module of timm, and called with a depth the number of blocks in every stage, `model.blocks(8)`."""
        return _BlocksAndCounts(self._modules['blocks'], super().blocks)


class DynamicDepthVisionTransformer(_BlocksFamily, VisionTransformer):
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
