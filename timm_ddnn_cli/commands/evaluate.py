"""`timm-ddnn evaluate`: every depth on the same images, and cascades of depths."""
import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arguments import fail, number, parse_workers

HELP = 'Evaluate every depth on the same images: accuracy, calibration, agreement; and cascades of depths.'
EXAMPLES = """  timm-ddnn evaluate output/ddnn_resnet50-food --data FOLDER --per-class
  timm-ddnn evaluate output/ddnn_resnet50-food --data FOLDER --cascade 14 26 50 --threshold auto --output evaluation
  timm-ddnn evaluate output/ddnn_resnet50-food --data FOLDER --calibrate-confidence
  timm-ddnn evaluate hf-hub:OWNER/NAME --data FOLDER --cascade 14 50 --budget-macs 2e9 --json"""


AUTO = 'auto'
FILES = (
    'evaluation.json', 'evaluation.png', 'calibration.png', 'confusion.csv', 'confusion.png', 'mistakes.png')


def parse_threshold(text: str) -> float | str:
    """Parse a threshold or 'auto'.

    Raises:
        ArgumentTypeError: If the text is neither 'auto' nor a number from 0 to 1.
    """
    try:
        return AUTO if text == AUTO else number(float, 0, 1)(text)
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
    arg('--val-fraction', type=number(float, 0, 1), metavar='SHARE',
        help='the images that train --val-fraction SHARE did not train on')
    arg('-b', '--batch-size', type=count, default=64, help='images per batch')
    arg('-j', '--workers', type=parse_workers, default=2, help='processes that load data')
    arg('--device', help="'cpu', 'cuda', ...: the GPU if there is one, else the CPU, if not given")
    arg('--precision', choices=('no', 'bf16'), default='no', help='bf16 for autocast to bfloat16')
    arg('--per-class', action='store_true', help='print top-1 of every class')
    arg('--calibrate-confidence', action='store_true',
        help="fit a temperature per depth to held-out images, report on the others, and store it in the model's "
        'config.json: probabilities of predict, cascades and exported files then agree with accuracies')
    arg('--holdout', type=number(float, 0, 1), default=0.5, metavar='SHARE',
        help='share of the images to hold out, at random and always the same, for a threshold or for temperatures')
    arg('--output', type=Path, help='folder for evaluation.json, plots of accuracy and calibration, confusion '
        'matrices (CSV and plot) and a sheet of the most confident mistakes')
    group = parser.add_argument_group('cascade')
    arg = group.add_argument
    arg('--cascade', nargs='+', type=int, metavar='DEPTH',
        help='depths to run, the shallowest first, each where the one before is unsure: 14 26 50')
    arg('--speed-images', type=number(int, 0), default=256, metavar='N', help='images to time, 0 for none')
    arg = group.add_mutually_exclusive_group().add_argument
    arg('--threshold', type=parse_threshold, metavar='auto|P', default=AUTO,
        help='an image goes on to the next depth where the greatest probability is not above it')
    arg('--target-top1', type=number(float, 0, 100), metavar='PERCENT',
        help="choose the threshold of fewest MACs with this top-1 accuracy, the last depth's if not given")
    arg('--budget-macs', type=number(float, 1), metavar='MACS',
        help='choose the threshold of best accuracy within these mean MACs per image, such as 2e9')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate, and print tables."""
    threshold = None if args.threshold == AUTO else args.threshold
    if not args.cascade and (threshold, args.target_top1, args.budget_macs) != (None, None, None):
        fail('--threshold, --target-top1 and --budget-macs are for a cascade, got no --cascade')

    from ..tables import print_files, print_table, show_progress, show_status

    with show_status('evaluating'):
        from timm_ddnn.data.datasets import quiet_datasets
        from timm_ddnn.evaluation.evaluate import CascadeOptions, evaluate_model

        quiet_datasets()
        cascade = args.cascade and CascadeOptions(
            args.cascade, threshold=threshold, target_top1=args.target_top1, budget_macs=args.budget_macs,
            speed_images=args.speed_images)
        result = evaluate_model(
            args.model, args.data, batch_size=args.batch_size, num_workers=args.workers, device=args.device,
            precision=args.precision, cascade=cascade, calibrate_confidence=args.calibrate_confidence,
            holdout=args.holdout, output=args.output, input_key=args.input_key, target_key=args.target_key,
            val_split=args.val_split, val_fraction=args.val_fraction, progress=show_progress,
        )
    if not args.json:
        print_table(_depth_table(result))
        if any(row['uncalibrated'] for row in result['depths']):
            print_table(_confidence_table(result))
        if args.per_class:
            print_table(_class_table(result))
        if result['cascade']:
            print_table(_cascade_table(result['cascade']))
            _print_cascade(result['cascade'])
        if args.output:
            print_files(args.output, FILES)
    return result


def _depth_table(result: Mapping[str, Any]) -> Any:
    from ..tables import cost_cells, create_table, format_count, format_interval

    table = create_table(
        ('depth', 'blocks', 'params', 'MACs', 'top-1', '95 % interval', 'top-5', 'ECE', 'agree'),
        title=f'{result["images"]:,} images',
        caption=f'all depths in one model: {format_count(result["parameters"])} parameters\n'
                'in %; interval: of top-1 on other such images; ECE: calibration error;\n'
                "agree: same class as the full-net's")
    for row in result['depths']:
        table.add_row(
            *cost_cells(row), f'{row["top1"]:.2f}', format_interval(row['top1_interval']),
            *(f'{row[name]:.2f}' for name in ('top5', 'ece', 'agreement')))
    return table


def _confidence_table(result: Mapping[str, Any]) -> Any:
    from ..tables import create_table

    fitted = result['temperature_images']
    table = create_table(
        ('depth', 'temperature', 'ECE before (%)', 'ECE (%)'), title='calibration of the confidence',
        caption='stored with the model' + (f', fitted to {fitted:,} other images' if fitted else ''))
    for row in result['depths']:
        before = (row['uncalibrated'] or row)['ece']
        table.add_row(str(row['depth']), f'{row["temperature"]:.3f}', f'{before:.2f}', f'{row["ece"]:.2f}')
    return table


def _class_table(result: Mapping[str, Any]) -> Any:
    from rich.text import Text

    from ..tables import create_table

    depths = [row['depth'] for row in result['depths']]
    table = create_table(
        ('class', 'images', *(f'depth {depth}' for depth in depths)), fold=('class',), title='top-1 by class (%)')
    for row in result['per_class']:
        values = (row[f'top1_{depth}'] for depth in depths)
        table.add_row(Text(row['class']), str(row['images']), *('' if v is None else f'{v:.2f}' for v in values))
    return table


def _cascade_table(cascade: Mapping[str, Any]) -> Any:
    from ..tables import create_table, format_count

    speeds = cascade['speed']
    speeds = [*speeds['depths'], speeds['cascade']] if speeds else [None] * (len(cascade['steps']) + 1)
    nets = [
        (f'depth {step["depth"]}', f'{step["ends"]:.2f}', format_count(step['macs_alone']), format_count(step['macs']),
         f'{step["top1_alone"]:.2f}')
        for step in cascade['steps']
    ]
    nets.append(('cascade', '', '', f'mean {format_count(cascade["macs"])}', f'{cascade["top1"]:.2f}'))
    table = create_table(
        ('net', 'ends (%)', 'MACs', 'step MACs', 'top-1', 'images/s', 'middle half'), left=('net',),
        title=f'cascade, threshold {cascade["threshold"]:.4f}, {cascade["images"]:,} images',
        caption='ends: images that end there; step: MACs without what is reused')
    for i, (cells, speed) in enumerate(zip(nets, speeds, strict=True)):
        if i + 1 == len(nets):
            table.add_section()
        rate = (f'{speed["median"]:.0f}', f'{speed["low"]:.0f} to {speed["high"]:.0f}') if speed else ()
        table.add_row(*cells, *rate)
    return table


def _print_cascade(cascade: Mapping[str, Any]) -> None:
    from ..tables import format_count, format_interval, print_line

    print_line(f'top-1 of the cascade: 95 % interval {format_interval(cascade["top1_interval"])}')
    for step in cascade['steps'][1:]:
        print_line(f'depth {step["depth"]} reuses {format_count(step["reused"])} MACs of depth {step["source"]}: '
                   f'stem and blocks 1 to {step["shared_blocks"]}')
    chosen = cascade['chosen']
    if chosen:
        print_line(f'threshold chosen on {chosen["images"]:,} other images: top-1 {chosen["top1"]:.2f} %, '
                   f'mean MACs {format_count(chosen["macs"])}')
    if cascade['beaten_by']:
        print_line(f'depth {cascade["beaten_by"]} alone is as accurate on these images and takes no more MACs')
    speed = cascade['speed']
    if speed:
        print_line(f'speed: {speed["images"]} images, batches of {speed["batch_size"]}, {speed["device"]}, '
                   f'CPU threads {speed["threads"]}, medians of {speed["rounds"]} rounds')
