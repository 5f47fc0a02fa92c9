"""Images of a data set as a model takes them for inference."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from ..data.datasets import ImageData
from ..data.images import Images
from ..data.loader import create_loader, normalize

__all__ = ['load_batches']


def load_batches(
        data: ImageData,
        split: str,
        model: nn.Module,
        batch_size: int,
        *,
        rows: Sequence[int] | None = None,
        shuffle: bool = False,
        num_workers: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Load images without augmentation, prepared as for validation in training.

    Args:
        data: What `load_image_data` found.
        split: 'train' or 'validation'.
        model: The model, whose `pretrained_cfg` says how images are prepared. They come on its device.
        batch_size: Images per batch.
        rows: Indices of the images, all of the split if None.
        shuffle: Whether the order is random, and a last batch that is not full is left out.
        num_workers: Worker processes.
        progress: Wraps the batches, to show how far it is: `tqdm.tqdm`, for example.

    Yields:
        Images [B, C, H, W], float32, and labels [B].
    """
    if rows is not None:
        data = data._replace(**{split: getattr(data, split).select(rows, keep_in_memory=True)})
    data_config = resolve_input_data_config(model)
    transform = create_transform(**data_config, normalize=False)
    images = Images(data, split, transform, in_chans=data_config['input_size'][0], seed=None)
    loader = create_loader(images, batch_size, training=shuffle, num_workers=num_workers)
    return normalize(progress(loader), data_config, next(model.parameters()).device)
