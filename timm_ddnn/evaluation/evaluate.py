"""Evaluation of a saved model: every depth on the same images, and cascades of depths."""
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_input_data_config
from torch import nn

from ..cascade import Cascade
from ..data.datasets import ImageData, load_image_data, match_classes
from ..data.loader import loading
from ..models.load import add_temperatures, find_config, load_model, save_temperatures
from ..utils.costs import count_costs
from ..utils.environment import describe_machine, find_device
from ..utils.files import staged_folder, write_json
from .batches import load_batches
from .metrics import class_rows, depth_metrics, evaluate_cascade, split_images
from .mistakes import count_confusions, find_mistakes, plot_confusions, plot_mistakes, write_confusions
from .plots import plot_accuracy, plot_calibration
from .predict import Predictions, autocast, collect_logits, predict
from .speed import measure_speed
from .temperature import MOST_IMAGES, fit_temperature

__all__ = ['CascadeOptions', 'evaluate_model']


@dataclass(frozen=True)
class CascadeOptions:
    """A cascade to evaluate.

    Attributes:
        depths: Its depths, the shallowest first.
        threshold: Its threshold, [0, 1]; chosen on held-out images, and the cascade reported on the others, if None.
        target_top1: As for `choose_threshold`.
        budget_macs: As for `choose_threshold`.
        speed_images: Images to measure the speed of the cascade and its nets with, 0 not to.
    """
    depths: tuple[int, ...]
    threshold: float | None = None
    target_top1: float | None = None
    budget_macs: float | None = None
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
        calibrate_confidence: bool = False,
        holdout: float = 0.5,
        output: str | Path | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
        **data_options: Any,
) -> dict[str, Any]:
    """Evaluate every depth of a model on a validation split, in one pass over it.

    The threshold of a cascade is chosen, and temperatures are fitted, on held-out images: a random part, and always the
    same. The cascade, and with temperatures everything, is then reported on the other images.

    Args:
        name: As for `load_model`.
        data: Data set, as for `load_image_data`.
        batch_size: Images per batch.
        num_workers: Worker processes that load data.
        device: As for `find_device`.
        precision: 'no' or 'bf16'.
        cascade: Cascade to evaluate besides.
        calibrate_confidence: Whether to fit a temperature per depth, to at most 5,000 of the held-out images, and store
            it in the config.json of the model.
        holdout: Share of the images to hold out, (0, 1).
        output: Folder to write evaluation.json, the plots evaluation.png (accuracy), calibration.png, confusion.png and
            mistakes.png, and confusion.csv to.
        progress: As for `load_batches`.
        **data_options: input_key, target_key, val_split and val_fraction of `load_image_data`.

    Returns:
        What `evaluation.json` holds: model, architecture, parameters (of all depths together), data, split, images,
        classes, input_size, device, precision, batch_size; temperature_images: images that temperatures were fitted
        to, None if none were; depths: rows with depth, blocks, parameters, macs, temperature and what `depth_metrics`
        gives; per_class: as `class_rows`; mistakes: as `find_mistakes`; cascade: as `evaluate_cascade`, with speed as
        `measure_speed` or None, or None; and the machine, as `describe_machine`.

    Raises:
        InputError: If the model, data, device or cascade is not what it must be, a temperature cannot be fitted or
            stored, or a worker process ends.
        OSError: If a file cannot be read or written.
        UnreachableError: If no threshold fulfils what is asked for.
    """
    with staged_folder(output) if output else nullcontext() as folder:
        device = find_device(device)
        image_data = load_image_data(data, training=False, **data_options)
        config = find_config(name) if calibrate_confidence else None
        content = config and config.read_bytes()
        model = load_model(name)
        image_data = match_classes(image_data, model)
        model = model.to(device, memory_format=torch.channels_last)
        if cascade:
            Cascade(model, cascade.depths, cascade.threshold or 0.0)  # checks it
        every = torch.arange(len(image_data.validation))
        held_out, reported = None, every
        if calibrate_confidence or (cascade and cascade.threshold is None):
            held_out, reported = split_images(len(every), holdout)

        def load(rows: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            return load_batches(
                image_data, 'validation', model, batch_size, rows=rows.tolist(), num_workers=num_workers,
                progress=progress)

        run = dict(autocast=partial(autocast, device, precision))
        rows, fitting, temperatures = every, None, {}
        if calibrate_confidence:
            rows, fitting = reported, held_out[:MOST_IMAGES]
            logits, target = collect_logits(model, load(fitting), **run)
            temperatures = {d: fit_temperature(z, target) for d, z in zip(model.depths, logits, strict=True)}
            model.saved_results = add_temperatures(model.saved_results, temperatures)
        predictions = predict(model, load(every), **run)
        measured = predictions.select(rows)
        input_size = resolve_input_data_config(model)['input_size']
        costs = count_costs(model, input_size)
        result = {
            'model': name,
            'architecture': model.pretrained_cfg['architecture'],
            'parameters': sum(p.numel() for p in model.parameters()),
            'data': data,
            'split': image_data.val_split,
            'images': len(rows),
            'classes': len(image_data.class_names),
            'input_size': list(input_size),
            'device': str(device),
            'precision': precision,
            'batch_size': batch_size,
            'temperature_images': None if fitting is None else len(fitting),
            'depths': [
                {**cost, 'temperature': model.temperature(cost['depth']), **row}
                for cost, row in zip(costs, depth_metrics(measured), strict=True)],
            'per_class': class_rows(measured, image_data.class_names),
            'mistakes': find_mistakes(measured, image_data, rows),
            'cascade': cascade and _evaluate_cascade(
                cascade, held_out, reported, model, image_data, predictions, batch_size, precision),
            **describe_machine(),
        }
        if folder:
            _write_files(folder, result, measured, image_data)
        if calibrate_confidence:
            save_temperatures(config, temperatures, content)
    return result


def _evaluate_cascade(
        options: CascadeOptions,
        held_out: torch.Tensor | None,
        reported: torch.Tensor,
        model: nn.Module,
        image_data: ImageData,
        predictions: Predictions,
        batch_size: int,
        precision: str,
) -> dict[str, Any]:
    costs = Cascade(model, options.depths, 0.0).count_macs(resolve_input_data_config(model)['input_size'])
    result = evaluate_cascade(
        costs, predictions.select(reported), None if held_out is None else predictions.select(held_out),
        threshold=options.threshold, target_top1=options.target_top1, budget_macs=options.budget_macs)
    result['speed'] = None
    if options.speed_images:
        batches = load_batches(
            image_data, 'validation', model, batch_size, rows=_thin_out(reported, options.speed_images))
        cascade = Cascade(model, options.depths, result['threshold'])
        result['speed'] = measure_speed(cascade, [images for images, _ in batches], precision=precision)
    return result


def _write_files(folder: Path, result: Mapping[str, Any], predictions: Predictions, image_data: ImageData) -> None:
    write_json(folder / 'evaluation.json', result)
    title = f'{result["architecture"]}, {result["images"]:,} images of {Path(result["data"]).resolve().name}'
    plot_accuracy(folder / 'evaluation.png', result['depths'], title, cascade=result['cascade'])
    plot_calibration(folder / 'calibration.png', result['depths'], title)
    confusions, names = count_confusions(predictions), image_data.class_names
    write_confusions(folder / 'confusion.csv', confusions, names)
    plot_confusions(folder / 'confusion.png', confusions, names, title)
    title += f'\nthe most confident mistakes of depth {predictions.depths[0]}'
    plot_mistakes(folder / 'mistakes.png', result['mistakes'], image_data, title)


def _thin_out(rows: torch.Tensor, most: int) -> list[int]:
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows))).long()].tolist()
