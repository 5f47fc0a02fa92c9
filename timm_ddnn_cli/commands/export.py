"""`timm-ddnn export`: files for other programs."""
import argparse
from pathlib import Path
from typing import Any

from ..arguments import number, parse_depth

HELP = 'Write one depth, or every depth, as ONNX, torch.export or TorchScript, compared with the model on real images.'
EXAMPLES = """  timm-ddnn export output/ddnn_resnet50-food --depth all --format onnx --data FOLDER --int8 --output files
  timm-ddnn export output/ddnn_resnet50-food --depth 26 --format onnx --data FOLDER
  timm-ddnn export output/ddnn_resnet50-food --depth all --format torch-export --dynamic-batch --output files"""
FORMATS = ('onnx', 'torch-export', 'torchscript')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    parser.add_argument('--depth', type=parse_depth, required=True,
                        help="depth to write, or 'all': in ONNX one file with an input `depth`, else a file for each")
    parser.add_argument('--format', choices=FORMATS, required=True, help='format of the files')
    parser.add_argument('--dynamic-batch', action='store_true', help='any number of images at once, not one alone; a '
                        'file of every depth and one in int8 always take them')
    parser.add_argument('--output', type=Path, default=Path('.'), metavar='FOLDER',
                        help='folder to write to, a file MODEL or MODEL-DEPTH with the suffix of the format')
    parser.add_argument('--overwrite', action='store_true', help='replace files of these names')
    parser.add_argument('--data', metavar='PATH', help='data set with images to compare with, a folder or an id on the '
                        'Hub; if not given, two photographs of scikit-learn and their mirror images')
    parser.add_argument('--images', type=number(int, 1), default=16, metavar='N', help='images to take from it')
    parser.add_argument('--tolerance', type=number(float, 0), default=1e-4,
                        help='difference of logits allowed, in parts of the greatest logit')
    group = parser.add_argument_group('int8')
    group.add_argument('--int8', action='store_true', help='an ONNX file with weights of 8 bits that all depths share, '
                       'quantized on 512 training images of --data')
    group.add_argument('--max-loss', type=number(float, 0, 100), default=0.5, metavar='POINTS',
                       help='top-1 accuracy that a depth may lose on validation images of --data')
    group.add_argument('--held-out', type=number(int, 1), default=5000, metavar='N', help='validation images for that')


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
            int8=args.int8, max_loss=args.max_loss, num_held_out=args.held_out,
        )
    if not args.json:
        columns = ['depth', 'MB', 'batch', 'difference', 'allowed', 'agree (%)']
        caption = f'{rows[0]["images"]} images; difference of logits, top-1 that agree'
        if args.int8:
            columns += ['float (%)', 'int8 (%)']
            caption += f'\ntop-1 accuracy on {rows[0]["held_out_images"]} validation images'
        table = create_table(columns, caption=caption)
        for row in rows:
            cells = [str(row['depth']), f'{row["bytes"] / 1e6:.2f}', ', '.join(map(str, row['batch_sizes']))]
            cells.append(f'{row["max_difference"]:.1e}')
            cells += ['' if row['allowed'] is None else f'{row["allowed"]:.1e}', f'{row["top1_agreement"]:.1f}']
            if args.int8:
                cells += [f'{row["float_top1"]:.2f}', f'{row["top1"]:.2f}']
            table.add_row(*cells)
        print_table(table)
        print_files(args.output, dict.fromkeys(Path(row['file']).name for row in rows))
    return rows
