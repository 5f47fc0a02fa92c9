"""Evaluation of a saved model: every depth on the same images, and cascades of depths."""
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from timm.data import create_transform, resolve_input_data_config

from ..cascade import Cascade
from ..data.datasets import load_image_data, match_classes
from ..data.images import Images
from ..data.loader import create_loader
from ..deploy.speed import measure_speed
from ..models.load import load_model
from ..utils.costs import count_costs
from ..utils.environment import find_device, describe_machine
from ..utils.files import staged_folder, write_json
from .metrics import class_rows, depth_metrics, evaluate_cascade, split_images
from .plots import plot_evaluation
from .predict import predict

__all__ = ['evaluate_model']


def evaluate_model(
        name: str,
        data: str,
        *,
        input_key: str | None = None,
        target_key: str | None = None,
        val_split: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        device: str | None = None,
        precision: str = 'no',
        per_class: bool = False,
        cascade: Sequence[int] | None = None,
        threshold: float | None = None,
        target_top1: float | None = None,
        budget_macs: float | None = None,
        holdout: float = 0.5,
        speed_images: int = 256,
        output: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate every depth of a model on a validation split, in one pass over it.

    Args:
        name: As for `cli.load_model`.
        data: Data set, as for `load_image_data`.
        input_key: Name of the image column, found if None.
        target_key: Name of the label column, found if None.
        val_split: Name of the split; the first of 'validation', 'val', 'valid' and 'test' if None.
        batch_size: Images per batch.
        num_workers: Worker processes that load data.
        device: The accelerator if there is one, else the CPU, if None.
        precision: 'no' or 'bf16'.
        per_class: Whether the accuracy of every class is wanted.
        cascade: Depths of a cascade, the shallowest first.
        threshold: Threshold of the cascade, [0, 1]. Chosen on a part of the images if None, and the cascade then
            reported on the others; if it is given, on all.
        target_top1: As for `cascade.choose_threshold`.
        budget_macs: As for `cascade.choose_threshold`.
        holdout: Share of the images that the threshold is chosen on, (0, 1).
        speed_images: Images to measure the speed of the cascade and its nets with, 0 not to.
        output: Folder to write evaluation.json and evaluation.png to.

    Returns:
        What `evaluation.json` holds: model, architecture, parameters (of all depths together), data, split, images,
        classes, input_size, device, precision, batch_size; depths: rows with depth, blocks, parameters, macs and what
        `analysis.depth_metrics` gives; per_class: as `analysis.class_rows` or None; cascade: as
        `analysis.evaluate_cascade`, with speed as `cascade.measure_speed` or None, or None; and the machine, as
        `report.describe_machine`.

    Raises:
        ValueError: If the model, data, device or cascade is not what it must be.
        OSError: If a file cannot be read or written.
        UnreachableError: If no threshold fulfils what is asked for.
    """
    wishes = {'threshold': threshold, 'target_top1': target_top1, 'budget_macs': budget_macs}
    given = {name: value for name, value in wishes.items() if value is not None}
    if (given and cascade is None) or len(given) > 1:
        raise ValueError(f'at most one of {", ".join(wishes)} is expected, and only for a cascade, got {given}')
    with staged_folder(output) if output else nullcontext() as folder:
        device = find_device(device)
        image_data = load_image_data(
            data, input_key=input_key, target_key=target_key, val_split=val_split, training=False)
        model = load_model(name)
        image_data = match_classes(image_data, model)
        model = model.to(device, memory_format=torch.channels_last)
        data_config = resolve_input_data_config(model)
        input_size = data_config['input_size']
        costs = count_costs(model, input_size)
        images = Images(image_data, 'validation', create_transform(**data_config), in_chans=input_size[0], seed=None)
        if cascade is not None:
            step_costs = Cascade(model, cascade, threshold or 0.0).count_macs(input_size)
            parts = split_images(len(images), holdout) if threshold is None else (None, torch.arange(len(images)))

        loader = create_loader(images, batch_size, training=False, num_workers=num_workers)
        console = Console(stderr=True)
        predictions = predict(
            model, track(loader, 'evaluating', console=console, transient=True, disable=not console.is_terminal),
            precision,
        )
        result = {
            'model': name,
            'architecture': model.pretrained_cfg['architecture'],
            'parameters': sum(p.numel() for p in model.parameters()),
            'data': data,
            'split': str(image_data.validation.split),
            'images': len(images),
            'classes': len(image_data.class_names),
            'input_size': list(input_size),
            'device': str(device),
            'precision': precision,
            'batch_size': batch_size,
            'depths': [{**cost, **row} for cost, row in zip(costs, depth_metrics(predictions), strict=True)],
            'per_class': class_rows(predictions, image_data.class_names) if per_class else None,
            'cascade': None,
        }
        if cascade is not None:
            held_out, reported = (part if part is None else predictions.select(part) for part in parts)
            result['cascade'] = section = evaluate_cascade(step_costs, reported, held_out, **wishes)
            section['speed'] = None
            if speed_images:
                chosen = parts[1][torch.linspace(0, len(parts[1]) - 1, min(speed_images, len(parts[1]))).long()]
                batches = [
                    torch.stack([images[0, row][0] for row in rows.tolist()]).to(device)
                    for rows in chosen.split(batch_size)
                ]
                section['speed'] = measure_speed(
                    Cascade(model, cascade, section['threshold']), batches, precision=precision)
        result |= describe_machine()
        if folder:
            write_json(folder / 'evaluation.json', result)
            title = f'{result["architecture"]}, {result["images"]:,} images of {Path(data).resolve().name}'
            plot_evaluation(folder / 'evaluation.png', result, title)
    return result
