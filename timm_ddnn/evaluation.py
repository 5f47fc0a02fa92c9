"""Accuracy of every depth of a model, over all processes of a run."""
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

__all__ = ['evaluate']


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
