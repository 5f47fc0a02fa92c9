"""A trained net that teaches in the place of the full-net in training."""
import torch
from timm.data import resolve_input_data_config
from torch import nn

from .loss import EKDLoss
from .models.dynamic_depth import DynamicDepthMixin, SubNetOutput
from .utils.errors import InputError

__all__ = ['Teacher']


class Teacher:
    """Runs a net without gradient on the images that the student takes, normalized as the net wants them.

    It is not a module, so the net is no part of what a task trains, moves or saves. The net is put into eval mode and
    stays on its own device.

    Attributes:
        model: The net.
        scale: Factor per channel, [1, C, 1, 1], of images that the student takes, None if both take the same ones.
        shift: What is added after that, [1, C, 1, 1], or None.
    """

    def __init__(self, model: nn.Module, student: nn.Module, loss_fn: EKDLoss) -> None:
        """Check that the net can teach the student.

        Args:
            model: timm model of the student's classes; of a dynamic-depth model, the full-net teaches. It may be an
                average of the student's weights, `timm.utils.ModelEmaV3(student).module`. Mean and std of its images
                are those of timm's `resolve_input_data_config`.
            student: Dynamic-depth model that is trained.
            loss_fn: Loss by which it is trained.

        Raises:
            InputError: If the net is not a timm model, has another number of classes or channels, has nothing to teach
                (`alpha` and `beta` are 0), or has not the maps whose attention is to be compared (`beta` is not 0):
                those of a dynamic-depth model, of the same resolutions.
        """
        if not hasattr(model, 'num_classes'):
            raise InputError(f'teacher must be a model of timm, got {type(model).__name__}')
        if model.num_classes != student.num_classes:
            raise InputError(f'teacher must have {student.num_classes} classes, got {model.num_classes}')
        if not (loss_fn.alpha or loss_fn.beta):
            raise InputError('a teacher needs alpha or beta to be > 0, got 0 for both')
        if loss_fn.beta:
            maps, own_maps = (
                [stage['reduction'] for stage in net.feature_info] if isinstance(net, DynamicDepthMixin) else
                type(net).__name__ for net in (student, model))
            if own_maps != maps:
                raise InputError(
                    'for beta > 0, teacher must be a dynamic-depth model (ddnn_*) whose maps have the reductions '
                    f'{maps}, got {own_maps} and beta={loss_fn.beta}')
        config, own = map(resolve_input_data_config, (student, model))
        channels, own_channels = config['input_size'][0], own['input_size'][0]
        if own_channels != channels:
            raise InputError(f'teacher must take images of {channels} channels, got {own_channels}')
        weight = next(model.parameters())
        mean, std, own_mean, own_std = (
            weight.new_tensor(values).view(1, -1, 1, 1)
            for values in (config['mean'], config['std'], own['mean'], own['std']))
        same = torch.equal(mean, own_mean) and torch.equal(std, own_std)
        self.scale, self.shift = (None, None) if same else (std / own_std, (mean - own_mean) / own_std)
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, input: torch.Tensor) -> SubNetOutput:
        """Compute what the net teaches.

        Args:
            input: Images, [B, C, H, W], as the student takes them.

        Returns:
            Logits, and the last map of every stage if the net is a dynamic-depth model.

        Raises:
            InputError: If the net does not take images of this size.
        """
        if self.scale is not None:
            input = input * self.scale + self.shift
        input = input.to(next(self.model.parameters()).dtype)
        if isinstance(self.model, DynamicDepthMixin):
            full = self.model.depths[0]
            return self.model(input, depth=(full,))[full]
        try:
            return SubNetOutput(self.model(input), [])
        except AssertionError as e:  # by which timm's nets judge the size of images
            raise InputError(f'teacher does not take images of {tuple(input.shape[1:])}: {e}') from e
