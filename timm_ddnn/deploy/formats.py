"""The formats of exported files: how each is written, and how it is opened as its users will."""
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..utils.errors import InputError

if TYPE_CHECKING:
    import onnx

__all__ = ['FORMATS', 'Format', 'example_of', 'open_onnx', 'require_packages', 'save_onnx']


METADATA = 'metadata.json'  # name of the extra file in the formats of torch
ONNX_PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')


class Format(NamedTuple):
    """A format of exported files.

    Attributes:
        suffix: Suffix of the files.
        write: Writes plain nets, given by depth: file, nets, example images [N, C, H, W], whether the number of images
            is free, metadata. Several nets, the deepest first, become one file only where `has_depths`.
        open: Loads a file as a function from images [B, C, H, W] and a depth to logits [B, num_classes].
        packages: What it needs besides torch.
        has_depths: Whether a file may hold several depths.
    """
    suffix: str
    write: Callable[[Path, Mapping[int, nn.Module], torch.Tensor, bool, dict[str, Any]], None]
    open: Callable[[Path], Callable[[torch.Tensor, int], torch.Tensor]]
    packages: tuple[str, ...] = ()
    has_depths: bool = False


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


def example_of(images: torch.Tensor, dynamic_batch: bool) -> tuple[tuple[torch.Tensor], tuple[dict[int, Any]] | None]:
    """Choose an input to trace a net with, and the shapes that stay free, both as `torch.export` takes them.

    Args:
        images: Images, [N, C, H, W].
        dynamic_batch: Whether any number of images is to run at once, and not one alone.
    """
    example = images[[0, -1]] if dynamic_batch else images[:1]  # a free size of 1 would be taken for a constant
    # of images with channels last, torch.export makes a graph that gathers their mean element by element
    return (example.contiguous(),), ({0: torch.export.Dim('batch')},) if dynamic_batch else None


def _write_onnx(
        file: Path, nets: Mapping[int, nn.Module], images: torch.Tensor, dynamic_batch: bool, metadata: dict[str, Any],
) -> None:
    from .onnx_graph import merge_nets, trace_net  # need the packages of this format

    if len(nets) == 1:
        net, = nets.values()
        graph = trace_net(net, images, dynamic_batch)
    else:
        graph = merge_nets({d: trace_net(net, images, dynamic_batch, fold_norms=False) for d, net in nets.items()})
    save_onnx(file, graph, metadata)


def save_onnx(file: Path, graph: 'onnx.ModelProto', metadata: dict[str, Any]) -> None:
    """Write an ONNX file.

    Args:
        file: The file.
        graph: Its graph.
        metadata: What stands in its metadata_props, each value as JSON unless it is text.
    """
    import onnx

    onnx.helper.set_model_props(
        graph, {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()})
    onnx.save(graph, file)


def open_onnx(file: Path | bytes) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """Open an ONNX file, or what it would hold, as a function from images and a depth to logits."""
    from onnxruntime import InferenceSession

    session = InferenceSession(file, providers=['CPUExecutionProvider'])
    has_depth = len(session.get_inputs()) > 1

    def run(images: torch.Tensor, depth: int) -> torch.Tensor:
        inputs = {'images': images.numpy()} | ({'depth': np.array(depth)} if has_depth else {})
        return torch.from_numpy(session.run(None, inputs)[0])
    return run


def _write_torch_export(
        file: Path, nets: Mapping[int, nn.Module], images: torch.Tensor, dynamic_batch: bool, metadata: dict[str, Any],
) -> None:
    net, = nets.values()
    example, shapes = example_of(images, dynamic_batch)
    program = torch.export.export(net, example, dynamic_shapes=shapes)
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})


def _open_torch_export(file: Path) -> Callable[[torch.Tensor, int], torch.Tensor]:
    net = torch.export.load(file).module()
    return lambda images, depth: net(images)


@contextmanager
def _torchscript_is_deprecated() -> Iterator[None]:
    """Leave out what torch says of it for every module; `export` has logged it once."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'`torch\.jit\.', FutureWarning)
        yield


def _write_torchscript(
        file: Path, nets: Mapping[int, nn.Module], images: torch.Tensor, dynamic_batch: bool, metadata: dict[str, Any],
) -> None:
    net, = nets.values()
    with _torchscript_is_deprecated():
        traced = torch.jit.trace(net, example_of(images, dynamic_batch)[0])
        traced.save(str(file), _extra_files={METADATA: json.dumps(metadata)})


def _open_torchscript(file: Path) -> Callable[[torch.Tensor, int], torch.Tensor]:
    with _torchscript_is_deprecated():
        net = torch.jit.load(file)
    return lambda images, depth: net(images)


FORMATS = {
    'onnx': Format('.onnx', _write_onnx, open_onnx, ONNX_PACKAGES, has_depths=True),
    'torch-export': Format('.pt2', _write_torch_export, _open_torch_export),
    'torchscript': Format('.pt', _write_torchscript, _open_torchscript),
}
