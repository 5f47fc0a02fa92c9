"""Embedded knowledge distillation as a task of timm's training scripts; the maths is in `loss.py`."""
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from .loss import EKDLoss
from .models.dynamic_depth import DynamicDepthMixin
from .teacher import Teacher
from .utils.errors import InputError

__all__ = ['EKDTask']


_logger = logging.getLogger(__name__)


class EKDTask(ClassificationTask):
    """Trains all depths of a dynamic-depth model in every step, the full-net teaching the others.

    Modifications against timm's `ClassificationTask`:
        * one forward of all depths, or of those asked for, and `EKDLoss` around the criterion
        * every term of the loss in the returned dict
        * `ekd_options`, the arguments of `EKDLoss`
        * `set_teacher`, for a net that teaches in the place of the full-net
        * clipping without the head leaves out the classifiers, not the last parameters: they may be a sub-net's

    Attributes:
        teacher: `Teacher` in the place of the full-net, or None.
    """

    teacher: Teacher | None = None

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
            InputError: If it is not a dynamic-depth model or has no classifier, stages or weights are for what the
                model has not, or an option is out of its range.
        """
        ddnn = unwrap_model(model)
        if not isinstance(ddnn, DynamicDepthMixin):  # classes of timm have an attribute `depths`, too
            raise InputError(f'EKDTask trains dynamic-depth models (ddnn_*), got {type(ddnn).__name__}')
        if not ddnn.num_classes:
            raise InputError('EKDTask needs a classifier, num_classes of at least 1, got 0')
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.loss_fn = EKDLoss(criterion=self.criterion, **ekd_options)
        stages = len(ddnn.blocks(None))
        if any(not -stages <= stage < stages for stage in self.loss_fn.stages or ()):
            raise InputError(f'stages must be from {-stages} to {stages - 1}, got {list(self.loss_fn.stages)}')
        unknown = sorted(set(self.loss_fn.weights) - set(ddnn.depths[1:]))
        if unknown:
            raise InputError(f'weights must be for sub-nets of {ddnn.depths[1:]}, got {unknown}')
        if verbose:
            _logger.info(f'{type(self).__name__}: depths={ddnn.depths}, {self.loss_fn.extra_repr()}')

    def set_teacher(self, model: nn.Module | None) -> None:
        """Let another net teach all depths, the full-net too, in the place of the full-net in training.

        Args:
            model: The net, see `Teacher`; None lets the full-net in training teach again.

        Raises:
            InputError: If the net cannot teach the model in training.
        """
        student = unwrap_model(self.trainable_module)
        self.teacher = None if model is None else Teacher(model, student, self.loss_fn)

    def forward(
            self,
            input: torch.Tensor,
            target: torch.Tensor,
            depth: str | Sequence[int] = 'all',
    ) -> dict[str, torch.Tensor]:
        """Run the depths to be trained, and compute the loss.

        Args:
            input: Images, [B, C, H, W].
            target: Class indices [B] or soft targets [B, num_classes].
            depth: Depths to train, 'all' or a sequence; the deepest teaches the others unless there is a `teacher`.

        Returns:
            'loss', a scalar with gradient; 'output', the logits of the deepest, [B, num_classes]; and the terms of
            `EKDLoss.terms` without gradient.

        Raises:
            InputError: If the model has no such depth, or one depth is given as such.
        """
        outputs = self.trainable_module(input, depth=depth)
        terms = self.loss_fn.terms(outputs, target, self.teacher and self.teacher(input))
        return {
            **{name: term.detach() for name, term in terms.items()},
            'loss': terms['loss'],
            'output': outputs[max(outputs)].logits,
        }

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Parameters for gradient clipping, as timm's method; `exclude_head` leaves out those of classifiers."""
        module = self.get_trainable_module()
        heads = unwrap_model(module).get_classifiers() if exclude_head else ()
        excluded = {id(p) for head in heads for p in head.parameters()}
        return [p for p in module.parameters() if id(p) not in excluded]
