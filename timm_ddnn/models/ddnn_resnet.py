"""Dynamic-depth ResNets: the classes, their default configurations and their entrypoints in timm's registry."""
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import generate_default_cfgs, get_pretrained_cfg, is_model, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..utils.errors import InputError
from .cifar_resnet import CIFAR100_ARGS, QUARTER_ARGS, CifarResNet, cifar100_cfg, cifar_cfg, feature_cfg
from .create import create_dynamic
from .dynamic_depth import DynamicDepthMixin
from .shared_weights import count_resnet_layers

__all__ = ['DynamicDepthCifarResNet', 'DynamicDepthResNet']


class _ResNetFamily(DynamicDepthMixin):
    """What timm's `ResNet` and `CifarResNet` have in common."""

    depth_argument = 'layers'

    def __init__(
            self,
            block: type[nn.Module],
            layers: Sequence[int],
            subnets: Sequence[Sequence[int]] = (),
            depth: int | None = None,
            private: Sequence[str] = (),
            **kwargs: Any,
    ) -> None:
        """Build the full-net and its sub-nets.

        Args:
            block: Residual block class, timm's `BasicBlock` or `Bottleneck`.
            layers: Number of blocks per stage of the full-net.
            subnets: As for `DynamicDepthMixin`.
            depth: As for `DynamicDepthMixin`.
            private: As for `DynamicDepthMixin`.
            **kwargs: Arguments of the parent class.

        Raises:
            InputError: If a classifier has no pooling before it, or as for `DynamicDepthMixin`.
        """
        super().__init__(self.plain_cls(block, layers, **kwargs), subnets, depth, private)

    def check(self, net: nn.Module) -> None:
        """Refuse a classifier without pooling before it, which classifies pixels."""
        if net.num_classes and net.global_pool.is_identity():
            raise InputError("global_pool must not be '' where there is a classifier, num_classes of at least 1")

    def stage_names(self) -> list[tuple[str, ...]]:
        """Name the stages; of three, timm's methods need a `layer4`, which has no block."""
        return [(name,) for name in ('layer1', 'layer2', 'layer3', 'layer4') if getattr(self, name)._modules]

    def depth_of(self, blocks: Sequence[int]) -> int:
        """Count the layers: those of the blocks, the stem and the classifier."""
        return count_resnet_layers(self.layer1[0], blocks)

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the map that the first block takes, [B, C, H', W'], from images [B, C, H, W]."""
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))

    def _plain_candidates(self, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
        name = re.sub(r'\d+', str(depth), self.base_name, count=1)
        if is_model(name):  # 'resnet26', if its blocks are those of depth 26
            yield name, self._plain_args()
        yield from super()._plain_candidates(depth)


class DynamicDepthResNet(_ResNetFamily, ResNet):
    """timm's `ResNet` that holds shallower ones in the same weights, see `DynamicDepthMixin`."""

    plain_cls = ResNet


class DynamicDepthCifarResNet(_ResNetFamily, CifarResNet):
    """`CifarResNet` that holds shallower ones in the same weights, see `DynamicDepthMixin`."""

    plain_cls = CifarResNet
    plain_prefix = 'cifar_'

# Weights that come with this library, a folder MODEL.TAG each
WEIGHTS = Path(__file__).with_name('tags')
CIFAR10 = 'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'
CIFAR100 = (
    'apple', 'aquarium_fish', 'baby', 'bear', 'beaver', 'bed', 'bee', 'beetle', 'bicycle', 'bottle', 'bowl', 'boy',
    'bridge', 'bus', 'butterfly', 'camel', 'can', 'castle', 'caterpillar', 'cattle', 'chair', 'chimpanzee', 'clock',
    'cloud', 'cockroach', 'couch', 'crab', 'crocodile', 'cup', 'dinosaur', 'dolphin', 'elephant', 'flatfish',
    'forest', 'fox', 'girl', 'hamster', 'house', 'kangaroo', 'keyboard', 'lamp', 'lawn_mower', 'leopard', 'lion',
    'lizard', 'lobster', 'man', 'maple_tree', 'motorcycle', 'mountain', 'mouse', 'mushroom', 'oak_tree', 'orange',
    'orchid', 'otter', 'palm_tree', 'pear', 'pickup_truck', 'pine_tree', 'plain', 'plate', 'poppy', 'porcupine',
    'possum', 'rabbit', 'raccoon', 'ray', 'road', 'rocket', 'rose', 'sea', 'seal', 'shark', 'shrew', 'skunk',
    'skyscraper', 'snail', 'snake', 'spider', 'squirrel', 'streetcar', 'sunflower', 'sweet_pepper', 'table', 'tank',
    'telephone', 'television', 'tiger', 'tractor', 'train', 'trout', 'tulip', 'turtle', 'wardrobe', 'whale',
    'willow_tree', 'wolf', 'woman', 'worm',
)


def _bundled(name: str, cfg: Callable[..., dict[str, Any]] = cifar_cfg, classes: tuple[str, ...] = CIFAR10) -> Any:
    """Configuration of weights that come with this library, by that of the model."""
    about = dict(license='apache-2.0', num_classes=len(classes), label_names=classes)
    return cfg(source='local-dir', file=str(WEIGHTS / name), **about)


# The first tag of a model is the one that timm takes by default. timm's own weights make a full-net, whose sub-nets are
# to be trained.
default_cfgs = generate_default_cfgs({
    'ddnn_resnet18.a1_in1k': get_pretrained_cfg('resnet18.a1_in1k'),
    'ddnn_resnet34.a1_in1k': get_pretrained_cfg('resnet34.a1_in1k'),
    'ddnn_resnet50.a1_in1k': get_pretrained_cfg('resnet50.a1_in1k'),
    'ddnn_resnet101.a1h_in1k': get_pretrained_cfg('resnet101.a1h_in1k'),
    'ddnn_resnet152.a1h_in1k': get_pretrained_cfg('resnet152.a1h_in1k'),
    'ddnn_resnet50d.ra2_in1k': get_pretrained_cfg('resnet50d.ra2_in1k'),
    'ddnn_seresnet50.a1_in1k': get_pretrained_cfg('seresnet50.a1_in1k'),
    'ddnn_resnext50_32x4d.a1h_in1k': get_pretrained_cfg('resnext50_32x4d.a1h_in1k'),
    'ddnn_resnet20.kd_cifar10': _bundled('ddnn_resnet20.kd_cifar10'),
    'ddnn_resnet20.ekd_cifar10': _bundled('ddnn_resnet20.ekd_cifar10'),
    'ddnn_resnet32': cifar_cfg(),
    'ddnn_resnet44': cifar_cfg(),
    'ddnn_resnet56.ekd_cifar10': _bundled('ddnn_resnet56.ekd_cifar10'),
    'ddnn_resnet110': cifar_cfg(),
    'ddnn_cifar_resnet18': cifar100_cfg(),
    'ddnn_cifar_resnet18_025.ekd_cifar100': _bundled('ddnn_cifar_resnet18_025.ekd_cifar100', cifar100_cfg, CIFAR100),
    'ddnn_cifar_resnet34': cifar100_cfg(),
    'ddnn_cifar_resnet50': cifar100_cfg(),
})


def _create_ddnn(cls: type[DynamicDepthMixin], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return create_dynamic(cls, variant, pretrained, feature_cfg=feature_cfg(kwargs['layers']), **kwargs)


@register_model
def ddnn_resnet18(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic ResNet of depths 18 and 10."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), subnets=((1, 1, 1, 1),))
    return _create_ddnn(DynamicDepthResNet, 'ddnn_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet34(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic ResNet of depths 34, 18 and 10."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), subnets=((2, 2, 2, 2), (1, 1, 1, 1)))
    return _create_ddnn(DynamicDepthResNet, 'ddnn_resnet34', pretrained, **dict(model_args, **kwargs))

_RESNET50 = dict(block=Bottleneck, layers=(3, 4, 6, 3), subnets=((2, 2, 2, 2), (1, 1, 1, 1)))


@register_model
def ddnn_resnet50(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic ResNet of depths 50, 26 and 14."""
    return _create_ddnn(DynamicDepthResNet, 'ddnn_resnet50', pretrained, **dict(_RESNET50, **kwargs))


@register_model
def ddnn_resnet50d(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic ResNet-D of depths 50, 26 and 14."""
    model_args = dict(_RESNET50, stem_width=32, stem_type='deep', avg_down=True)
    return _create_ddnn(DynamicDepthResNet, 'ddnn_resnet50d', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_seresnet50(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic SE-ResNet of depths 50, 26 and 14."""
    model_args = dict(_RESNET50, block_args=dict(attn_layer='se'))
    return _create_ddnn(DynamicDepthResNet, 'ddnn_seresnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic ResNeXt of depths 50, 26 and 14."""
    model_args = dict(_RESNET50, cardinality=32, base_width=4)
    return _create_ddnn(DynamicDepthResNet, 'ddnn_resnext50_32x4d', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet101(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic ResNet of depths 101, 50 and 26."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), subnets=((3, 4, 6, 3), (2, 2, 2, 2)))
    return _create_ddnn(DynamicDepthResNet, 'ddnn_resnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet152(pretrained: bool = False, **kwargs: Any) -> DynamicDepthResNet:
    """Construct a dynamic ResNet of depths 152, 101 and 50."""
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3), subnets=((3, 4, 23, 3), (3, 4, 6, 3)))
    return _create_ddnn(DynamicDepthResNet, 'ddnn_resnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet20(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic CIFAR ResNet of depths 20, 14 and 8."""
    model_args = dict(block=BasicBlock, layers=(3, 3, 3), subnets=((2,) * 3, (1,) * 3))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_resnet20', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet32(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic CIFAR ResNet of depths 32, 20 and 8."""
    model_args = dict(block=BasicBlock, layers=(5, 5, 5), subnets=((3,) * 3, (1,) * 3))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_resnet32', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet44(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic CIFAR ResNet of depths 44, 32 and 20."""
    model_args = dict(block=BasicBlock, layers=(7, 7, 7), subnets=((5,) * 3, (3,) * 3))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_resnet44', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet56(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic CIFAR ResNet of depths 56, 32 and 20."""
    model_args = dict(block=BasicBlock, layers=(9, 9, 9), subnets=((5,) * 3, (3,) * 3))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_resnet56', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_resnet110(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic CIFAR ResNet of depths 110, 56 and 20."""
    model_args = dict(block=BasicBlock, layers=(18, 18, 18), subnets=((9,) * 3, (3,) * 3))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_resnet110', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_cifar_resnet18(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic ResNet of depths 18 and 10, for images of 32 px."""
    model_args = dict(CIFAR100_ARGS, block=BasicBlock, layers=(2, 2, 2, 2), subnets=((1, 1, 1, 1),))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_cifar_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_cifar_resnet18_025(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic ResNet of depths 18 and 10, for images of 32 px, a quarter as wide."""
    model_args = dict(QUARTER_ARGS, block=BasicBlock, layers=(2, 2, 2, 2), subnets=((1, 1, 1, 1),))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_cifar_resnet18_025', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_cifar_resnet34(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic ResNet of depths 34, 18 and 10, for images of 32 px."""
    model_args = dict(CIFAR100_ARGS, block=BasicBlock, layers=(3, 4, 6, 3), subnets=((2, 2, 2, 2), (1, 1, 1, 1)))
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_cifar_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def ddnn_cifar_resnet50(pretrained: bool = False, **kwargs: Any) -> DynamicDepthCifarResNet:
    """Construct a dynamic ResNet of depths 50, 26 and 14, for images of 32 px."""
    model_args = dict(CIFAR100_ARGS, **_RESNET50)
    return _create_ddnn(DynamicDepthCifarResNet, 'ddnn_cifar_resnet50', pretrained, **dict(model_args, **kwargs))
