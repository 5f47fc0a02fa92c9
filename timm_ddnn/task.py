"""Embedded knowledge distillation as a task of timm's training scripts; the maths is in `loss.py`."""
from collections.abc import Callable
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn

from .loss import EKDLoss

__all__ = ['EKDTask']


class EKDTask(ClassificationTask):
    """Trains all depths of a dynamic-depth model in every step, the full-net teaching the others.

    Modifications against timm's `ClassificationTask`:
        * one forward with `depth='all'`, and `EKDLoss` around the criterion
        * every term of the loss in the returned dict
        * `ekd_options`, the arguments of `EKDLoss`
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
            ValueError: If the model has no depths, weights name a depth that the model has not as a sub-net, or an
                option is out of its range.
        """
        depths = getattr(unwrap_model(model), 'depths', None)
        if depths is None:
            raise ValueError(f'EKDTask trains dynamic-depth models (ddnn_*), got {type(unwrap_model(model)).__name__}')
        unknown = set(ekd_options.get('weights') or {}) - set(depths[1:])
        if unknown:
            raise ValueError(f'weights must be for sub-nets of {depths[1:]}, got {sorted(unknown)}')
        super().__init__(
            model, criterion, criterion_kwargs=criterion_kwargs, device=device, dtype=dtype, verbose=verbose)
        self.loss_fn = EKDLoss(criterion=self.criterion, **ekd_options)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run all depths and compute the loss.

        Args:
            input: Images, [B, C, H, W].
            target: Class indices [B] or soft targets [B, num_classes].

        Returns:
            'loss', a scalar with gradient; 'output', the full-net's logits [B, num_classes]; and the terms of
            `EKDLoss.terms` without gradient.
        """
        outputs = self.trainable_module(input, depth='all')
        terms = self.loss_fn.terms(outputs, target)
        return {
            **{name: term.detach() for name, term in terms.items()},
            'loss': terms['loss'],
            'output': outputs[max(outputs)].logits,
        }
