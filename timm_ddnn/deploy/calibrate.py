"""A further depth for a saved model, without training; the statistics are estimated in `calibration.py`."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from timm.data import create_transform, resolve_input_data_config
from torch.utils.data import DataLoader

from ..calibration import calibrate_bn
from ..data.datasets import load_image_data, match_classes
from ..data.images import Images
from ..data.loader import create_loader
from ..evaluation.metrics import add_accuracies
from ..evaluation.predict import evaluate
from ..hub.save import save_model
from ..models.load import load_model
from ..utils.costs import count_costs
from ..utils.files import staged_folder

__all__ = ['calibrate_model']


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
