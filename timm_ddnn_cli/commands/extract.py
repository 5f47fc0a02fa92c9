"""`timm-ddnn extract`: one depth as a stock timm model in a folder."""
import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_ddnn.deploy.extract import extract_model

HELP = 'Save one depth as a stock timm model, for machines that never heard of this library.'
EXAMPLES = """  timm-ddnn extract output/ddnn_resnet50-food --depth 26 --output resnet26-food
  timm-ddnn extract hf-hub:OWNER/NAME --depth 14 --output resnet14"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    parser.add_argument('--depth', type=int, required=True, help='depth to save')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER', help='folder to write, new or empty')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Save the depth, and say how to load it."""
    result = extract_model(args.model, args.depth, args.output)
    if not args.json:
        about = f'depth {result["depth"]}, blocks {"-".join(map(str, result["blocks"]))}'
        if result['top1'] is not None:
            about += f', top-1 {result["top1"]:.2f} % where it was trained'
        console = Console(soft_wrap=True, markup=False, highlight=False)
        console.print(f'{result["output"]}: config.json model.safetensors')
        console.print(f'{result["architecture"]} ({about}). It is loaded by')
        console.print(f'    import {", ".join(result["imports"])}')
        console.print(f"    timm.create_model('local-dir:{result['output']}', pretrained=True)")
        if 'timm_ddnn' in result['imports']:
            console.print('timm has no CIFAR ResNets: these need this library where they are loaded.')
    return result
