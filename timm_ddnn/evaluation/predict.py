"""One pass of all depths over images; what is computed from it is in `metrics.py`."""
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from ..cascade import confidence

__all__ = ['Predictions', 'autocast', 'evaluate', 'predict']


class Predictions(NamedTuple):
    """What D depths say of N images.

    Attributes:
        depths: The depths, the full-net's first.
        target: Labels, [N].
        classes: Classes with the greatest logits, [D, N].
        confidences: Probabilities of these classes, [D, N], float32.
        top5: Whether the label is among the best five (best k if there are k < 5 classes), [D, N].
    """
    depths: tuple[int, ...]
    target: torch.Tensor
    classes: torch.Tensor
    confidences: torch.Tensor
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
            depths, self.target[images], self.classes[rows, images], self.confidences[rows, images],
            self.top5[rows, images],
        )


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[Any], precision: str = 'no') -> Predictions:
    """Run all depths on images, each batch once for all of them.

    Args:
        model: Dynamic-depth model. It is left in eval mode.
        batches: Images [B, C, H, W] and labels [B].
        precision: 'no' or 'bf16', as in accelerate.

    Returns:
        The predictions, on the CPU.

    Raises:
        ValueError: If logits are not finite.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = []
    for images, target in batches:
        with autocast(device, precision):
            outputs = model(images.to(device, non_blocking=True), depth='all')
        target, found = target.to(device), []
        for depth, output in outputs.items():
            logits = output.logits.float()
            if not logits.isfinite().all():
                raise ValueError(f'the model gives logits at depth {depth} that are not finite')
            best = logits.topk(min(5, logits.shape[-1])).indices
            found.append((logits.argmax(-1), confidence(logits), (best == target[:, None]).any(-1)))
        parts.append([target.cpu(), *(torch.stack(values).cpu() for values in zip(*found, strict=True))])
    target, *values = zip(*parts, strict=True)
    return Predictions(model.depths, torch.cat(target), *(torch.cat(value, dim=1) for value in values))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Run in float32 for a precision of 'no', in bfloat16 where that is safe for 'bf16'."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == 'bf16')


@torch.inference_mode()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Measure the accuracy of every depth, each batch running once for all depths and each image counting once.

    Args:
        accelerator: Accelerator of the run.
        model: Dynamic-depth model on the accelerator's device, not wrapped. It is left in eval mode.
        loader: Batches of images [B, C, H, W] and labels [B], prepared by the accelerator.

    Returns:
        'top1_<depth>' and 'top5_<depth>' in percent, the latter for the best k if there are k < 5 classes.
    """
    model.eval()
    classes = model.num_classes
    accuracies = {
        f'top{k}_{depth}': MulticlassAccuracy(
            classes, top_k=min(k, classes), average='micro', validate_args=False, sync_on_compute=False,
        ).to(accelerator.device)
        for k in (1, 5) for depth in model.depths
    }
    for images, target in loader:
        with accelerator.autocast():
            outputs = model(images, depth='all')
        logits = [output.logits.float() for output in outputs.values()]
        *logits, target = accelerator.gather_for_metrics([*logits, target])
        for depth, z in zip(outputs, logits, strict=True):
            accuracies[f'top1_{depth}'].update(z, target)
            accuracies[f'top5_{depth}'].update(z, target)
    return {name: round(100 * float(accuracy.compute()), 4) for name, accuracy in accuracies.items()}
