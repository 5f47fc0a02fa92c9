"""Small nets of every family of timm that can be made dynamic."""
import copy
from functools import cache

import timm
import torch

from timm_ddnn import make_dynamic

# Small nets: name, arguments that make them narrow, px
SMALL = {
    'convnext': ('convnext_atto', dict(depths=(2, 1, 3, 1), dims=(8, 16, 24, 32)), 64),
    'convnextv2': ('convnextv2_atto', dict(depths=(2, 1, 3, 1), dims=(8, 16, 24, 32)), 64),
    'vit': ('vit_tiny_patch16_224', dict(img_size=48, embed_dim=24, depth=6), 48),
    'vit_registers': (
        'vit_small_patch14_reg4_dinov2', dict(img_size=56, embed_dim=24, num_heads=3, depth=6, num_classes=10), 56),
    'vit_pooled': ('vit_base_patch16_gap_224', dict(img_size=32, embed_dim=24, num_heads=3, depth=6), 32),
    'deit3': ('deit3_small_patch16_224', dict(img_size=32, embed_dim=24, num_heads=3, depth=6), 32),
    'swin': (
        'swin_tiny_patch4_window7_224',
        dict(img_size=64, window_size=2, depths=(2, 2, 4, 2), embed_dim=12, num_heads=(1, 1, 2, 2)), 64),
    'regnet': ('regnety_002', {}, 64),
    'regnetz': ('regnetz_005', {}, 64),
    'efficientnet': ('efficientnet_b0', {}, 64),
    'mobilenetv3': ('mobilenetv3_large_100', {}, 64),
    'mobilenetv4': ('mobilenetv4_conv_small', {}, 64),
    'resnetv2': ('resnetv2_50', dict(layers=(2, 1, 3, 1), channels=(32, 32, 48, 64)), 64),
    'bit': ('resnetv2_50x1_bit', dict(channels=(128, 128, 128, 128)), 64),
    'wide_resnet': ('wide_resnet50_2', dict(channels=(8, 8, 8, 8)), 64),
    'resnet_gn': ('resnet50_gn', dict(channels=(32, 32, 32, 32)), 64),
}


def randomize(model):
    """Give norms, layer scales and statistics values with which blocks do something: depths then differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.2, 0.8, generator=generator)
    return model


@cache
def small_net(family):
    name, kwargs, _ = SMALL[family]
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **{'num_classes': 10, **kwargs})).eval()


def small(family, subnets=None, **kwargs):
    """A dynamic model with weights of its own, and images for it."""
    model = randomize(make_dynamic(copy.deepcopy(small_net(family)), subnets, **kwargs)).eval()
    size = SMALL[family][2]
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
