"""`timm-ddnn calibrate`: a further depth, without training."""
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from rich.console import Console
from timm.data import create_transform, resolve_input_data_config
from torch.utils.data import DataLoader

from ..calibration import calibrate_bn
from ..cli import load_model, number, parse_blocks, staged_folder
from ..data import load_image_data, match_classes, quiet_datasets
from ..evaluation import evaluate
from ..images import Images, create_loader
from ..report import add_accuracies, count_costs, result_table, save_model

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
    parser.add_argument('-j', '--workers', type=number(int, 0), default=2, metavar='N', help='processes that load data')


def calibrate_model(
        name: str,
        blocks: Sequence[int],
        data: str,
        output: str | Path,
        *,
        num_images: int = 2000,
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
) -> dict[str, Any]:
    """Add a depth to a model, estimate its batch-norm statistics, measure all depths, and save the larger model.

    The statistics are those of training images as they are prepared for inference, without augmentation, because it is
    such images that the depth is for. All other depths stay equal bit for bit.

    Args:
        name: As for `cli.load_model`.
        blocks: Blocks per stage of the new depth.
        data: Data set, as for `load_image_data`.
        output: Folder to write, new or empty.
        num_images: Training images for the statistics, all if there are fewer; those that fill no batch are left out.
        batch_size: Images per batch, >= 2.
        num_workers: Worker processes.
        seed: Seed of the choice of images.

    Returns:
        output, depth (the new one), images (seen for the statistics), validation_images, parameters (of the model
        that holds all depths), depths (rows of results as at the head of `report.py`).

    Raises:
        ValueError: If there is no such model, it cannot have such a depth, or the data do not fit it.
        OSError: If a file cannot be read or written.
    """
    with staged_folder(output, new=True) as folder:
        accelerator = Accelerator()
        model = load_model(name).to(accelerator.device)
        depth = model.add_subnet(blocks)
        image_data = match_classes(load_image_data(data), model)
        data_config = resolve_input_data_config(model)

        def load(split: str, batch_size: int) -> DataLoader:
            transform = create_transform(**data_config)
            images = Images(image_data, split, transform, in_chans=data_config['input_size'][0], seed=None)
            return create_loader(images, batch_size, training=split == 'train', num_workers=num_workers)

        chosen = np.random.default_rng(seed).permutation(len(image_data.train))[:num_images]
        image_data = image_data._replace(train=image_data.train.select(chosen, keep_in_memory=True))
        num_seen = calibrate_bn(model, load('train', min(batch_size, len(chosen))), depth=depth)
        metrics = evaluate(accelerator, model, accelerator.prepare(load('validation', batch_size)))
        rows = add_accuracies(count_costs(model, data_config['input_size']), metrics)
        names = model.pretrained_cfg.get('label_names') or image_data.class_names
        save_model(model, folder, data_config=data_config, class_names=list(names), rows=rows)
    return {
        'output': str(output),
        'depth': depth,
        'images': num_seen,
        'validation_images': len(image_data.validation),
        'parameters': sum(p.numel() for p in model.parameters()),
        'depths': rows,
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Add the depth, and print the accuracy of every depth."""
    quiet_datasets()
    with Console(stderr=True).status('calibrating and measuring'):
        result = calibrate_model(
            args.model, args.blocks, args.data, args.output, num_images=args.images, batch_size=args.batch_size,
            num_workers=args.workers,
        )
    if not args.json:
        title = f'depth {result["depth"]} calibrated on {result["images"]:,} images'
        console = Console()
        console.print(result_table(result['depths'], title, result['parameters']))
        console.print(f'{args.output}: config.json model.safetensors', soft_wrap=True, markup=False, highlight=False)
    return result
