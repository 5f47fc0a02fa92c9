"""`timm-ddnn extract`: one depth as a stock timm model in a folder."""
import argparse
from pathlib import Path
from typing import Any

HELP = 'Save one depth as a stock timm model, for machines that never heard of this library.'
EXAMPLES = """  timm-ddnn extract output/ddnn_resnet50-food --depth 26 --output resnet26-food
  timm-ddnn extract hf-hub:OWNER/NAME --depth 14 --output resnet14"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    parser.add_argument('--depth', type=int, required=True, help='depth to save')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER', help='folder to write, new or empty')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Save the depth, and print how to load it."""
    from ..tables import print_files, print_line, show_status

    with show_status('extracting'):
        from timm_ddnn.deploy.extract import extract_model

        result = extract_model(args.model, args.depth, args.output)
    if not args.json:
        print_files(result['output'], ('config.json', 'model.safetensors'))
        print_line(f'architecture {result["architecture"]}, blocks {"-".join(map(str, result["blocks"]))}')
        if result['top1'] is not None:
            print_line(f'top-1 of depth {result["depth"]} where it was trained: {result["top1"]:.2f} %')
        print_line('load it with:')
        print_line(f'    import {", ".join(result["imports"])}')
        print_line(f"    timm.create_model('local-dir:{result['output']}', pretrained=True)")
    return result
