"""Small images that are decoded once and augmented by whole batches; they are normalized as all others."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import Dataset
from torchvision import transforms

from .datasets import ImageData
from .images import Images
from .loader import create_loader

__all__ = ['MemoryImages']


class MemoryImages(Dataset):
    """Small images, decoded once and kept as bytes, that are cropped and flipped by whole batches.

    What is random is a function of (seed, epoch, index), as in `Images`, though not the same function.
    """

    def __init__(
            self,
            data: ImageData,
            split: str,
            data_config: Mapping[str, Any],
            *,
            hflip: float = 0.0,
            seed: int = 0,
            num_workers: int = 0,
            device: torch.device | str = 'cpu',
    ) -> None:
        """Decode and resize the images of a split.

        Args:
            data: What `load_image_data` found.
            split: 'train', for the crop 'pad' of `create_train_transform`, or 'validation', for timm's transform.
            data_config: As `timm.data.resolve_data_config` gives it.
            hflip: Probability of a horizontal flip, [0, 1].
            seed: Seed of the augmentation, >= 0.
            num_workers: Processes that decode, >= 0.
            device: Where the images are kept, N x C x H x W bytes, and batches are made. On a GPU the loader costs
                next to nothing.

        Raises:
            ImageReadError: If an image does not decode.
        """
        channels, *size = data_config['input_size']
        transform = create_transform(**data_config, normalize=False)
        if split == 'train':
            interpolation = str_to_interp_mode(data_config['interpolation'])
            transform = transforms.Compose([transforms.Resize(size, interpolation), transforms.PILToTensor()])
        images = Images(data, split, transform, in_chans=channels, seed=None)
        self.images = torch.empty(len(images), channels, *size, dtype=torch.uint8, device=device)
        self.targets = torch.empty(len(images), dtype=torch.int64, device=device)
        start = 0
        for batch, targets in create_loader(images, 256, training=False, num_workers=num_workers):
            rows = slice(start, start + len(batch))
            self.images[rows], self.targets[rows] = batch, targets  # not kept: those of workers are open files
            start = rows.stop
        self.padding = [side // 8 if split == 'train' else 0 for side in size]
        self.hflip = hflip
        self.seed = seed
        self._epoch: tuple[int, Any] | None = None

    @property
    def device(self) -> torch.device:
        """Where the images are, and batches are made."""
        return self.images.device

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the batch of some (epoch, index) of one epoch, as `EpochSampler` gives them: bytes [B, C, H, W]."""
        epoch = keys[0][0]
        index = torch.tensor([index for _, index in keys])
        if self.device.type == 'cuda':
            index = index.pin_memory()  # else the copy waits for all that the GPU has to do
        index = index.to(self.device, non_blocking=True)
        images = self.images[index]
        if any(self.padding) or self.hflip:
            offsets, flips = (values[index] for values in self._draw(epoch))
            (above, left), (height, width) = self.padding, images.shape[-2:]
            padded = F.pad(images, (left, left, above, above))
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)
            images = crops[torch.arange(len(index), device=self.device), :, offsets[:, 0], offsets[:, 1]]
            images = torch.where(flips[:, None, None, None], images.flip(-1), images)
        return images, self.targets[index]

    def _draw(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw, for every image, the corner of its crop in the padded image, [N, 2], and whether it is flipped, [N]."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offsets = rng.integers(0, 2 * np.array(self.padding) + 1, (len(self), 2))
            flips = rng.random(len(self)) < self.hflip
            self._epoch = epoch, tuple(torch.from_numpy(drawn).to(self.device) for drawn in (offsets, flips))
        return self._epoch[1]
