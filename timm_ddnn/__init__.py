"""Dynamic-depth ResNets for timm, trained by embedded knowledge distillation; the import registers the models."""
from .calibration import calibrate_bn
from .cascade import Cascade
from .cifar_resnet import CifarResNet
from .controller import DepthController
from .ddnn_resnet import DynamicDepthCifarResNet, DynamicDepthResNet
from .dynamic_depth import SubNetOutput
from .loss import EKDLoss, attention_map, attention_transfer, kl_divergence
from .publish import push_to_hub
from .selection import select_depth
from .task import EKDTask
from .version import __version__

__all__ = [
    'Cascade',
    'CifarResNet',
    'DepthController',
    'DynamicDepthCifarResNet',
    'DynamicDepthResNet',
    'EKDLoss',
    'EKDTask',
    'SubNetOutput',
    '__version__',
    'attention_map',
    'attention_transfer',
    'calibrate_bn',
    'kl_divergence',
    'push_to_hub',
    'select_depth',
]
