"""Every entrypoint with its depths, models whose depths really differ, and images for them."""
import pytest
import timm
import torch

import timm_ddnn  # noqa: F401  the import registers the models
from timm_ddnn.utils.modules import find_norms

EXPECTED_DEPTHS = {
    'ddnn_resnet18': (18, 10),
    'ddnn_resnet34': (34, 18, 10),
    'ddnn_resnet50': (50, 26, 14),
    'ddnn_resnet50d': (50, 26, 14),
    'ddnn_seresnet50': (50, 26, 14),
    'ddnn_resnext50_32x4d': (50, 26, 14),
    'ddnn_resnet101': (101, 50, 26),
    'ddnn_resnet152': (152, 101, 50),
    'ddnn_resnet20': (20, 14, 8),
    'ddnn_resnet32': (32, 20, 8),
    'ddnn_resnet44': (44, 32, 20),
    'ddnn_resnet56': (56, 32, 20),
    'ddnn_resnet110': (110, 56, 20),
    'ddnn_cifar_resnet18': (18, 10),
    'ddnn_cifar_resnet18_025': (18, 10),
    'ddnn_cifar_resnet34': (34, 18, 10),
    'ddnn_cifar_resnet50': (50, 26, 14),
}

# Of other families of timm
FAMILY_DEPTHS = {
    'ddnn_convnext_atto': (12, 7, 5),
    'ddnn_convnext_nano': (14, 8, 6),
    'ddnn_convnext_tiny': (18, 12, 6),
    'ddnn_convnext_small': (36, 24, 12),
    'ddnn_vit_tiny_patch16_224': (12, 8, 4),
    'ddnn_vit_small_patch16_224': (12, 8, 4),
    'ddnn_vit_base_patch16_224': (12, 8, 4),
    'ddnn_deit_small_patch16_224': (12, 8, 4),
    'ddnn_swin_tiny_patch4_window7_224': (12, 10, 8),
    'ddnn_regnety_004': (16, 11, 6),
    'ddnn_regnety_016': (27, 17, 10),
    'ddnn_efficientnet_b0': (16, 11, 7),
    'ddnn_mobilenetv3_large_100': (16, 11, 7),
    'ddnn_resnetv2_50': (50, 35, 17),
}


def randomize_norms(model, seed=0):
    """Give every norm its own weights and statistics: timm's initial ones make all depths compute the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in find_norms(model):
            if norm._parameters:  # a sub-net's norm has statistics alone
                norm.weight.uniform_(0.3, 0.7, generator=generator)
                norm.bias.uniform_(-0.2, 0.2, generator=generator)
            norm.running_mean.uniform_(-0.2, 0.2, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def create(name, seed=0, **kwargs):
    torch.manual_seed(seed)
    return randomize_norms(timm.create_model(name, **kwargs), seed).eval()


def narrow(name):
    """Arguments for fewer channels: the same paths for a tenth of the time."""
    wide = '20', '32', '44', '56', '110', '32x4d'
    return {} if name.endswith(wide) and 'cifar' not in name else {'channels': (8, 16, 32, 64)}


def images(model, batch=2, size=64):
    size = min(size, model.pretrained_cfg['input_size'][-1])
    return torch.randn(batch, model.in_chans, size, size, generator=torch.Generator().manual_seed(1))


def logits_by_depth(model, x):
    with torch.no_grad():
        return {depth: model(x, depth=depth) for depth in model.depths}


def some_at_once(*names):
    """Every entrypoint in `make test-all`, those named in `make test` too."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED_DEPTHS]
