"""`timm-ddnn extract`: one depth as a stock timm model in a folder."""
import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from timm.data import resolve_input_data_config

from ..cifar_resnet import CifarResNet
from ..cli import load_model, saved_results, staged_folder, warn_of_untrained
from ..report import save_model

HELP = 'Save one depth as a stock timm model, for machines that never heard of this library.'
EXAMPLES = """  timm-ddnn extract output/ddnn_resnet50-food --depth 26 --output resnet26-food
  timm-ddnn extract hf-hub:OWNER/NAME --depth 14 --output resnet14"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('model', help="folder of a training run, timm's name, local-dir:FOLDER or hf-hub:ID")
    parser.add_argument('--depth', type=int, required=True, help='depth to save')
    parser.add_argument('--output', type=Path, required=True, metavar='FOLDER', help='folder to write, new or empty')


def extract_model(name: str, depth: int, output: str | Path) -> dict[str, Any]:
    """Save one depth of a model such that `timm.create_model('local-dir:OUTPUT', pretrained=True)` loads it.

    The configuration has the model's preprocessing and names of classes, and the results of that depth if they were
    saved with the model.

    Args:
        name: As for `cli.load_model`.
        depth: One of the model's depths.
        output: Folder to write, new or empty.

    Returns:
        output, architecture (timm's name), depth, blocks, trained (whether the depth was), top1 (in percent, None if it
        is not known), imports (packages that must be imported to load it).

    Raises:
        ValueError: If there is no such model or depth.
        OSError: If the folder cannot be written.
    """
    with staged_folder(output, new=True) as folder:
        model = load_model(name)
        net = model.extract(depth)
        warn_of_untrained(model, [depth])
        rows = [row for row in saved_results(model) if row['depth'] == depth]
        names = model.pretrained_cfg.get('label_names') or ()
        save_model(net, folder, data_config=resolve_input_data_config(model), class_names=list(names), rows=rows)
    return {
        'output': str(output),
        'architecture': net.pretrained_cfg['architecture'],
        'depth': depth,
        'blocks': list(model.blocks(depth)),
        'trained': depth in model.trained_depths,
        'top1': rows[0].get('top1') if rows else None,
        'imports': ['timm', 'timm_ddnn'] if isinstance(net, CifarResNet) else ['timm'],
    }


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
