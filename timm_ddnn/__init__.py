"""Dynamic-depth networks for timm, trained by embedded knowledge distillation; the import registers the models."""
from .calibration import calibrate_bn
from .cascade import Cascade
from .deploy.choose import select_depth
from .deploy.controller import DepthController
from .evaluation.predict_images import predict
from .hub.publish import push_to_hub
from .loss import EKDLoss, attention_map, attention_transfer, kl_divergence
from .models.cifar_resnet import CifarResNet
from .models.ddnn_resnet import DynamicDepthCifarResNet, DynamicDepthResNet
from .models.ddnn_timm import make_dynamic
from .models.dynamic_depth import DynamicDepthMixin, SubNetOutput
from .task import EKDTask
from .teacher import Teacher
from .version import __version__

__all__ = [
    'Cascade',
    'CifarResNet',
    'DepthController',
    'DynamicDepthCifarResNet',
    'DynamicDepthMixin',
    'DynamicDepthResNet',
    'EKDLoss',
    'EKDTask',
    'SubNetOutput',
    'Teacher',
    '__version__',
    'attention_map',
    'attention_transfer',
    'calibrate_bn',
    'kl_divergence',
    'make_dynamic',
    'predict',
    'push_to_hub',
    'select_depth',
]
