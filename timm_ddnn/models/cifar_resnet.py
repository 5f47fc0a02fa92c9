"""ResNets for images of 32 px, plain nets in timm's dialect; the dynamic ones are in `ddnn_resnet.py`."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier, get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, make_blocks
from torch import nn

from ..utils.errors import InputError
from ..utils.schema import brief
from ..weights.build import build_model

__all__ = ['CIFAR100_ARGS', 'QUARTER_ARGS', 'CifarResNet', 'cifar100_cfg', 'cifar_cfg', 'feature_cfg']

CIFAR100_ARGS = dict(channels=(64, 128, 256, 512), projection=True)  # of the nets of four stages
QUARTER_ARGS = dict(CIFAR100_ARGS, channels=(16, 32, 64, 128))


class PadShortcut(nn.Module):
    """Shortcut without parameters, option A of arXiv 1512.03385: take every n-th pixel, append channels of zeros."""

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, C, H, W] to [B, C + extra_channels, ceil(H / stride), ceil(W / stride)]."""
        return F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, 0, self.extra_channels))


class CifarResNet(ResNet):
    """ResNet for images of 32 px.

    With three stages and shortcuts without parameters it is that of 'Deep Residual Learning for Image Recognition'
    (arXiv 1512.03385, section 4.2); with four stages and projections, the ResNet-18, 34 or 50 for small images that is
    usual on CIFAR-100.

    Modifications against timm's `ResNet`:
        * stem of one 3x3 convolution with stride 1, as wide as the first stage, no pooling
        * three or four stages at strides 1, 2, 4 and 8; of three, `layer4` stays, without a block
        * `projection` chooses the shortcuts where resolution or width change
    """

    def __init__(
            self,
            block: type[nn.Module],
            layers: Sequence[int],
            num_classes: int = 10,
            in_chans: int = 3,
            output_stride: int = 32,
            global_pool: str = 'avg',
            channels: Sequence[int] = (16, 32, 64),
            projection: bool = False,
            act_layer: Any = nn.ReLU,
            norm_layer: Any = nn.BatchNorm2d,
            aa_layer: Any = None,
            drop_rate: float = 0.0,
            drop_path_rate: float = 0.0,
            drop_block_rate: float = 0.0,
            zero_init_last: bool = False,
            block_args: Mapping[str, Any] | None = None,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ) -> None:
        """Build the net.

        Args:
            block: Residual block class, timm's `BasicBlock` or `Bottleneck`.
            layers: Number of blocks per stage, three or four integers.
            num_classes: Number of classes; 0 for no classifier.
            in_chans: Channels of the images.
            output_stride: The greatest stride of the last map, 1, 2 or more: dilation takes the place of strides above.
            global_pool: Pooling before the classifier: 'avg', 'max', 'avgmax', 'catavgmax' or ''.
            channels: Channels per stage, a quarter of those of its maps for `Bottleneck`.
            projection: Whether a shortcut is a 1x1 convolution where resolution or width change, as in timm's
                `ResNet`. Else it is without parameters.
            act_layer: Activation layer.
            norm_layer: Normalization layer.
            aa_layer: Anti-aliasing layer in blocks that reduce the resolution, none if None.
            drop_rate: Dropout probability before the classifier, [0, 1).
            drop_path_rate: Stochastic depth rate of the last block, [0, 1).
            drop_block_rate: DropBlock rate of the third and fourth stage, [0, 1).
            zero_init_last: Whether the last norm of every block starts at zero; nets this narrow learn slower then.
            block_args: Further arguments of the block class, such as `attn_layer`.
            device: Device of the parameters.
            dtype: Type of the parameters.

        Raises:
            InputError: If `layers` and `channels` are not positive integers of three stages, or of four, or
                `output_stride` is not a power of two to 32.
        """
        nn.Module.__init__(self)
        if not (len(layers) in (3, 4) and len(channels) == len(layers) and all(
                type(n) is int and n > 0 for n in (*layers, *channels))):
            raise InputError(
                'layers and channels must be of three stages, or both of four, and positive integers, got '
                f'{brief(layers)} and {brief(channels)}')
        if output_stride not in (1, 2, 4, 8, 16, 32):
            raise InputError(f'output_stride must be 1, 2, 4, 8, 16 or 32, got {brief(output_stride)}')
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)

        self.conv1 = nn.Conv2d(in_chans, channels[0], kernel_size=3, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(channels[0], **dd)
        self.act1 = act_layer(inplace=True)
        self.maxpool = nn.Identity()
        self.feature_info = [dict(num_chs=channels[0], reduction=1, module='act1')]

        stages, stage_info = make_blocks(
            (block,) * len(layers),
            channels,
            layers,
            inplanes=channels[0],
            output_stride=output_stride * 4,  # make_blocks counts from an ImageNet stem, which has stride 4
            act_layer=act_layer,
            norm_layer=norm_layer,
            aa_layer=aa_layer,
            drop_path_rate=drop_path_rate,
            drop_block_rate=drop_block_rate,
            **(block_args or {}),
            **dd,
        )
        width = channels[0]
        for (name, stage), info in zip(stages, stage_info, strict=True):
            if stage[0].downsample is not None and not projection:
                stage[0].downsample = PadShortcut(stage[0].stride, info['num_chs'] - width)
            width = info['num_chs']
            self.add_module(name, stage)
            self.feature_info.append(dict(info, reduction=info['reduction'] // 4))
        if len(layers) == 3:
            self.layer4 = nn.Sequential()

        self.num_features = width
        self.global_pool, self.fc = create_classifier(width, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = width * self.global_pool.feat_mult()
        self.init_weights(zero_init_last=zero_init_last)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | Sequence[int] | None = None,
            **kwargs: Any,
    ) -> Any:
        """Compute the maps of the stem and the stages, as timm's method of this name."""
        take, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, indices=take, **kwargs)

    def prune_intermediate_layers(
            self,
            indices: int | Sequence[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove the stages after the last map wanted, as timm's method of this name."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        if last == len(self.feature_info) - 1 and not prune_head:
            return take  # nothing to remove; of three stages timm's method misses the fourth and takes the head with it
        return super().prune_intermediate_layers(take, prune_norm=prune_norm, prune_head=prune_head)


def cifar_cfg(**kwargs: Any) -> dict[str, Any]:
    """Default configuration of a CIFAR-10 model; mean and standard deviation are those of its training images."""
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc', **kwargs,
    }


def cifar100_cfg(**kwargs: Any) -> dict[str, Any]:
    """Default configuration of a CIFAR-100 model of four stages, with the mean and deviation of its training images."""
    return cifar_cfg(**dict(
        dict(num_classes=100, pool_size=(4, 4), mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)), **kwargs))


default_cfgs = generate_default_cfgs({
    **{f'cifar_resnet{depth}': cifar_cfg() for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f'cifar_resnet{depth}': cifar100_cfg() for depth in ('18', '18_025', '34', '50')},
})


def feature_cfg(layers: Sequence[int]) -> dict[str, Any]:
    """Choose the maps that features_only gives: stem and stages."""
    return dict(out_indices=tuple(range(len(layers) + 1)))


def _create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    return build_model(CifarResNet, variant, pretrained, feature_cfg=feature_cfg(kwargs['layers']), **kwargs)


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct the CIFAR ResNet-8."""
    model_args = dict(block=BasicBlock, layers=(1, 1, 1))
    return _create_cifar_resnet('cifar_resnet8', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet14(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct the CIFAR ResNet-14."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2))
    return _create_cifar_resnet('cifar_resnet14', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct the CIFAR ResNet-20."""
    model_args = dict(block=BasicBlock, layers=(3, 3, 3))
    return _create_cifar_resnet('cifar_resnet20', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct the CIFAR ResNet-32."""
    model_args = dict(block=BasicBlock, layers=(5, 5, 5))
    return _create_cifar_resnet('cifar_resnet32', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct the CIFAR ResNet-44."""
    model_args = dict(block=BasicBlock, layers=(7, 7, 7))
    return _create_cifar_resnet('cifar_resnet44', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct the CIFAR ResNet-56."""
    model_args = dict(block=BasicBlock, layers=(9, 9, 9))
    return _create_cifar_resnet('cifar_resnet56', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct the CIFAR ResNet-110."""
    model_args = dict(block=BasicBlock, layers=(18, 18, 18))
    return _create_cifar_resnet('cifar_resnet110', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct a ResNet-18 for images of 32 px."""
    model_args = dict(CIFAR100_ARGS, block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_cifar_resnet('cifar_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet18_025(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct a ResNet-18 for images of 32 px, a quarter as wide."""
    model_args = dict(QUARTER_ARGS, block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_cifar_resnet('cifar_resnet18_025', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet34(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct a ResNet-34 for images of 32 px."""
    model_args = dict(CIFAR100_ARGS, block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_cifar_resnet('cifar_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """Construct a ResNet-50 for images of 32 px."""
    model_args = dict(CIFAR100_ARGS, block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_cifar_resnet('cifar_resnet50', pretrained, **dict(model_args, **kwargs))
