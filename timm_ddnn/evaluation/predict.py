"""The one pass of all depths over images; what is computed from it is in `metrics.py`."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..cascade import confidence
from ..utils.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Predictions', 'autocast', 'collect_logits', 'evaluate', 'predict']


class Predictions(NamedTuple):
    """What D depths say of N images.

    Attributes:
        depths: The depths, the full-net's first.
        target: Labels, [N].
        classes: Classes with the greatest logits, [D, N].
        confidences: Probabilities of these classes, calibrated if the model has temperatures, [D, N], float32.
        uncalibrated: The same at a temperature of 1.
        top5: Whether the label is among the best five (best k if there are k < 5 classes), [D, N].
    """
    depths: tuple[int, ...]
    target: torch.Tensor
    classes: torch.Tensor
    confidences: torch.Tensor
    uncalibrated: torch.Tensor
    top5: torch.Tensor

    @property
    def correct(self) -> torch.Tensor:
        """Whether the classes are the labels, [D, N]."""
        return self.classes == self.target

    def select(self, images: torch.Tensor, depths: Sequence[int] | None = None) -> 'Predictions':
        """Select images by their indices, and depths in an order of one's own, all of them if None."""
        depths = self.depths if depths is None else tuple(depths)
        rows = torch.tensor([self.depths.index(depth) for depth in depths])[:, None]
        return Predictions(
            depths, self.target[images], *(values[rows, images] for values in (
                self.classes, self.confidences, self.uncalibrated, self.top5)))


@torch.inference_mode()
def predict(
        model: nn.Module,
        batches: Iterable[Any],
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        gather: Callable[[list[torch.Tensor]], list[torch.Tensor]] = list,
) -> Predictions:
    """Run all depths on images, each batch once for all of them.

    Args:
        model: Dynamic-depth model. It is left in eval mode.
        batches: Images [B, C, H, W] and labels [B].
        autocast: Makes the context in which the model runs, as `Accelerator.autocast`.
        gather: Collects from all processes tensors whose first dimension is that of the images, as
            `Accelerator.gather_for_metrics`.

    Returns:
        The predictions for the images of all processes, on the CPU.

    Raises:
        InputError: If the model gives logits that are not finite.
    """
    temperatures = torch.tensor([model.temperature(depth) for depth in model.depths])[:, None]             # [D, 1]
    parts = []
    for logits, target in _run(model, batches, autocast):
        best = logits.topk(min(5, logits.shape[-1])).indices
        calibrated = confidence(logits / temperatures.to(logits.device))
        sure = confidence(logits).where(logits.isfinite().all(-1), torch.nan)
        parts.append(gather([target, logits.argmax(-1), calibrated, sure, (best == target[:, None, None]).any(-1)]))
    # moved at the end: a copy waits for all the work that was queued on the device
    target, *values = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    classes, confidences, uncalibrated, top5 = (value.T.contiguous() for value in values)
    _check_finite(model.depths, uncalibrated)
    return Predictions(model.depths, target, classes, confidences, uncalibrated, top5)


@torch.inference_mode()
def collect_logits(
        model: nn.Module,
        batches: Iterable[Any],
        *,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run all depths on images, each batch once for all of them.

    Args:
        model: Dynamic-depth model. It is left in eval mode.
        batches: Images [B, C, H, W] and labels [B].
        autocast: As for `predict`.

    Returns:
        Logits [D, N, classes], float32, and labels [N], on the CPU.

    Raises:
        InputError: If the model gives logits that are not finite.
    """
    parts = [(logits.cpu(), target.cpu()) for logits, target in _run(model, batches, autocast)]
    logits, target = (torch.cat(part) for part in zip(*parts, strict=True))
    logits = logits.transpose(0, 1)
    _check_finite(model.depths, logits)
    return logits, target


def _run(
        model: nn.Module,
        batches: Iterable[Any],
        autocast: Callable[[], AbstractContextManager],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give the logits of all depths, [B, D, classes] in float32, and the labels [B], on the device of the model."""
    model.eval()
    device = next(model.parameters()).device
    for images, target in batches:
        with autocast():
            outputs = model(images.to(device, non_blocking=True), depth='all')
        yield (
            torch.stack([output.logits.float() for output in outputs.values()], dim=1),
            target.to(device, non_blocking=True),
        )


def _check_finite(depths: Sequence[int], values: torch.Tensor) -> None:
    for depth, own in zip(depths, values, strict=True):
        if not own.isfinite().all():
            raise InputError(f'the model gives logits at depth {depth} that are not finite')


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Run in float32 for a precision of 'no', in bfloat16 where that is safe for 'bf16'."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == 'bf16')


def evaluate(accelerator: 'Accelerator', model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Measure the accuracy of every depth over all processes, each image counting once.

    Args:
        accelerator: Accelerator of the run.
        model: Dynamic-depth model on the accelerator's device, not wrapped. It is left in eval mode.
        loader: Batches of images [B, C, H, W] and labels [B], prepared by the accelerator.

    Returns:
        'top1_<depth>' and 'top5_<depth>' in percent, the latter for the best k if there are k < 5 classes.

    Raises:
        InputError: If the model gives logits that are not finite; in all processes.
    """
    predictions = predict(model, loader, autocast=accelerator.autocast, gather=accelerator.gather_for_metrics)
    return {
        f'{name}_{depth}': percent(hits)
        for name, values in (('top1', predictions.correct), ('top5', predictions.top5))
        for depth, hits in zip(predictions.depths, values, strict=True)
    }


def percent(values: torch.Tensor) -> float:
    """Compute the share of images that something is true of, [N], in percent."""
    return round(100 * float(values.double().mean()), 4)
