"""Images for training and evaluation, and augmentation that repeats exactly.

Everything random here is a function of (seed, epoch, index), whatever the number of worker processes. Where the images
come from is in `data.py`.
"""
import atexit
import copy
import multiprocessing
import random
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

from .data import ImageData

__all__ = [
    'EpochSampler', 'ImageReadError', 'Images', 'MemoryImages', 'convert_image', 'create_loader',
    'create_train_transform', 'seeded',
]


class ImageReadError(ValueError):
    """An image that cannot be read or decoded."""


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Make the generators of Python, NumPy and PyTorch (its CPU's) a function of some integers, and restore them after.

    Args:
        *key: Integers >= 0, for example (seed, epoch, index).
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    try:
        random.seed(words[0])
        np.random.seed(words[1])
        torch.default_generator.manual_seed(words[2])
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def convert_image(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Convert an image to grey ('L') or colour ('RGB').

    Args:
        image: Image of 8 bits per channel, or of one bit.
        mode: 'L' or 'RGB'.

    Raises:
        ValueError: If the image has deeper values, which PIL would cut off at 255.
    """
    if image.mode[0] in 'IF':
        raise ValueError(f'pixels must be of 8 bits, got mode {image.mode!r}: scale them to 0..255')
    return image.convert(mode)


class Images(Dataset):
    """Transformed images of a split. An item is a function of (seed, epoch, index) and of nothing else."""

    def __init__(
            self,
            data: ImageData,
            split: str,
            transform: Callable[[Any], torch.Tensor],
            *,
            in_chans: int = 3,
            seed: int | None = 0,
    ) -> None:
        """Choose a split of a data set and what becomes of its images.

        Args:
            data: What `load_image_data` found.
            split: 'train' or 'validation'.
            transform: Maps a PIL image to a tensor [in_chans, H, W].
            in_chans: Channels that images are converted to, 1 (grey) or 3 (RGB).
            seed: Seed of the augmentation, >= 0. None if the transform draws nothing: seeding the generators takes as
                long as decoding a small image.

        Raises:
            ValueError: If `in_chans` is neither 1 nor 3.
        """
        if in_chans not in (1, 3):
            raise ValueError(f'in_chans must be 1 or 3, got {in_chans!r}')
        self.data = getattr(data, split)
        self.input_key = data.input_key
        self.target_key = data.target_key
        self.transform = transform
        self.mode = 'L' if in_chans == 1 else 'RGB'
        self.seed = seed

    def __len__(self) -> int:
        """Count the images."""
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        """Read the image of (epoch, index), as `EpochSampler` gives them.

        Raises:
            ImageReadError: If the image does not decode.
        """
        epoch, index = key
        try:
            row = self.data[index]
            image = convert_image(row[self.input_key], self.mode)
        except Exception as e:  # PIL's decoders raise many types, and none that they share
            known = not isinstance(e, PIL.UnidentifiedImageError)
            reason = f'{type(e).__name__}: {" ".join(str(e).split())}' if known else 'unknown format'
            raise ImageReadError(f'image {self._describe(index)} cannot be read: {reason}') from e
        with nullcontext() if self.seed is None else seeded(self.seed, epoch, index):
            return self.transform(image), row[self.target_key]

    def _describe(self, index: int) -> str:
        raw = self.data.cast_column(self.input_key, datasets.Image(decode=False))[index][self.input_key] or {}
        return f'in row {index} of split {str(self.data.split)!r} ({raw.get("path") or "no file name"})'


class MemoryImages(Dataset):
    """Small images, decoded once and kept as bytes, that are cropped, flipped and normalized by whole batches.

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
        self.mean = torch.tensor(data_config['mean'], device=device)[:, None, None]
        self.std = torch.tensor(data_config['std'], device=device)[:, None, None]
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
        """Make the batch of some (epoch, index) of one epoch, as `EpochSampler` gives them."""
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
        return images.float().div_(255).sub_(self.mean).div_(self.std), self.targets[index]

    def _draw(self, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw, for every image, the corner of its crop in the padded image, [N, 2], and whether it is flipped, [N]."""
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            offsets = rng.integers(0, 2 * np.array(self.padding) + 1, (len(self), 2))
            flips = rng.random(len(self)) < self.hflip
            self._epoch = epoch, tuple(torch.from_numpy(drawn).to(self.device) for drawn in (offsets, flips))
        return self._epoch[1]


class EpochSampler(Sampler):
    """Yields (epoch, index) pairs in an order that is a function of (seed, epoch)."""

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0) -> None:
        """Begin at epoch 0.

        Args:
            length: Number of images.
            shuffle: Whether the order is random, and another one in every epoch.
            seed: Seed of the order, >= 0.
        """
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the images."""
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, index) once for every image."""
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        return ((self.epoch, index) for index in order.tolist())


_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _ignore_stop_signals(worker_id: int) -> None:
    # They reach the whole group of processes, and the main one must be able to end its step. Workers end with it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    # multiprocessing would ask them by SIGTERM, which they ignore, and wait for ever after an error
    workers = [process for process in multiprocessing.active_children() if process in _workers]
    if workers and hasattr(signal, 'SIGCHLD'):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each of them
    for worker in workers:
        worker.kill()


def _worker_context() -> BaseContext:
    """Make a context of multiprocessing that remembers its processes, to tell them from the host program's own."""
    context = copy.copy(multiprocessing.get_context(multiprocessing.get_start_method()))

    def create(*args: Any, process: type = context.Process, **kwargs: Any) -> BaseProcess:
        worker = process(*args, **kwargs)
        _workers.add(worker)
        return worker

    context.Process = create
    return context


def _keep(batch: Any) -> Any:
    return batch  # `MemoryImages` gives whole batches


def create_loader(
        images: Images | MemoryImages,
        batch_size: int,
        *,
        training: bool,
        num_workers: int = 0,
) -> DataLoader:
    """Create a loader of batches: images [B, C, H, W] and labels [B].

    Args:
        images: The images.
        batch_size: Images per batch, >= 1.
        training: Whether the order is random, and a last batch that is not full is left out.
        num_workers: Worker processes, >= 0; none are used for images that are on a GPU. Batches do not depend on them.
    """
    in_memory = isinstance(images, MemoryImages)
    on_cpu = not in_memory or images.device.type == 'cpu'
    if not on_cpu:
        num_workers = 0
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=EpochSampler(len(images), shuffle=training, seed=images.seed or 0),
        collate_fn=_keep if in_memory else None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_ignore_stop_signals,
        multiprocessing_context=_worker_context() if num_workers else None,
        pin_memory=on_cpu and torch.cuda.is_available(),
        drop_last=training,
        generator=torch.Generator(),  # else it draws from the global one, and more or less often with the workers
    )


def create_train_transform(
        data_config: dict[str, Any],
        *,
        crop_mode: str | None = None,
        **augmentation: Any,
) -> Callable[[Any], torch.Tensor]:
    """Create the transform of training images: timm's, and for small images the crop that CIFAR is trained with.

    Args:
        data_config: As `timm.data.resolve_data_config` gives it.
        crop_mode: 'pad' (resize, pad by an eighth of the size with zeros, crop at random) or one of timm's modes 'rrc',
            'rkrc' and 'rkrr'. 'pad' up to 64 px and 'rrc' above, if None.
        **augmentation: Further arguments of `timm.data.create_transform`.

    Raises:
        ValueError: If there is a scale or a ratio of the crop, and the mode is 'pad', which has none.
    """
    height, width = data_config['input_size'][-2:]
    crop_mode = crop_mode or ('pad' if max(height, width) <= 64 else 'rrc')
    given = [name for name in ('scale', 'ratio') if augmentation.get(name)]
    if crop_mode == 'pad' and given:
        raise ValueError(f"{given[0]} must be for a crop mode such as 'rrc', got 'pad', the default up to 64 px")
    transform = create_transform(
        data_config['input_size'],
        is_training=True,
        train_crop_mode=None if crop_mode == 'pad' else crop_mode,
        interpolation=data_config['interpolation'],
        mean=data_config['mean'],
        std=data_config['std'],
        **augmentation,
    )
    if crop_mode == 'pad':
        transform.transforms[0] = transforms.Compose([
            transforms.Resize((height, width), interpolation=str_to_interp_mode(data_config['interpolation'])),
            transforms.RandomCrop((height, width), padding=(width // 8, height // 8)),
        ])
    return transform
