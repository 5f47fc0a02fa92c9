"""Nets in files that other programs read, compared with the model before they are kept.

A file holds one depth as a plain net, or, in ONNX, several depths and an input that switches between them.
"""
import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from ..data.datasets import load_image_data
from ..evaluation.batches import load_batches
from ..models.load import load_model, saved_results, warn_of_untrained
from ..utils.costs import count_costs
from ..utils.errors import InputError
from ..utils.files import staged_folder
from ..utils.schema import judge, number
from ..version import __version__
from .formats import FORMATS, open_onnx, require_packages, save_onnx
from .int8 import Int8Images, load_int8_images, measure_loss, spread

__all__ = ['ExportMismatchError', 'describe_net', 'export', 'export_model', 'load_images']


_logger = logging.getLogger(__name__)
_ROW = ('depth', 'blocks', 'macs', 'top1', 'top5', 'float_top1')


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
        rows = spread(num, len(image_data.validation))
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


def describe_net(
        model: nn.Module,
        depth: int | str | Sequence[int],
        results: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Describe what an exported file takes, gives, and is.

    Args:
        model: Dynamic-depth model.
        depth: Depths in the file, as for the model's `forward`.
        results: Results of these very weights, rows with depth, top1 and others.

    Returns:
        input and output in words, timm's preprocessing (input_size, mean, std, interpolation, crop_pct, crop_mode),
        model, num_classes, library, and base_model and label_names if known. Of one depth also depth, blocks, macs (of
        one image), temperature (that the logits are divided by), and top1, top5 (in percent) and float_top1 (if top1
        is of int8) as far as they are known; of several depths `depths`, rows of these.

    Raises:
        InputError: If the model has no such depth.
    """
    depths, single = model.resolve_depths(depth)
    data_config = resolve_input_data_config(model)
    channels, height, width = data_config['input_size']
    colours = {1: 'grey', 3: 'RGB'}.get(channels, f'{channels} channels')
    known = {row['depth']: row for row in results}
    rows = [
        {key: value for key, value in {**row, **known.get(row['depth'], {})}.items() if key in _ROW}
        | {'temperature': model.temperature(row['depth'])}
        for row in count_costs(model, data_config['input_size']) if row['depth'] in depths
    ]
    switch = '' if single else '; depth: int64 [], runs the deepest net that is not deeper, or the shallowest'
    names = model.pretrained_cfg.get('label_names')
    return {
        'input': f'images: float32 [B, {channels}, {height}, {width}], {colours}, (value / 255 - mean) / std{switch}',
        'output': f'logits: float32 [B, {model.num_classes}], before the softmax, divided by the temperature',
        **{key: list(value) if isinstance(value, tuple) else value for key, value in data_config.items()},
        'model': model.pretrained_cfg['architecture'],
        'num_classes': model.num_classes,
        **({'base_model': model.base_models} if model.base_models else {}),
        'library': f'timm_ddnn {__version__}, timm {timm.__version__}, torch {torch.__version__}',
        **({'label_names': names} if names and len(names) == model.num_classes else {}),
        **(rows[0] if single else {'depths': rows}),
    }


def export(
        model: nn.Module,
        depth: int | str | Sequence[int],
        folder: str | Path,
        *,
        format: str,
        images: torch.Tensor,
        dynamic_batch: bool = False,
        int8: Int8Images | None = None,
        tolerance: float = 1e-4,
        max_loss: float = 0.5,
        overwrite: bool = False,
        results: Iterable[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Write depths to files, and compare what each file computes with the model.

    Several depths become one ONNX file, MODEL.onnx, which stores what they share once and has a second input, `depth`.
    In other formats they become a file each, MODEL-DEPTH, as one depth does in every format. The files are written when
    all are right, else none is, and files of an earlier export stay. The description of `describe_net` is in their
    metadata: in ONNX as metadata_props, each value as JSON unless it is text, in the other two as the extra file
    'metadata.json'. Logits are divided by the temperature of their depth, so that their softmax is calibrated.

    In int8, MODEL-int8.onnx or MODEL-DEPTH-int8.onnx, a file is judged by its accuracy on held-out images. Logits on
    `images` are those of the model but for what int8 costs, so that their difference is stated alone; that of several
    images at once is judged against one at a time.

    Args:
        model: Dynamic-depth model.
        depth: As for the model's `forward`; one depth as such is one net without the input `depth`.
        folder: Where to write, made if it is not there.
        format: 'onnx', 'torch-export' or 'torchscript'.
        images: Images to compare with, [N, C, H, W], as `load_images` gives them.
        dynamic_batch: Whether the file takes any number of images, and not one alone. TorchScript, a file of several
            depths and one in int8 always do.
        int8: Images to quantize with, for a file in int8; a file in float32 if None.
        tolerance: The greatest difference of logits allowed, >= 0, in parts of the greatest absolute logit.
        max_loss: The most top-1 accuracy that a depth may lose by int8, in points of percent, >= 0.
        overwrite: Whether files of these names may be replaced.
        results: As for `describe_net`.

    Returns:
        For each depth: file, format, depth, blocks, bytes (of the file), images (compared), batch_sizes,
        max_difference, allowed (both in logits; None in int8), top1_agreement (in percent); in int8 also top1,
        float_top1 (in percent) and held_out_images.

    Raises:
        InputError: If the model has no such depth, there is no such format or a package that it needs, int8 is not
            possible, or the images are of another size than the model's.
        FileExistsError: If a file is there already, and may not be replaced.
        ExportMismatchError: If a file computes something else, loses too much by int8, or does not run.
    """
    if format not in FORMATS:
        raise InputError(f'format must be one of {", ".join(FORMATS)}, got {format!r}')
    kind = FORMATS[format]
    if int8 is not None and format != 'onnx':
        raise InputError(f"format must be 'onnx' for int8, got {format!r}")
    judge(tolerance, number(0), 'tolerance')
    judge(max_loss, number(0, 100), 'max_loss')
    require_packages(f'format {format!r}', kind.packages)
    depths, single = model.resolve_depths(depth)
    size = tuple(resolve_input_data_config(model)['input_size'])
    if not len(images) or tuple(images.shape[1:]) != size:
        raise InputError(f'images must be [N, {", ".join(map(str, size))}], got {list(images.shape)}')
    suffix = ('' if int8 is None else '-int8') + kind.suffix
    name = model.pretrained_cfg['architecture']
    one_file = kind.has_depths and not single
    contents = {f'{name}{suffix}': depths} if one_file else {f'{name}-{d}{suffix}': d for d in depths}
    there = [str(Path(folder, file)) for file in contents if Path(folder, file).exists()]
    if there and not overwrite:
        raise FileExistsError(f'files must be new unless they may be replaced (--overwrite), got {", ".join(there)}')
    dynamic_batch = dynamic_batch or one_file or int8 is not None or format == 'torchscript'
    if format == 'torchscript':
        _logger.warning('TorchScript is deprecated by PyTorch and may break with Python 3.14: prefer torch-export.')
    warn_of_untrained(model, depths)
    model = copy.deepcopy(model).to('cpu', torch.float32, memory_format=torch.contiguous_format).eval()
    images = images.to('cpu', torch.float32)

    rows = []
    with staged_folder(folder) as temporary:
        for file, content in contents.items():
            inside = model.resolve_depths(content)[0]
            nets = _extract(model, inside)
            measured: dict[int, dict[str, Any]] = {}
            if int8 is None:
                metadata = dict(describe_net(model, content, results), dynamic_batch=dynamic_batch)
                kind.write(temporary / file, nets, images, dynamic_batch, metadata)
            else:
                from .quantize import quantize  # needs the packages of the format

                graph = quantize(nets, int8.calibration)
                measured = measure_loss(open_onnx(graph.SerializeToString()), nets, int8.held_out, max_loss)
                metadata = dict(describe_net(model, content, measured.values()), dynamic_batch=True)
                save_onnx(temporary / file, graph, metadata)
            run = kind.open(temporary / file)
            rows += [
                {
                    'file': str(Path(folder, file)),
                    'format': format,
                    'depth': d,
                    'blocks': list(model.blocks(d)),
                    'bytes': (temporary / file).stat().st_size,
                    **_compare(run, file, model, d, images, dynamic_batch, tolerance, int8 is not None),
                    **measured.get(d, {}),
                }
                for d in inside
            ]
    return rows


def _extract(model: nn.Module, depths: Sequence[int]) -> dict[int, nn.Module]:
    """Copy the plain nets of some depths; where a temperature was fitted, logits are divided by it."""
    nets = {depth: model.extract(depth).eval() for depth in depths}
    temperatures = {depth: model.temperature(depth) for depth in depths}
    if any(temperature != 1 for temperature in temperatures.values()):  # then at all: they are merged node by node
        for depth, net in nets.items():
            divisor = torch.full([net.num_classes], temperatures[depth])  # a scalar of 1 would be optimized away
            net.register_buffer('temperature', divisor)
            net.register_forward_hook(lambda net, _, logits: logits / net.temperature)
    return nets


@torch.no_grad()
def _compare(
        run: Callable[[torch.Tensor, int], torch.Tensor],
        name: str,
        model: nn.Module,
        depth: int,
        images: torch.Tensor,
        dynamic_batch: bool,
        tolerance: float,
        is_int8: bool,
) -> dict[str, Any]:
    """Compare the logits of a file with the model's, see `export`."""
    expected = model(images, depth=depth) / model.temperature(depth)
    # 1, and a size that the net was not exported with
    batch_sizes = [1, max(3, len(images))] if dynamic_batch else [1]
    allowed = tolerance * expected.abs().max().item()
    reference, differences, agreements = expected, [], []
    for size in batch_sizes:
        index = torch.arange(max(size, len(images))) % len(images)
        try:
            logits = torch.cat([run(batch, depth) for batch in images[index].split(size)])
        except Exception as e:  # each of the programs that run files has errors of its own
            raise ExportMismatchError(f'{name} does not run on {size} images at once: {e}') from e
        if logits.shape != expected[index].shape:
            raise ExportMismatchError(f'{name} gives {list(logits.shape)} for {list(expected[index].shape)}')
        if is_int8 and size == 1:  # other sizes may not differ more from it than it does from float
            reference, allowed = logits, max(allowed, (logits - expected).abs().max().item())
        difference = (logits - reference[index]).abs().max().item()
        agreement = 100 * (logits.argmax(1) == expected[index].argmax(1)).float().mean().item()
        if not difference <= allowed:  # NaN is not
            raise ExportMismatchError(
                f'{name} is not written: loaded again, it differs from depth {depth} of the model by {difference:.3g} '
                f'in a logit, where {allowed:.3g} is allowed ({agreement:.1f} % of the best classes agree)'
            )
        differences.append((logits - expected[index]).abs().max().item())
        agreements.append(agreement)
    return {
        'images': len(images), 'batch_sizes': batch_sizes, 'max_difference': max(differences),
        'allowed': None if is_int8 else allowed, 'top1_agreement': round(min(agreements), 4),
    }


def export_model(
        name: str,
        depth: int | str,
        format: str,
        output: str | Path = '.',
        *,
        data: str | None = None,
        num_images: int = 16,
        int8: bool = False,
        num_held_out: int = 5000,
        **kwargs: Any,
) -> list[dict[str, Any]]:
    """Load a model with its weights and write some of its depths to files, see `export`.

    Args:
        name: As for `load_model`.
        depth: One of the model's depths or 'all'.
        format: 'onnx', 'torch-export' or 'torchscript'.
        output: Folder to write to.
        data: Data set with images to compare with, see `load_images`; and for int8, see `load_int8_images`.
        num_images: The most images to compare with.
        int8: Whether the file is in int8.
        num_held_out: The most images to measure what int8 costs on.
        **kwargs: Further arguments of `export`.

    Returns:
        A row for each depth, as `export`.

    Raises:
        InputError: If there is no such model, depth, format or data, or a package is missing.
        OSError: If a file cannot be read or written.
        ExportMismatchError: If a file computes something else than the model.
        Int8LossError: If a depth loses too much by int8.
    """
    if int8 and data is None:
        raise InputError('data must be given for int8 (--data), with images to train and to validate, got none')
    model = load_model(name)
    model.resolve_depths(depth)
    images = load_images(model, data, num_images)
    return export(
        model, depth, output, format=format, images=images, results=saved_results(model),
        int8=load_int8_images(model, data, num_held_out) if int8 else None, **kwargs)
