"""Evaluation of a saved model: every depth on the same images, and cascades of depths."""
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from timm.data import resolve_input_data_config
from torch import nn

from ..cascade import Cascade
from ..data.datasets import ImageData, load_image_data, match_classes
from ..data.loader import loading
from ..models.load import load_model
from ..utils.costs import count_costs
from ..utils.environment import describe_machine, find_device
from ..utils.files import staged_folder, write_json
from .batches import load_batches
from .metrics import class_rows, depth_metrics, evaluate_cascade, split_images
from .mistakes import count_confusions, find_mistakes, plot_confusions, plot_mistakes, write_confusions
from .plots import plot_accuracy, plot_calibration
from .predict import Predictions, autocast, predict
from .speed import measure_speed

__all__ = ['CascadeOptions', 'evaluate_model']


@dataclass(frozen=True)
class CascadeOptions:
    """A cascade to evaluate.

    Attributes:
        depths: Its depths, the shallowest first.
        threshold: Its threshold, [0, 1]. Chosen on a part of the images if None, and the cascade then reported on the
            others; if it is given, on all.
        target_top1: As for `choose_threshold`.
        budget_macs: As for `choose_threshold`.
        holdout: Share of the images that the threshold is chosen on, (0, 1).
        speed_images: Images to measure the speed of the cascade and its nets with, 0 not to.
    """
    depths: tuple[int, ...]
    threshold: float | None = None
    target_top1: float | None = None
    budget_macs: float | None = None
    holdout: float = 0.5
    speed_images: int = 256


@loading()
def evaluate_model(
        name: str,
        data: str,
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        device: str | None = None,
        precision: str = 'no',
        cascade: CascadeOptions | None = None,
        output: str | Path | None = None,
        **data_options: Any,
) -> dict[str, Any]:
    """Evaluate every depth of a model on a validation split, in one pass over it.

    Args:
        name: As for `load_model`.
        data: Data set, as for `load_image_data`.
        batch_size: Images per batch.
        num_workers: Worker processes that load data.
        device: As for `find_device`.
        precision: 'no' or 'bf16'.
        cascade: Cascade to evaluate besides.
        output: Folder to write evaluation.json, the plots evaluation.png (accuracy), calibration.png, confusion.png and
            mistakes.png, and confusion.csv to.
        **data_options: input_key, target_key, val_split and val_fraction of `load_image_data`.

    Returns:
        What `evaluation.json` holds: model, architecture, parameters (of all depths together), data, split, images,
        classes, input_size, device, precision, batch_size; depths: rows with depth, blocks, parameters, macs and what
        `depth_metrics` gives; per_class: as `class_rows`; mistakes: as `find_mistakes`; cascade: as `evaluate_cascade`,
        with speed as `measure_speed` or None, or None; and the machine, as `describe_machine`.

    Raises:
        InputError: If the model, data, device or cascade is not what it must be, or a worker process ends.
        OSError: If a file cannot be read or written.
        UnreachableError: If no threshold fulfils what is asked for.
    """
    with staged_folder(output) if output else nullcontext() as folder:
        device = find_device(device)
        image_data = load_image_data(data, training=False, **data_options)
        model = load_model(name)
        image_data = match_classes(image_data, model)
        model = model.to(device, memory_format=torch.channels_last)
        count = len(image_data.validation)
        parts = _split_for(cascade, count, model) if cascade else None

        console = Console(stderr=True)
        batches = track(
            load_batches(image_data, 'validation', model, batch_size, num_workers=num_workers), 'evaluating',
            total=math.ceil(count / batch_size), console=console, transient=True, disable=not console.is_terminal,
        )
        predictions = predict(model, batches, autocast=partial(autocast, device, precision))
        input_size = resolve_input_data_config(model)['input_size']
        costs = count_costs(model, input_size)
        result = {
            'model': name,
            'architecture': model.pretrained_cfg['architecture'],
            'parameters': sum(p.numel() for p in model.parameters()),
            'data': data,
            'split': image_data.val_split,
            'images': count,
            'classes': len(image_data.class_names),
            'input_size': list(input_size),
            'device': str(device),
            'precision': precision,
            'batch_size': batch_size,
            'depths': [{**cost, **row} for cost, row in zip(costs, depth_metrics(predictions), strict=True)],
            'per_class': class_rows(predictions, image_data.class_names),
            'mistakes': find_mistakes(predictions, image_data, torch.arange(count)),
            'cascade': cascade and _evaluate_cascade(
                cascade, parts, model, image_data, predictions, batch_size, precision),
            **describe_machine(),
        }
        if folder:
            write_json(folder / 'evaluation.json', result)
            title = f'{result["architecture"]}, {count:,} images of {Path(data).resolve().name}'
            plot_accuracy(folder / 'evaluation.png', result['depths'], title, cascade=result['cascade'])
            plot_calibration(folder / 'calibration.png', result['depths'], title)
            confusions = count_confusions(predictions)
            write_confusions(folder / 'confusion.csv', confusions, image_data.class_names)
            plot_confusions(folder / 'confusion.png', confusions, image_data.class_names, title)
            plot_mistakes(
                folder / 'mistakes.png', result['mistakes'], image_data,
                f'{title}\nthe surest mistakes of depth {model.depths[0]}')
    return result


def _split_for(
        options: CascadeOptions,
        num_images: int,
        model: nn.Module,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Check a cascade, and split the images into those that its threshold is chosen on, and those reported on."""
    Cascade(model, options.depths, options.threshold or 0.0)
    if options.threshold is None:
        return split_images(num_images, options.holdout)
    return None, torch.arange(num_images)


def _evaluate_cascade(
        options: CascadeOptions,
        parts: tuple[torch.Tensor | None, torch.Tensor],
        model: nn.Module,
        image_data: ImageData,
        predictions: Predictions,
        batch_size: int,
        precision: str,
) -> dict[str, Any]:
    held_out, reported = (part if part is None else predictions.select(part) for part in parts)
    costs = Cascade(model, options.depths, 0.0).count_macs(resolve_input_data_config(model)['input_size'])
    result = evaluate_cascade(
        costs, reported, held_out, threshold=options.threshold, target_top1=options.target_top1,
        budget_macs=options.budget_macs)
    result['speed'] = None
    if options.speed_images:
        batches = load_batches(
            image_data, 'validation', model, batch_size, rows=_thin_out(parts[1], options.speed_images))
        cascade = Cascade(model, options.depths, result['threshold'])
        result['speed'] = measure_speed(cascade, [images for images, _ in batches], precision=precision)
    return result


def _thin_out(rows: torch.Tensor, most: int) -> list[int]:
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()].tolist()
