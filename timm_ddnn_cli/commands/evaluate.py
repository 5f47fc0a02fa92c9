"""`timm-ddnn evaluate`: every depth on the same images, and cascades of depths."""
import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from timm_ddnn.data.datasets import quiet_datasets
from timm_ddnn.evaluation.evaluate import evaluate_model
from timm_ddnn.evaluation.thresholds import UnreachableError
from timm_ddnn.hub.model_card import cost_cells

from ..arguments import integers, number

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
