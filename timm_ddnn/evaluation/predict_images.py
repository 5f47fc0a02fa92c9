"""Classes and probabilities for images without labels: files, folders, PIL images.

The pass over a data set with labels is in `predict.py`.
"""
import glob
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from PIL import ImageDraw, ImageFont, ImageOps
from timm.data import create_transform, resolve_input_data_config
from timm.utils import natural_key
from torch import nn
from torch.utils.data import Dataset

from ..cascade import Cascade
from ..data.folders import check_encoding, image_extensions, list_entries
from ..data.images import convert_image, describe_error, image_mode, open_image
from ..data.loader import create_loader, loading, normalize
from ..models.load import class_names, load_model
from ..utils.environment import find_device
from ..utils.errors import InputError
from ..utils.files import staged_folder
from ..utils.modules import eval_mode
from .predict import autocast

__all__ = ['Prediction', 'find_images', 'predict']


class Prediction(NamedTuple):
    """What one depth says of an image, or why the image cannot be read.

    Attributes:
        image: Its path; of an image that was not given by a path, its position among all.
        depth: The depth, in a cascade the one at which the image ended. None if the image cannot be read.
        labels: Names of the most probable classes, the best first; their indices as text if the model has no names.
        classes: Indices of these classes.
        probabilities: Their probabilities, [0, 1], calibrated if the model has temperatures.
        error: Why the image cannot be read, None if it was.
    """
    image: str | int
    depth: int | None = None
    labels: tuple[str, ...] = ()
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


def find_images(path: str | os.PathLike) -> list[str]:
    """Find the images that a path stands for.

    Args:
        path: A file, whatever its name; a folder, for the files in it and its sub-folders that are images by their
            suffix; or a pattern of both, such as 'photos/**/*.jpg'. Links to folders are followed only if given.

    Raises:
        InputError: If there are none, or a name is not UTF-8.
    """
    path = os.fspath(path)
    matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True), key=natural_key)
    # a dictionary: a pattern may match a folder and what is in it
    images = list(dict.fromkeys(
        file for match in matches for file in (_walk(match) if os.path.isdir(match) else [match])))
    for image in images:
        check_encoding(image)
    if not images:
        raise InputError(f'paths must be images, folders with images or patterns that match some, got {path!r}')
    return images


def _walk(folder: str) -> Iterator[str]:
    for entry in list_entries(Path(folder)):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in image_extensions():
            yield entry.path


@torch.inference_mode()
def predict(
        model: nn.Module | str | os.PathLike,
        images: str | os.PathLike | PIL.Image.Image | Iterable[str | os.PathLike | PIL.Image.Image],
        *,
        depth: int | str | Sequence[int] | None = None,
        cascade: Sequence[int] | None = None,
        threshold: float | None = None,
        top_k: int = 5,
        batch_size: int = 64,
        num_workers: int = 0,
        device: str | None = None,
        precision: str = 'no',
        save: str | os.PathLike | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Prediction]:
    """Classify images at some depths of a model, or by a cascade.

    Images are turned upright as their EXIF data says and prepared as for validation. One that cannot be read ends
    nothing: its row has the error.

    Args:
        model: Dynamic-depth model, or a name as for `load_model`.
        images: One or several: PIL images, and paths as for `find_images`.
        depth: A depth, several, or 'all' in one pass. The model's default if None.
        cascade: Depths of a `Cascade`, the shallowest first, in the place of `depth`.
        threshold: Its threshold, [0, 1].
        top_k: Classes per row, >= 1; all if the model has fewer.
        batch_size: Images per batch.
        num_workers: Worker processes that read images.
        device: As for `find_device`; a model that is given as such stays where it is if None.
        precision: 'no', or 'bf16' for autocast to bfloat16.
        save: New or empty folder for JPEG files of the images with the labels below them.
        progress: Wraps the batches, to show how far it is: `tqdm.tqdm`, for example.

    Returns:
        A row for each image and depth, in the order of the images, the deepest first.

    Raises:
        InputError: If the model, a path, a depth or the cascade is not what it must be, or the model gives logits that
            are not finite.
        OSError: If a file cannot be written.
    """
    if (cascade is None) != (threshold is None) or (depth is not None and cascade is not None):
        raise InputError(
            f'cascade and threshold must be given together, and without depth, got {cascade}, {threshold} and {depth}')
    if top_k < 1:
        raise InputError(f'top_k must be at least 1, got {top_k}')
    items = []
    for image in [images] if isinstance(images, str | os.PathLike | PIL.Image.Image) else images:
        items += [image] if isinstance(image, PIL.Image.Image) else find_images(image)
    if isinstance(model, str | os.PathLike):
        model = load_model(os.fspath(model)).to(find_device(device), memory_format=torch.channels_last)
    elif device is not None:
        model.to(find_device(device))
    net = Cascade(model, cascade, threshold) if cascade is not None else model
    depths, _ = model.resolve_depths(depth)
    names = class_names(model) or [str(i) for i in range(model.num_classes)]
    data_config = resolve_input_data_config(model)
    place = next(model.parameters()).device
    loader = create_loader(_Files(items, data_config), batch_size, training=False, num_workers=num_workers)

    rows: list[Prediction] = []
    rest = iter(enumerate(items))
    with staged_folder(save, new=True) if save else nullcontext() as folder, eval_mode(model), loading():
        for pixels, errors in progress(loader):
            readable = [i for i, error in enumerate(errors) if not error]
            [(x, _)] = normalize([(pixels[readable], torch.tensor(readable))], data_config, place)
            with autocast(place, precision):
                answers = iter(_classify(net, x, depths, top_k) if readable else ())
            for error in errors:
                position, item = next(rest)
                name = position if isinstance(item, PIL.Image.Image) else item
                own = [Prediction(name, error=error)] if error else [
                    Prediction(name, at, tuple(names[i] for i in classes), tuple(classes), tuple(probabilities))
                    for at, classes, probabilities in next(answers)
                ]
                if folder and not error:
                    stem = f'{position:0{len(str(len(items)))}}'  # in their order, and no two of one name
                    stem += '' if name == position else f'_{Path(name).stem}'
                    _draw(_read(item, 'RGB'), own).save(folder / f'{stem}.jpg', quality=95)
                rows += own
    return rows


def _classify(
        net: nn.Module | Cascade,
        x: torch.Tensor,
        depths: Sequence[int],
        top_k: int,
) -> Iterator[Iterator[tuple[int, list[int], list[float]]]]:
    """Classify images [B, C, H, W]: of each, for each depth, the best classes and their probabilities."""
    if isinstance(net, Cascade):
        logits, steps = net(x)
        logits, depths = logits[:, None], [(net.depths[i],) for i in steps.tolist()]
    else:
        outputs = net(x, depth=depths)
        logits = torch.stack([output.logits.float() / net.temperature(d) for d, output in outputs.items()], dim=1)
        depths = [depths] * len(x)
    if not logits.isfinite().all():
        raise InputError('the model gives logits that are not finite')
    probabilities, classes = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
    return map(zip, depths, classes.tolist(), probabilities.tolist())


def _read(image: str | PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Read an image upright."""
    upright = ImageOps.exif_transpose(image) if isinstance(image, PIL.Image.Image) else open_image(image)
    return convert_image(upright, mode)


class _Files(Dataset):
    """Images as bytes [C, H, W] for `normalize`, and '' or why one cannot be read."""

    seed = None

    def __init__(self, items: list[str | PIL.Image.Image], data_config: dict[str, Any]) -> None:
        self.items = items
        self.size = data_config['input_size']
        self.mode = image_mode(self.size[0])
        self.transform = create_transform(**data_config, normalize=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, str]:
        try:
            image = _read(self.items[key[1]], self.mode)
        except Exception as e:  # PIL's decoders raise many types, and none that they share
            return torch.zeros(self.size, dtype=torch.uint8), describe_error(e)
        return self.transform(image), ''


def _draw(image: PIL.Image.Image, rows: Iterable[Prediction]) -> PIL.Image.Image:
    """Add a strip with labels and probabilities below an image."""
    text = '\n'.join(
        f'{label} {100 * probability:.1f} % (depth {row.depth})'
        for row in rows for label, probability in zip(row.labels, row.probabilities, strict=True))
    font = ImageFont.load_default(max(12, image.width // 32))
    right, bottom = map(math.ceil, ImageDraw.Draw(image).multiline_textbbox((4, 4), text, font)[2:])
    drawn = PIL.Image.new('RGB', (max(image.width, right + 4), image.height + bottom + 8), 'white')
    drawn.paste(image)
    ImageDraw.Draw(drawn).multiline_text((4, image.height + 4), text, 'black', font)
    return drawn
