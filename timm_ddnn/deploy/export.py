"""Plain nets in files that other programs read, compared with the model before they are kept."""
import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from ..data.datasets import load_image_data
from ..data.images import Images
from ..models.load import load_model, saved_results, warn_of_untrained
from ..utils.files import staged_folder
from ..version import __version__

__all__ = ['FORMATS', 'ExportMismatchError', 'describe_net', 'export', 'export_model', 'load_images']


FORMATS = {'onnx': '.onnx', 'torch-export': '.pt2', 'torchscript': '.pt'}
METADATA = 'metadata.json'  # name of the extra file in the formats of torch
_logger = logging.getLogger(__name__)


class ExportMismatchError(RuntimeError):
    """A file that computes something else than the model."""


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
        ValueError: If it cannot be read, or none is given and scikit-learn is not installed.
    """
    data_config = resolve_input_data_config(model)
    transform, channels = create_transform(**data_config), data_config['input_size'][0]
    if data is not None:
        images = Images(load_image_data(data, training=False), 'validation', transform, in_chans=channels)
        rows = np.linspace(0, len(images) - 1, min(num, len(images))).astype(int)
        return torch.stack([images[0, row][0] for row in rows.tolist()])
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError:
        raise ValueError('data must be given where scikit-learn, which has two photographs, is not installed') from None
    photographs = [Image.fromarray(image).convert('L' if channels == 1 else 'RGB')
                   for image in load_sample_images().images]
    images = torch.stack([transform(photograph) for photograph in photographs])
    return torch.cat([images, images.flip(-1)])


def describe_net(model: nn.Module, depth: int) -> dict[str, Any]:
    """Describe what an exported file of one depth takes, gives, and is.

    Args:
        model: What `load_model` returned.
        depth: One of its depths.

    Returns:
        input and output in words, timm's preprocessing (input_size, mean, std, interpolation, crop_pct, crop_mode),
        model, depth, blocks, num_classes, library; and if known, label_names, top1 and top5 (in percent).

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
        'library': f'timm_ddnn {__version__}, timm {timm.__version__}, torch {torch.__version__}',
    }
    names = model.pretrained_cfg.get('label_names')
    if names and len(names) == model.num_classes:
        description['label_names'] = names
    for row in saved_results(model):
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
) -> list[dict[str, Any]]:
    """Write the plain nets of some depths to a file each, and compare what each file computes with the model.

    The files have the name MODEL-DEPTH and the suffix of the format. They are written when all are right, else none is,
    and files of an earlier export stay. The description of `describe_net` is in their metadata: in ONNX as
    metadata_props, each value as JSON unless it is text, in the other two as the extra file 'metadata.json'.

    Args:
        model: What `load_model` returned.
        depth: As for the model's `forward`.
        folder: Where to write, made if it is not there.
        format: 'onnx', 'torch-export' or 'torchscript'.
        images: Images to compare with, [N, C, H, W], as `load_images` gives them.
        dynamic_batch: Whether the file takes any number of images, and not one alone. TorchScript always does.
        tolerance: The greatest difference of logits allowed, >= 0, in parts of the greatest absolute logit.

    Returns:
        For each file: file, format, depth, blocks, bytes, images (compared), batch_sizes, max_difference, allowed (both
        in logits), top1_agreement (in percent).

    Raises:
        ValueError: If the model has no such depth, there is no such format or a package that it needs, or the images
            are of another size than the model's.
        ExportMismatchError: If a file computes something else or does not run.
    """
    if format not in FORMATS:
        raise ValueError(f'format must be one of {", ".join(FORMATS)}, got {format!r}')
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if format == 'onnx' and not find_spec(name)]
    if missing:
        raise ValueError(f"format 'onnx' needs the packages {', '.join(missing)}: pip install 'timm-ddnn[export]'")
    depths, _ = model.resolve_depths(depth)
    size = tuple(resolve_input_data_config(model)['input_size'])
    if not len(images) or tuple(images.shape[1:]) != size:
        raise ValueError(f'images must be [N, {", ".join(map(str, size))}], got {list(images.shape)}')
    dynamic_batch = dynamic_batch or format == 'torchscript'
    if format == 'torchscript':
        _logger.warning('TorchScript is deprecated by PyTorch and may break with Python 3.14: prefer torch-export.')
    warn_of_untrained(model, depths)
    model = copy.deepcopy(model).to('cpu', torch.float32, memory_format=torch.contiguous_format).eval()
    images = images.to('cpu', torch.float32)

    results = []
    with staged_folder(folder) as temporary:
        for d in depths:
            file = temporary / f'{model.pretrained_cfg["architecture"]}-{d}{FORMATS[format]}'
            description = dict(describe_net(model, d), dynamic_batch=dynamic_batch)
            _write(file, format, model.extract(d).eval(), images, dynamic_batch, description)
            results.append({
                'file': str(Path(folder) / file.name),
                'format': format,
                'depth': d,
                'blocks': list(model.blocks(d)),
                'bytes': file.stat().st_size,
                **_compare(file, format, model, d, images, dynamic_batch, tolerance),
            })
    return results


@contextmanager
def _torchscript_is_deprecated() -> Iterator[None]:
    """Leave out what torch says of it for every module, `export` has said it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'`torch\.jit\.', FutureWarning)
        yield


def _write(
        file: Path,
        format: str,
        net: nn.Module,
        images: torch.Tensor,
        dynamic_batch: bool,
        description: dict[str, Any],
) -> None:
    # torch.export takes a size of 1 for a constant
    example = images[[0, -1]] if dynamic_batch else images[:1]
    if format == 'torchscript':
        with _torchscript_is_deprecated():
            torch.jit.trace(net, example).save(str(file), _extra_files={METADATA: json.dumps(description)})
        return
    shapes = ({0: torch.export.Dim('batch')},) if dynamic_batch else None
    if format == 'torch-export':
        program = torch.export.export(net, (example,), dynamic_shapes=shapes)
        torch.export.save(program, file, extra_files={METADATA: json.dumps(description)})
        return
    onnx_program = torch.onnx.export(
        net, (example,), dynamo=True, dynamic_shapes=shapes, input_names=['images'], output_names=['logits'],
        verbose=False,
    )
    onnx_program.model.metadata_props.update(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()})
    onnx_program.save(file, external_data=False)


def _open(file: Path, format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load a file as its users will, as a function from images to logits."""
    if format == 'onnx':
        from onnxruntime import InferenceSession
        session = InferenceSession(file, providers=['CPUExecutionProvider'])
        return lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])
    if format == 'torch-export':
        return torch.export.load(file).module()
    with _torchscript_is_deprecated():
        return torch.jit.load(file)


@torch.no_grad()
def _compare(
        file: Path,
        format: str,
        model: nn.Module,
        depth: int,
        images: torch.Tensor,
        dynamic_batch: bool,
        tolerance: float,
) -> dict[str, Any]:
    """Compare the logits of a file with the model's, see `export`."""
    run = _open(file, format)
    expected = model(images, depth=depth)
    # 1, and a size that the net was not exported with
    batch_sizes = [1, max(3, len(images))] if dynamic_batch else [1]
    allowed = tolerance * expected.abs().max().item()
    differences, agreements = [], []
    for size in batch_sizes:
        index = torch.arange(max(size, len(images))) % len(images)
        try:
            logits = torch.cat([run(batch) for batch in images[index].split(size)])
        except Exception as e:  # the programs that run the files raise many types, and none that they share
            raise ExportMismatchError(f'{file.name} does not run on {size} images at once: {e}') from e
        if logits.shape != expected[index].shape:
            raise ExportMismatchError(f'{file.name} gives {list(logits.shape)} for {list(expected[index].shape)}')
        differences.append((logits - expected[index]).abs().max().item())
        agreements.append(100 * (logits.argmax(1) == expected[index].argmax(1)).float().mean().item())
    difference, agreement = float(np.max(differences)), min(agreements)
    if not difference <= allowed:  # as is so if it is no number
        raise ExportMismatchError(
            f'{file.name}, loaded again, differs from depth {depth} of the model by {difference:.3g} in a logit, where '
            f'{allowed:.3g} is allowed ({agreement:.1f} % of the best classes agree): it is not written'
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
    """Load a model and write some of its depths to files, see `exporting.export`.

    Args:
        name: As for `cli.load_model`.
        depth: One of the model's depths or 'all'.
        format: 'onnx', 'torch-export' or 'torchscript'.
        output: Folder to write to.
        data: Data set with images to compare with, see `exporting.load_images`.
        num_images: The most images to take from it.
        **kwargs: Further arguments of `exporting.export`.

    Returns:
        A row for each file, as `exporting.export`.

    Raises:
        ValueError: If there is no such model, depth, format or data, or a package is missing.
        OSError: If a file cannot be read or written.
        ExportMismatchError: If a file computes something else than the model.
    """
    model = load_model(name)
    model.resolve_depths(depth)
    images = load_images(model, data, num_images)
    return export(model, depth, output, format=format, images=images, **kwargs)
