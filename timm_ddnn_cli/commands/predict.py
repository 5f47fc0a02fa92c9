"""`timm-ddnn predict`: classes and probabilities for images."""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import fail, number, parse_depth, parse_workers

HELP = 'Classify images: files, folders and patterns, at one depth, at all, or by a cascade.'
EXAMPLES = """  timm-ddnn predict output/ddnn_resnet50-food photo.jpg
  timm-ddnn predict output/ddnn_resnet50-food photos "more/**/*.png" --depth all --csv predictions.csv
  timm-ddnn predict hf-hub:OWNER/NAME photos --cascade 14 50 --threshold 0.7 --save labelled"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    arg, count = parser.add_argument, number(int, 1)
    arg('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    arg('paths', nargs='+', metavar='PATH', help='image, folder (with all that is in it) or pattern')
    choice = parser.add_mutually_exclusive_group().add_argument
    choice('--depth', type=parse_depth, help="a depth, or 'all'; the full-net's if not given")
    choice('--cascade', nargs='+', type=int, metavar='DEPTH',
           help='depths to run, the shallowest first, each where the one before is unsure: 14 26 50')
    arg('--threshold', type=number(float, 0, 1), metavar='P',
        help='of the cascade: an image goes on to the next depth where the greatest probability is not above it')
    arg('-k', '--top-k', type=count, default=3, help='classes per image and depth')
    arg('-b', '--batch-size', type=count, default=64, help='images per batch')
    arg('-j', '--workers', type=parse_workers, default=2, help='processes that read images')
    arg('--device', help="'cpu', 'cuda', ...: the GPU if there is one, else the CPU, if not given")
    arg('--precision', choices=('no', 'bf16'), default='no', help='bf16 for autocast to bfloat16')
    arg('--csv', type=Path, metavar='FILE', help='write CSV, a line per image and depth, in the place of the table')
    arg('--save', type=Path, metavar='FOLDER', help='new or empty folder for the images with their labels below')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Classify, and print or write the rows."""
    if args.csv and (args.csv.is_dir() or not args.csv.parent.is_dir()):
        fail(f'--csv must be a file in a folder that is there, got {str(args.csv)!r}')

    from ..tables import print_line, print_table, show_progress, show_status

    with show_status('classifying'):
        from timm_ddnn.evaluation.predict_images import predict
        from timm_ddnn.utils.files import write_text

        rows = predict(
            args.model, args.paths, depth=args.depth, cascade=args.cascade, threshold=args.threshold, top_k=args.top_k,
            batch_size=args.batch_size, num_workers=args.workers, device=args.device, precision=args.precision,
            save=args.save, progress=show_progress,
        )
    errors = [row for row in rows if row.error]
    if len(errors) == len(rows):
        fail(f'none of the images can be read, {len(rows)} in all; {errors[0].image!r}: {errors[0].error}')
    if args.csv:
        write_text(args.csv, _csv(rows))
    if not args.json:
        if args.csv:
            print_line(f'{args.csv}: {len(rows)} rows')
        else:
            print_table(_table(rows))
        if args.save:
            print_line(f'{args.save}: images with labels')
    if errors:
        print(f'images that could not be read: {len(errors)}', file=sys.stderr)
    return [row._asdict() for row in rows]


def _csv(rows: Sequence[Any]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    ranks = range(1, max(len(row.labels) for row in rows) + 1)
    writer.writerow(['image', 'depth', *(f'{name}_{i}' for i in ranks for name in ('label', 'probability')), 'error'])
    for row in rows:
        best = [cell for label, p in zip(row.labels, row.probabilities, strict=True) for cell in (label, f'{p:.6f}')]
        writer.writerow([row.image, row.depth, *(best or [''] * 2 * len(ranks)), row.error])
    return text.getvalue()


def _table(rows: Sequence[Any]) -> Any:
    from rich.text import Text

    from ..tables import create_table

    table = create_table(('image', 'depth', 'class', '%'), fold=('image', 'class'))
    for i, row in enumerate(rows):
        image = row.image if i == 0 or rows[i - 1].image != row.image else ''
        if row.error:
            table.add_row(Text(image), '', Text(row.error))
        for j, (label, probability) in enumerate(zip(row.labels, row.probabilities, strict=True)):
            table.add_row(
                Text('' if j else image), '' if j else str(row.depth), Text(label), f'{100 * probability:.1f}')
    return table
