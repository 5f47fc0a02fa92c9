"""Plain nets in files that other programs read, compared with the model before they are kept."""
import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from ..data.datasets import load_image_data
from ..evaluation.batches import load_batches
from ..models.load import load_model, saved_results, warn_of_untrained
from ..utils.errors import InputError
from ..utils.files import staged_folder
from ..version import __version__
from .formats import FORMATS, Format, require_packages

__all__ = ['ExportMismatchError', 'describe_net', 'export', 'export_model', 'load_images']


_logger = logging.getLogger(__name__)


class ExportMismatchError(InputError):
    """A file that computes something else than the model."""

    exit_status = 1


def load_images(model: nn.Module, data: str | None = None, num: int = 16) -> torch.Tensor:
    """Load some real images as the model takes them.

    Args:
        model: Dynamic-depth model.
        data: Data set, as for `load_image_data`, of whose validation split images at equal distances are taken. If
            None, two photographs that come with scikit-learn, and their mirror images.
        num: The most images to take from a data set, >= 1.

    Returns:
        [N, C, H, W].

    Raises:
        FileNotFoundError: If there is no such data set.
        InputError: If it cannot be read, or none is given and scikit-learn is not installed.
    """
    if data is not None:
        image_data = load_image_data(data, training=False)
        count = len(image_data.validation)
        rows = np.linspace(0, count - 1, min(num, count)).astype(int)
        return torch.cat([images for images, _ in load_batches(image_data, 'validation', model, num, rows=rows)])
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError:
        raise InputError('data must be given where scikit-learn, which has two photographs, is not installed') from None
    data_config = resolve_input_data_config(model)
    transform, mode = create_transform(**data_config), 'L' if data_config['input_size'][0] == 1 else 'RGB'
    photographs = torch.stack([
        transform(Image.fromarray(photograph).convert(mode)) for photograph in load_sample_images().images])
    return torch.cat([photographs, photographs.flip(-1)])


def describe_net(model: nn.Module, depth: int, results: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Describe what an exported file of one depth takes, gives, and is.

    Args:
        model: Dynamic-depth model.
        depth: One of its depths.
        results: Results of these very weights, rows with depth, top1 and top5.

    Returns:
        input and output in words, timm's preprocessing (input_size, mean, std, interpolation, crop_pct, crop_mode),
        model, depth, blocks, num_classes, library; and if known, base_model, label_names, top1 and top5 (in percent).

    Raises:
        ValueError: If the model has no such depth.
    """
    data_config = resolve_input_data_config(model)
    channels, height, width = data_config['input_size']
    colours = {1: 'grey', 3: 'RGB'}.get(channels, f'{channels} channels')
    description = {
        'input': f'images: float32 [B, {channels}, {height}, {width}], {colours}, (value / 255 - mean) / std',
        'output': f'logits: float32 [B, {model.num_classes}], before the softmax',
        **{key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()},
        'model': model.pretrained_cfg['architecture'],
        'depth': model.resolve_depth(depth),
        'blocks': list(model.blocks(depth)),
        'num_classes': model.num_classes,
        **({'base_model': model.base_models} if model.base_models else {}),
        'library': f'timm_ddnn {__version__}, timm {timm.__version__}, torch {torch.__version__}',
    }
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        description['label_names'] = names
    for row in results:
        if row['depth'] == depth:
            description |= {key: row[key] for key in ('top1', 'top5') if key in row}
    return description


def export(
        model: nn.Module,
        depth: int | str | Sequence[int],
        folder: str | Path,
        *,
        format: str,
        images: torch.Tensor,
        dynamic_batch: bool = False,
        tolerance: float = 1e-4,
        overwrite: bool = False,
        results: Iterable[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Write the plain nets of some depths to a file each, and compare what each file computes with the model.

    The files have the name MODEL-DEPTH and the suffix of the format. They are written when all are right, else none is,
    and files of an earlier export stay. The description of `describe_net` is in their metadata: in ONNX as
    metadata_props, each value as JSON unless it is text, in the other two as the extra file 'metadata.json'.

    Args:
        model: Dynamic-depth model.
        depth: As for the model's `forward`.
        folder: Where to write, made if it is not there.
        format: 'onnx', 'torch-export' or 'torchscript'.
        images: Images to compare with, [N, C, H, W], as `load_images` gives them.
        dynamic_batch: Whether the file takes any number of images, and not one alone. TorchScript always does.
        tolerance: The greatest difference of logits allowed, >= 0, in parts of the greatest absolute logit.
        overwrite: Whether files of these names may be replaced.
        results: As for `describe_net`.

    Returns:
        For each file: file, format, depth, blocks, bytes, images (compared), batch_sizes, max_difference, allowed (both
        in logits), top1_agreement (in percent).

    Raises:
        InputError: If the model has no such depth, there is no such format or a package that it needs, or the images
            are of another size than the model's.
        FileExistsError: If a file is there already, and may not be replaced.
        ExportMismatchError: If a file computes something else or does not run.
    """
    if format not in FORMATS:
        raise InputError(f'format must be one of {", ".join(FORMATS)}, got {format!r}')
    kind = FORMATS[format]
    require_packages(f'format {format!r}', kind.packages)
    depths, _ = model.resolve_depths(depth)
    size = tuple(resolve_input_data_config(model)['input_size'])
    if not len(images) or tuple(images.shape[1:]) != size:
        raise InputError(f'images must be [N, {", ".join(map(str, size))}], got {list(images.shape)}')
    names = {d: f'{model.pretrained_cfg["architecture"]}-{d}{kind.suffix}' for d in depths}
    there = [str(Path(folder, name)) for name in names.values() if Path(folder, name).exists()]
    if there and not overwrite:
        raise FileExistsError(f'files must be new unless they may be replaced (--overwrite), got {", ".join(there)}')
    dynamic_batch = dynamic_batch or format == 'torchscript'
    if format == 'torchscript':
        _logger.warning('TorchScript is deprecated by PyTorch and may break with Python 3.14: prefer torch-export.')
    warn_of_untrained(model, depths)
    model = copy.deepcopy(model).to('cpu', torch.float32, memory_format=torch.contiguous_format).eval()
    images = images.to('cpu', torch.float32)

    rows = []
    with staged_folder(folder) as temporary:
        for d, name in names.items():
            file = temporary / name
            metadata = dict(describe_net(model, d, results), dynamic_batch=dynamic_batch)
            kind.write(file, model.extract(d).eval(), images, dynamic_batch, metadata)
            rows.append({
                'file': str(Path(folder, name)),
                'format': format,
                'depth': d,
                'blocks': list(model.blocks(d)),
                'bytes': file.stat().st_size,
                **_compare(file, kind, model, d, images, dynamic_batch, tolerance),
            })
    return rows


@torch.no_grad()
def _compare(
        file: Path,
        kind: Format,
        model: nn.Module,
        depth: int,
        images: torch.Tensor,
        dynamic_batch: bool,
        tolerance: float,
) -> dict[str, Any]:
    """Compare the logits of a file with the model's, see `export`."""
    run = kind.open(file)
    expected = model(images, depth=depth)
    # 1, and a size that the net was not exported with
    batch_sizes = [1, max(3, len(images))] if dynamic_batch else [1]
    allowed = tolerance * expected.abs().max().item()
    differences, agreements = [], []
    for size in batch_sizes:
        index = torch.arange(max(size, len(images))) % len(images)
        try:
            logits = torch.cat([run(batch) for batch in images[index].split(size)])
        except Exception as e:  # each of the programs that run files has errors of its own
            raise ExportMismatchError(f'{file.name} does not run on {size} images at once: {e}') from e
        if logits.shape != expected[index].shape:
            raise ExportMismatchError(f'{file.name} gives {list(logits.shape)} for {list(expected[index].shape)}')
        differences.append((logits - expected[index]).abs().max().item())
        agreements.append(100 * (logits.argmax(1) == expected[index].argmax(1)).float().mean().item())
    difference, agreement = float(np.max(differences)), min(agreements)
    if not difference <= allowed:  # NaN is not
        raise ExportMismatchError(
            f'{file.name} is not written: loaded again, it differs from depth {depth} of the model by {difference:.3g} '
            f'in a logit, where {allowed:.3g} is allowed ({agreement:.1f} % of the best classes agree)'
        )
    return {
        'images': len(images), 'batch_sizes': batch_sizes, 'max_difference': difference, 'allowed': allowed,
        'top1_agreement': round(agreement, 4),
    }


def export_model(
        name: str,
        depth: int | str,
        format: str,
        output: str | Path = '.',
        *,
        data: str | None = None,
        num_images: int = 16,
        **kwargs: Any,
) -> list[dict[str, Any]]:
    """Load a model with its weights and write some of its depths to files, see `export`.

    Args:
        name: As for `load_model`.
        depth: One of the model's depths or 'all'.
        format: 'onnx', 'torch-export' or 'torchscript'.
        output: Folder to write to.
        data: Data set with images to compare with, see `load_images`.
        num_images: The most images to take from it.
        **kwargs: Further arguments of `export`.

    Returns:
        A row for each file, as `export`.

    Raises:
        InputError: If there is no such model, depth, format or data, or a package is missing.
        OSError: If a file cannot be read or written.
        ExportMismatchError: If a file computes something else than the model.
    """
    model = load_model(name)
    model.resolve_depths(depth)
    images = load_images(model, data, num_images)
    return export(model, depth, output, format=format, images=images, results=saved_results(model), **kwargs)
