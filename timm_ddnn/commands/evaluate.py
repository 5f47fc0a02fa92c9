"""`timm-ddnn evaluate`: every depth on the same images, and cascades of depths."""
import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from timm.data import create_transform, resolve_input_data_config

from ..analysis import (
    class_rows,
    depth_metrics,
    evaluate_cascade,
    plot_evaluation,
    predict,
    split_images,
)
from ..cascade import Cascade, UnreachableError, measure_speed
from ..cli import integers, load_model, number, staged_folder
from ..data import load_image_data, match_classes, quiet_datasets
from ..images import Images, create_loader
from ..model_card import cost_cells
from ..report import count_costs, describe_machine, write_json

HELP = 'Evaluate every depth on the same images: accuracy, calibration, agreement; and cascades of depths.'
EXAMPLES = """  timm-ddnn evaluate output/ddnn_resnet50-food --data FOLDER --per-class
  timm-ddnn evaluate output/ddnn_resnet50-food --data FOLDER --cascade 14,26,50 --threshold auto --output evaluation
  timm-ddnn evaluate hf-hub:OWNER/NAME --data FOLDER --cascade 14,50 --budget-macs 2e9 --json"""


def parse_threshold(text: str) -> float | None:
    """Parse a threshold, None for 'auto'.

    Raises:
        ArgumentTypeError: If the text is neither 'auto' nor a number from 0 to 1.
    """
    try:
        return None if text == 'auto' else number(float, 0, 1)(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(str(e).replace('must be', "must be 'auto' or")) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    arg, count = parser.add_argument, number(int, 1)
    arg('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    arg('--data', metavar='PATH', required=True, help="folder of a data set, 'digits' or an id on the Hub")
    arg('--input-key', help='image column, found if not given')
    arg('--target-key', help='label column, found if not given')
    arg('--val-split', help="the first of 'validation', 'val', 'valid' and 'test' if not given")
    arg('-b', '--batch-size', type=count, default=64, help='images per batch')
    arg('-j', '--workers', type=number(int, 0), default=2, help='processes that load data')
    arg('--device', help="'cpu', 'cuda', ...: the GPU if there is one, else the CPU, if not given")
    arg('--precision', choices=('no', 'bf16'), default='no', help='bf16 for autocast to bfloat16')
    arg('--per-class', action='store_true', help='top-1 of every class')
    arg('--output', type=Path, help='folder for evaluation.json and evaluation.png')
    arg = parser.add_argument_group('cascade').add_argument
    arg('--cascade', type=integers("depths such as '14,26,50'"), metavar='DEPTHS',
        help='depths to run where the one before is unsure: 14,26,50')
    arg('--threshold', type=parse_threshold, metavar='auto|P', default='auto',
        help='an image goes on to the next depth where the greatest probability is not above it')
    arg('--target-top1', type=number(float, 0, 100), metavar='PERCENT',
        help="choose the threshold of fewest MACs with this top-1 accuracy, the last depth's if not given")
    arg('--budget-macs', type=number(float, 1), metavar='MACS',
        help='choose the threshold of best accuracy within these mean MACs per image, such as 2e9')
    arg('--holdout', type=number(float, 0, 1), default=0.5, metavar='SHARE',
        help='share of the images that the threshold is chosen on; the cascade is reported on the others')
    arg('--speed-images', type=number(int, 0), default=256, metavar='N', help='images to time, 0 for none')


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
        device = _find_device(device)
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


def _find_device(name: str | None) -> torch.device:
    found = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return found or torch.device('cpu')
    try:
        device = torch.device(name)
        if device.type not in {'cpu', found.type if found else 'cpu'}:
            raise RuntimeError(f'this machine has no {device.type}')
        torch.empty(0, device=device)
    except RuntimeError as e:
        known = 'cpu' if not found else f'cpu or {found.type}'
        raise ValueError(f'device must be {known} here, got {name!r}: {str(e).splitlines()[0]}') from None
    return device


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, and print tables."""
    quiet_datasets()
    try:
        result = evaluate_model(
            args.model, args.data, input_key=args.input_key, target_key=args.target_key, val_split=args.val_split,
            batch_size=args.batch_size, num_workers=args.workers, device=args.device, precision=args.precision,
            per_class=args.per_class, cascade=args.cascade, threshold=args.threshold, target_top1=args.target_top1,
            budget_macs=args.budget_macs, holdout=args.holdout, speed_images=args.speed_images, output=args.output,
        )
    except UnreachableError as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(3)
    if not args.json:
        console = Console()
        _print_depths(console, result)
        if result['per_class']:
            _print_classes(console, result)
        if result['cascade']:
            _print_cascade(console, result['cascade'])
        if args.output:
            _print_line(console, f'{args.output}: evaluation.json evaluation.png')
    return result


def _print_depths(console: Console, result: Mapping[str, Any]) -> None:
    table = Table(
        title=f'{result["images"]:,} images',
        caption=f'all depths in one model: {result["parameters"] / 1e6:.3f} M parameters\n'
                "in %; ECE: calibration error; agree: same class as the full-net's",
    )
    for column in ('depth', 'blocks', 'params (M)', 'MACs (M)', 'top-1', 'top-5', 'ECE', 'agree'):
        table.add_column(column, justify='right')
    for row in result['depths']:
        table.add_row(*cost_cells(row), *(f'{row[name]:.2f}' for name in ('top1', 'top5', 'ece', 'agreement')))
    console.print(table)


def _print_classes(console: Console, result: Mapping[str, Any]) -> None:
    depths = [row['depth'] for row in result['depths']]
    table = Table(title='top-1 by class (%)')
    table.add_column('class', overflow='fold')
    for column in ('images', *(f'depth {depth}' for depth in depths)):
        table.add_column(column, justify='right')
    for row in result['per_class']:
        values = (row[f'top1_{depth}'] for depth in depths)
        table.add_row(Text(row['class']), str(row['images']), *('' if v is None else f'{v:.2f}' for v in values))
    console.print(table)


def _print_cascade(console: Console, cascade: Mapping[str, Any]) -> None:
    speed = cascade['speed']
    table = Table(
        title=f'cascade, threshold {cascade["threshold"]:.4f}, {cascade["images"]:,} images',
        caption='ends: percent of the images; step: MACs without what is reused',
    )
    for column in ('net', 'ends', 'MACs (M)', 'step (M)', 'top-1', 'images/s', 'middle half'):
        table.add_column(column, justify='left' if column == 'net' else 'right')
    for i, step in enumerate(cascade['steps']):
        table.add_row(
            f'depth {step["depth"]}', f'{step["ends"]:.2f}', f'{step["macs_alone"] / 1e6:.1f}',
            f'{step["macs"] / 1e6:.1f}', f'{step["top1_alone"]:.2f}', *_format_speed(speed and speed['depths'][i]),
            end_section=i + 1 == len(cascade['steps']),
        )
    table.add_row(
        'cascade', '', '', f'mean {cascade["macs"] / 1e6:.1f}', f'{cascade["top1"]:.2f}',
        *_format_speed(speed and speed['cascade']),
    )
    console.print(table)
    alone = {step['depth']: step['macs_alone'] for step in cascade['steps']}
    for step in cascade['steps'][1:]:
        share = step['reused'] / alone[step['source']]
        blocks = f'{step["shared_blocks"]} block{"s" if step["shared_blocks"] > 1 else ""}'
        _print_line(console, f'depth {step["depth"]} reuses {100 * share:.1f} % of the MACs of depth {step["source"]}: '
                            f'the stem and {blocks}')
    chosen = cascade['chosen']
    if chosen:
        _print_line(console, f'threshold chosen on {chosen["images"]:,} other images, where top-1 is '
                             f'{chosen["top1"]:.2f} % and mean MACs are {chosen["macs"] / 1e6:.1f} M')
    if cascade['beaten_by']:
        _print_line(
            console, f'depth {cascade["beaten_by"]} alone is as accurate on these images and takes no more MACs')
    if speed:
        threads = f', {speed["threads"]} thread{"s"[:speed["threads"] != 1]}' if speed['device'] == 'cpu' else ''
        _print_line(console, f'speed of {speed["images"]} images, {speed["batch_size"]} at once, on {speed["device"]}'
                            f'{threads}: medians of {speed["rounds"]} rounds')


def _print_line(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _format_speed(speed: Mapping[str, float] | None) -> tuple[str, ...]:
    return (f'{speed["median"]:.0f}', f'{speed["low"]:.0f} to {speed["high"]:.0f}') if speed else ()
