"""`timm-ddnn export`: files of plain nets for other programs."""
import argparse
from pathlib import Path
from typing import Any

from ..arguments import number, parse_depth

HELP = 'Write one depth, or every depth, as ONNX, torch.export or TorchScript, compared with the model on real images.'
EXAMPLES = """  timm-ddnn export output/ddnn_resnet50-food --depth 26 --format onnx --data FOLDER
  timm-ddnn export output/ddnn_resnet50-food --depth all --format torch-export --dynamic-batch --output files"""
FORMATS = ('onnx', 'torch-export', 'torchscript')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    parser.add_argument('--depth', type=parse_depth, required=True, help="depth to write, or 'all': a file for each")
    parser.add_argument('--format', choices=FORMATS, required=True, help='format of the files')
    parser.add_argument('--dynamic-batch', action='store_true', help='any number of images at once, not one alone')
    parser.add_argument('--output', type=Path, default=Path('.'), metavar='FOLDER',
                        help='folder to write to, a file MODEL-DEPTH with the suffix of the format for each depth')
    parser.add_argument('--overwrite', action='store_true', help='replace files of these names')
    parser.add_argument('--data', metavar='PATH', help='data set with images to compare with, a folder or an id on the '
                        'Hub; if not given, two photographs of scikit-learn and their mirror images')
    parser.add_argument('--images', type=number(int, 1), default=16, metavar='N', help='images to take from it')
    parser.add_argument('--tolerance', type=number(float, 0), default=1e-4,
                        help='difference of logits allowed, in parts of the greatest logit')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the files, and print their sizes and how far they are from the model."""
    from ..tables import create_table, print_files, print_table, show_status

    with show_status('exporting and comparing'):
        from timm_ddnn.data.datasets import quiet_datasets
        from timm_ddnn.deploy.export import export_model

        quiet_datasets()
        rows = export_model(
            args.model, args.depth, args.format, args.output, data=args.data, num_images=args.images,
            dynamic_batch=args.dynamic_batch, tolerance=args.tolerance, overwrite=args.overwrite,
        )
    if not args.json:
        table = create_table(
            ('file', 'MB', 'batch', 'difference', 'allowed', 'top-1 (%)'), fold=('file',),
            caption=f'{rows[0]["images"]} images; difference of logits, top-1 that agree')
        for row in rows:
            table.add_row(
                Path(row['file']).name, f'{row["bytes"] / 1e6:.2f}', ', '.join(map(str, row['batch_sizes'])),
                f'{row["max_difference"]:.1e}', f'{row["allowed"]:.1e}', f'{row["top1_agreement"]:.1f}',
            )
        print_table(table)
        print_files(args.output, (Path(row['file']).name for row in rows))
    return rows
