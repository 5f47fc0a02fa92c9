"""A further depth for a saved model, without training; the statistics are estimated in `timm_ddnn/calibration.py`."""
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import resolve_input_data_config

from ..calibration import calibrate_bn
from ..data.datasets import load_image_data, match_classes
from ..data.loader import loading
from ..evaluation.batches import load_batches
from ..evaluation.metrics import depth_metrics
from ..evaluation.predict import predict
from ..hub.save import save_model
from ..models.load import load_model, saved_results
from ..utils.costs import count_costs
from ..utils.environment import find_device
from ..utils.files import staged_folder

__all__ = ['calibrate_model']


_logger = logging.getLogger(__name__)


@loading()
def calibrate_model(
        name: str,
        blocks: Sequence[int],
        data: str,
        output: str | Path,
        *,
        num_images: int = 2000,
        batch_size: int = 64,
        num_workers: int = 2,
        device: str | None = None,
        seed: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """Add a depth to a model, estimate its batch-norm statistics, measure all depths, and save the larger model.

    A warning is logged if a cheaper depth is as accurate as the new one.

    The statistics are those of training images as they are prepared for inference, without augmentation, because it is
    such images that the depth is for. All other depths stay equal bit for bit.

    Args:
        name: As for `load_model`.
        blocks: Blocks per stage of the new depth.
        data: Data set, as for `load_image_data`.
        output: Folder to write, new or empty.
        num_images: Training images for the statistics, all if there are fewer; those that fill no batch are left out.
        batch_size: Images per batch, >= 2.
        num_workers: Worker processes.
        device: As for `find_device`.
        seed: Seed of the choice of images.
        progress: As for `load_batches`.

    Returns:
        output, depth (the new one), images (seen for the statistics), validation_images, parameters (of the model
        that holds all depths), depths (rows with depth, blocks, parameters, macs, top1 and top5).

    Raises:
        InputError: If there is no such model, it cannot have such a depth, the data do not fit it, or a worker process
            ends.
        OSError: If a file cannot be read or written.
    """
    with staged_folder(output, new=True) as folder:
        device = find_device(device)
        model = load_model(name)
        depth = model.add_subnet(blocks)
        model = model.to(device)
        image_data = match_classes(load_image_data(data), model)
        chosen = np.random.default_rng(seed).permutation(len(image_data.train))[:num_images]
        loader = load_batches(
            image_data, 'train', model, min(batch_size, len(chosen)), rows=chosen, shuffle=True,
            num_workers=num_workers, progress=progress)
        num_seen = calibrate_bn(model, loader, depth=depth)
        metrics = depth_metrics(predict(model, load_batches(
            image_data, 'validation', model, batch_size, num_workers=num_workers, progress=progress)))
        data_config = resolve_input_data_config(model)
        known = {row['depth']: row for row in saved_results(model)}  # a temperature stays as it is
        rows = [
            {**known.get(cost['depth'], {}), **cost, 'top1': row['top1'], 'top5': row['top5']}
            for cost, row in zip(count_costs(model, data_config['input_size']), metrics, strict=True)
        ]
        names = model.pretrained_cfg.get('label_names') or image_data.class_names
        save_model(model, folder, data_config=data_config, class_names=list(names), rows=rows)
    new = next(row for row in rows if row['depth'] == depth)
    better = [row['depth'] for row in rows if row['macs'] < new['macs'] and row['top1'] >= new['top1']]
    if better:
        _logger.warning(f'the new depth {depth} is no more accurate than depths {better}, which take fewer MACs')
    return {
        'output': str(output),
        'depth': depth,
        'images': num_seen,
        'validation_images': len(image_data.validation),
        'parameters': sum(p.numel() for p in model.parameters()),
        'depths': rows,
    }
