"""Embedded knowledge distillation as a task of timm's training scripts; the maths is in `loss.py`."""
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.data import resolve_input_data_config
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from .loss import EKDLoss
from .models.dynamic_depth import DynamicDepthMixin, SubNetOutput

__all__ = ['EKDTask']


_logger = logging.getLogger(__name__)


class EKDTask(ClassificationTask):
    """Trains all depths of a dynamic-depth model in every step, the full-net teaching the others.

    Modifications against timm's `ClassificationTask`:
        * one forward of all depths, or of those in `depth`, and `EKDLoss` around the criterion
        * every term of the loss in the returned dict
        * `ekd_options`, the arguments of `EKDLoss`
        * `set_teacher`, for a net that teaches in the place of the full-net
        * clipping without the head leaves out the classifier, not the last parameters: they may be a sub-net's

    Attributes:
        depth: Depths that a step trains, as the model's `forward` takes several: 'all', or a sequence with the
            full-net. To be set between steps: `(50,)` trains the full-net of a ResNet-50 alone.
    """

    def __init__(
            self,
            model: nn.Module,
            criterion: nn.Module | Callable | None = None,
            *,
            criterion_kwargs: dict[str, Any] | None = None,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
            verbose: bool = True,
            **ekd_options: Any,
    ) -> None:
        """Wrap the model.

        Args:
            model: Dynamic-depth model.
            criterion: As for `EKDLoss`. Created from `criterion_kwargs` by timm if None.
            criterion_kwargs: Arguments of timm's `create_classification_loss`, as its training script passes them.
            device: Device of the task.
            dtype: Type of the task.
            verbose: Whether to log the options.
            **ekd_options: Arguments of `EKDLoss`.

        Raises:
            ValueError: If the model has no depths, stages or weights are for what the model has not, or an option is
                out of its range.
        """
        ddnn = unwrap_model(model)
        if not isinstance(ddnn, DynamicDepthMixin):  # classes of timm have an attribute `depths`, too
            raise ValueError(f'EKDTask trains dynamic-depth models (ddnn_*), got {type(ddnn).__name__}')
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.depth: str | Sequence[int] = 'all'
        self.loss_fn = EKDLoss(criterion=self.criterion, **ekd_options)
        self.set_teacher(None)
        stages = len(ddnn.blocks(None))
        if any(not -stages <= stage < stages for stage in self.loss_fn.stages or ()):
            raise ValueError(f'stages must be from {-stages} to {stages - 1}, got {list(self.loss_fn.stages)}')
        unknown = sorted(set(self.loss_fn.weights) - set(ddnn.depths[1:]))
        if unknown:
            raise ValueError(f'weights must be for sub-nets of {ddnn.depths[1:]}, got {unknown}')
        if verbose:
            _logger.info(f'{type(self).__name__}: depths={ddnn.depths}, {self.loss_fn.extra_repr()}')

    def set_teacher(self, teacher: nn.Module | None) -> None:
        """Let another net teach all depths, the full-net too, in the place of the full-net in training.

        Args:
            teacher: timm model, of which the full-net teaches if it is of dynamic depth. It may be an average of the
                weights, `timm.utils.ModelEmaV3(model).module`, or have been trained before on the same classes; if its
                mean or std is another than the model's, by timm's `resolve_input_data_config`, images are normalized
                anew. It is put into eval mode, stays on its own device, and is no part of what the task trains, moves
                or saves. None lets the full-net in training teach again.

        Raises:
            ValueError: If it is no timm model, has another number of classes or channels, has nothing to teach (`alpha`
                and `beta` are 0), or has not the maps whose attention is to be compared (`beta` is not 0): those of a
                dynamic-depth model, of the same resolutions.
        """
        if teacher is None:
            self._teacher: tuple[nn.Module, ...] = ()
            return
        model = unwrap_model(self.trainable_module)
        if not hasattr(teacher, 'num_classes'):
            raise ValueError(f'teacher must be a model of timm, got {type(teacher).__name__}')
        if teacher.num_classes != model.num_classes:
            raise ValueError(f'teacher must have {model.num_classes} classes, got {teacher.num_classes}')
        if not (self.loss_fn.alpha or self.loss_fn.beta):
            raise ValueError('a teacher needs alpha or beta to be > 0, got 0 for both')
        if self.loss_fn.beta:
            reductions, own_reductions = (
                [stage['reduction'] for stage in net.feature_info] if isinstance(net, DynamicDepthMixin) else
                type(net).__name__ for net in (model, teacher))
            if own_reductions != reductions:
                raise ValueError(
                    'for beta > 0, teacher must be a dynamic-depth model (ddnn_*) whose maps have the reductions '
                    f'{reductions}, got {own_reductions} and beta={self.loss_fn.beta}')
        config, own = map(resolve_input_data_config, (model, teacher))
        channels, own_channels = config['input_size'][0], own['input_size'][0]
        if own_channels != channels:
            raise ValueError(f'teacher must take images of {channels} channels, got {own_channels}')
        weight = next(teacher.parameters())
        mean, std, own_mean, own_std = (
            weight.new_tensor(values).view(1, -1, 1, 1)
            for values in (config['mean'], config['std'], own['mean'], own['std']))
        same = torch.equal(mean, own_mean) and torch.equal(std, own_std)
        self._scale_shift = () if same else (std / own_std, (mean - own_mean) / own_std)
        self._teacher = (teacher.eval(),)  # in a tuple, it is no module of the task

    def run_teacher(self, input: torch.Tensor) -> SubNetOutput | None:
        """Run the net of `set_teacher` without gradient; None if the full-net in training teaches.

        Args:
            input: Images, [B, C, H, W], as the model in training takes them.
        """
        for net in self._teacher:
            with torch.no_grad():
                if self._scale_shift:
                    scale, shift = self._scale_shift
                    input = input * scale + shift
                input = input.to(next(net.parameters()).dtype)
                if isinstance(net, DynamicDepthMixin):
                    full = max(net.depths)
                    return net(input, depth=(full,))[full]
                return SubNetOutput(net(input), [])
        return None

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the depths that are trained, and compute the loss.

        Args:
            input: Images, [B, C, H, W].
            target: Class indices [B] or soft targets [B, num_classes].

        Returns:
            'loss', a scalar with gradient; 'output', the full-net's logits [B, num_classes]; and the terms of
            `EKDLoss.terms` without gradient.
        """
        outputs = self.trainable_module(input, depth=self.depth)
        terms = self.loss_fn.terms(outputs, target, self.run_teacher(input))
        return {
            **{name: term.detach() for name, term in terms.items()},
            'loss': terms['loss'],
            'output': outputs[max(outputs)].logits,
        }

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Parameters for gradient clipping, as timm's method; `exclude_head` leaves out those of the classifier."""
        module = self.get_trainable_module()
        head = unwrap_model(module).get_classifier().parameters() if exclude_head else ()
        excluded = {id(p) for p in head}
        return [p for p in module.parameters() if id(p) not in excluded]
