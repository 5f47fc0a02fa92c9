"""`timm-ddnn calibrate`: a further depth, without training."""
import argparse
from pathlib import Path
from typing import Any

from ..arguments import number, parse_blocks, parse_workers

HELP = 'Add a depth without training: its batch-norm statistics are estimated, and every accuracy is measured.'
EXAMPLES = """  timm-ddnn calibrate output/ddnn_resnet50-food --blocks 3,4,4,2 --data FOLDER --output ddnn_resnet50-41
  timm-ddnn calibrate output/ddnn_resnet20-digits --blocks 2,2,1 --data digits --output ddnn_resnet20-12"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    parser.add_argument('--blocks', type=parse_blocks, required=True, help='blocks per stage of the new depth')
    parser.add_argument('--data', metavar='PATH', required=True, help="folder of a data set, 'digits' or an id on the "
                        'Hub: its training split for the statistics, its validation split for the accuracy')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER',
                        help='folder to write the larger model to, new or empty')
    parser.add_argument('--images', type=number(int, 2), default=2000, metavar='N',
                        help='training images for the statistics, taken at random')
    parser.add_argument('-b', '--batch-size', type=number(int, 2), default=64, metavar='N', help='images per batch')
    parser.add_argument('-j', '--workers', type=parse_workers, default=2, metavar='N', help='processes that load data')
    parser.add_argument('--device', help="'cpu', 'cuda', ...: the GPU if there is one, else the CPU, if not given")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Add the depth, and print the accuracy of every depth."""
    from ..tables import print_files, print_table, result_table, show_progress, show_status

    with show_status('calibrating and measuring'):
        from timm_ddnn.data.datasets import quiet_datasets
        from timm_ddnn.deploy.calibrate import calibrate_model

        quiet_datasets()
        result = calibrate_model(
            args.model, args.blocks, args.data, args.output, num_images=args.images, batch_size=args.batch_size,
            num_workers=args.workers, device=args.device, progress=show_progress,
        )
    if not args.json:
        title = f'depth {result["depth"]} calibrated on {result["images"]:,} images'
        print_table(result_table(result['depths'], title, result['parameters']))
        print_files(args.output, ('config.json', 'model.safetensors'))
    return result
