"""Images for training and evaluation, and augmentation that repeats exactly.

Everything random here is a function of (seed, epoch, index), whatever the number of worker processes. Where the images
come from is in `datasets.py`.
"""
import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
import torch
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch.utils.data import Dataset, get_worker_info
from torchvision import transforms

from ..utils.errors import InputError

if TYPE_CHECKING:
    from .datasets import ImageData

__all__ = [
    'ImageReadError', 'Images', 'convert_image', 'create_train_transform', 'describe_error', 'image_mode', 'open_image',
    'seeded',
]


class ImageReadError(InputError):
    """An image that cannot be read or decoded."""

    on_every_process = True

    def __init__(self, message: str) -> None:
        """Keep the message; a loader raises the error of a worker process anew, with a traceback as the message."""
        if 'in DataLoader worker process' in message:
            message = message.strip().splitlines()[-1].partition(': ')[2]
        super().__init__(message)


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Make the generators of Python, NumPy and PyTorch (its CPU's) a function of some integers, and restore them after.

    In a worker of a loader, which draws for nothing else, they are not restored: that takes half of the time.

    Args:
        *key: Integers >= 0, for example (seed, epoch, index).
    """
    states = None if get_worker_info() else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    try:
        random.seed(words[0])
        np.random.seed(words[1])
        torch.default_generator.manual_seed(words[2])
        yield
    finally:
        if states:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


def open_image(path: str | None = None, bytes: bytes | None = None) -> PIL.Image.Image:
    """Open an image, turned upright as a camera says in it; its pixels are not decoded yet.

    Args:
        path: The file.
        bytes: Its content, if it is in memory.
    """
    image = PIL.Image.open(path if bytes is None else io.BytesIO(bytes))
    if image.getexif().get(PIL.ExifTags.Base.Orientation):
        image = PIL.ImageOps.exif_transpose(image)
    return image


def convert_image(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Convert an image to grey ('L') or colour ('RGB').

    Args:
        image: Image of 8 bits per channel, or of one bit.
        mode: 'L' or 'RGB'.

    Raises:
        InputError: If the image has deeper values, which PIL would cut off at 255.
    """
    if image.mode[0] in 'IF':
        raise InputError(f'pixels must be of 8 bits, got mode {image.mode!r}: scale them to 0..255')
    if image.mode == mode:
        image.load()
        return image
    return image.convert(mode)


def image_mode(in_chans: int) -> str:
    """Choose the mode of PIL that images are converted to for a model.

    Args:
        in_chans: Channels of its input, 1 (grey) or 3 (RGB).

    Raises:
        InputError: If `in_chans` is neither 1 nor 3.
    """
    if in_chans not in (1, 3):
        raise InputError(f'in_chans must be 1 or 3, got {in_chans!r}')
    return 'L' if in_chans == 1 else 'RGB'


def describe_error(error: Exception) -> str:
    """Say in one line why an image cannot be read."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return 'unknown format'
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


class Images(Dataset):
    """Transformed images of a split. An item is a function of (seed, epoch, index) and of nothing else."""

    def __init__(
            self,
            data: 'ImageData',
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
            InputError: If `in_chans` is neither 1 nor 3.
        """
        import datasets

        self.data = getattr(data, split).cast_column(data.input_key, datasets.Image(decode=False))
        self.input_key = data.input_key
        self.target_key = data.target_key
        self.transform = transform
        self.mode = image_mode(in_chans)
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
            image = convert_image(open_image(**row[self.input_key]), self.mode)
        except Exception as e:  # PIL's decoders raise many types, and none that they share
            raise ImageReadError(f'image {self._describe(index)} cannot be read: {describe_error(e)}') from e
        with nullcontext() if self.seed is None else seeded(self.seed, epoch, index):
            return self.transform(image), row[self.target_key]

    def _describe(self, index: int) -> str:
        file = self.data[index][self.input_key] or {}
        return f'in row {index} of split {str(self.data.split)!r} ({file.get("path") or "no file name"})'


def create_train_transform(
        data_config: dict[str, Any],
        *,
        crop_mode: str,
        re_prob: float = 0.0,
        **augmentation: Any,
) -> Callable[[Any], torch.Tensor]:
    """Create the transform of training images: timm's, and for small images the crop that CIFAR is trained with.

    Args:
        data_config: As `timm.data.resolve_data_config` gives it.
        crop_mode: 'pad' (resize, pad by an eighth of the size with zeros, crop at random) or one of timm's modes 'rrc',
            'rkrc' and 'rkrr'.
        re_prob: Probability of random erasing, [0, 1].
        **augmentation: Further arguments of `timm.data.create_transform`.

    Returns:
        The transform of a PIL image to bytes [C, H, W], which are still to be normalized; with random erasing to
        [C + 1, H, W], the last channel being 1, or 0 where the image is erased.

    Raises:
        InputError: If there is a scale or a ratio of the crop, and the mode is 'pad', which has none; or timm has no
            such augmentation.
    """
    height, width = data_config['input_size'][-2:]
    given = [name for name in ('scale', 'ratio') if augmentation.get(name)]
    if crop_mode == 'pad' and given:
        raise InputError(f"{given[0]} must be for a crop mode such as 'rrc', got 'pad', the default up to 64 px")
    try:
        transform = create_transform(
            data_config['input_size'],
            is_training=True,
            train_crop_mode=None if crop_mode == 'pad' else crop_mode,
            interpolation=data_config['interpolation'],
            mean=data_config['mean'],
            normalize=False,
            **augmentation,
        )
    except (AssertionError, ValueError) as e:  # by which timm judges the policy
        raise InputError(f'--aa {augmentation.get("auto_augment")}: {e}') from e
    if crop_mode == 'pad':
        transform.transforms[0] = transforms.Compose([
            transforms.Resize((height, width), interpolation=str_to_interp_mode(data_config['interpolation'])),
            transforms.RandomCrop((height, width), padding=(width // 8, height // 8)),
        ])
    if re_prob:
        transform.transforms.append(AppendErasing(re_prob))
    return transform


class AppendErasing:
    """Appends a channel to an image that is 1, and 0 in the rectangle that timm's `RandomErasing` draws.

    What is erased is 0 after normalization, which no byte stands for before.
    """

    def __init__(self, probability: float) -> None:
        """Erase with a probability, [0, 1]."""
        self.erase = RandomErasing(probability, device='cpu')

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Map [C, H, W] to [C + 1, H, W]."""
        return torch.cat([image, self.erase(torch.ones_like(image[:1]))])
