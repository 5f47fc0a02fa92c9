"""The formats of exported files: how each is written, and how it is opened as its users will."""
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..utils.errors import InputError

__all__ = ['FORMATS', 'Format', 'require_packages']


METADATA = 'metadata.json'  # name of the extra file in the formats of torch
ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')


class Format(NamedTuple):
    """A format of exported files.

    Attributes:
        suffix: Suffix of the files.
        write: Writes a net: file, net, example images [N, C, H, W], whether the number of images is free, metadata.
        open: Loads a file as a function from images [B, C, H, W] to logits [B, num_classes].
        packages: What it needs besides torch.
    """
    suffix: str
    write: Callable[[Path, nn.Module, torch.Tensor, bool, dict[str, Any]], None]
    open: Callable[[Path], Callable[[torch.Tensor], torch.Tensor]]
    packages: tuple[str, ...] = ()


def require_packages(what: str, packages: tuple[str, ...]) -> None:
    """Check that packages are installed.

    Args:
        what: What needs them, for the error.
        packages: Their names.

    Raises:
        InputError: If one is not.
    """
    missing = [package for package in packages if not find_spec(package)]
    if missing:
        raise InputError(f"{what} needs the packages {', '.join(missing)}: pip install 'timm-ddnn[export]'")


def _example(images: torch.Tensor, dynamic_batch: bool) -> tuple[torch.Tensor]:
    return (images[[0, -1]] if dynamic_batch else images[:1],)  # torch.export takes a size of 1 for a constant


def _shapes(dynamic_batch: bool) -> tuple[dict[int, Any]] | None:
    return ({0: torch.export.Dim('batch')},) if dynamic_batch else None


def _write_onnx(
        file: Path, net: nn.Module, images: torch.Tensor, dynamic_batch: bool, metadata: dict[str, Any]) -> None:
    program = torch.onnx.export(
        net, _example(images, dynamic_batch), dynamo=True, dynamic_shapes=_shapes(dynamic_batch),
        input_names=['images'], output_names=['logits'], verbose=False,
    )
    program.model.metadata_props.update(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()})
    program.save(file, external_data=False)


def _open_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


def _write_torch_export(
        file: Path, net: nn.Module, images: torch.Tensor, dynamic_batch: bool, metadata: dict[str, Any]) -> None:
    program = torch.export.export(net, _example(images, dynamic_batch), dynamic_shapes=_shapes(dynamic_batch))
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})


def _open_torch_export(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(file).module()


@contextmanager
def _torchscript_is_deprecated() -> Iterator[None]:
    """Leave out what torch says of it for every module; `export` has logged it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'`torch\.jit\.', FutureWarning)
        yield


def _write_torchscript(
        file: Path, net: nn.Module, images: torch.Tensor, dynamic_batch: bool, metadata: dict[str, Any]) -> None:
    with _torchscript_is_deprecated():
        traced = torch.jit.trace(net, _example(images, dynamic_batch))
        traced.save(str(file), _extra_files={METADATA: json.dumps(metadata)})


def _open_torchscript(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with _torchscript_is_deprecated():
        return torch.jit.load(file)


FORMATS = {
    'onnx': Format('.onnx', _write_onnx, _open_onnx, ONNX_PACKAGES),
    'torch-export': Format('.pt2', _write_torch_export, _open_torch_export),
    'torchscript': Format('.pt', _write_torchscript, _open_torchscript),
}
