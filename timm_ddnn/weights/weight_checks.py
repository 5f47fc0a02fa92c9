"""Files of weights, and whether the weights can be right: types, shapes and values of their tensors."""
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import load_state_dict
from torch import nn

from ..utils.errors import InputError

__all__ = ['check_tensors', 'check_values', 'check_weights', 'full_net_name', 'read_checkpoint', 'read_tensors']


FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16


def read_tensors(content: bytes, source: str) -> dict[str, torch.Tensor]:
    """Read the content of a safetensors file.

    Args:
        content: All its bytes.
        source: What error messages call the file.

    Raises:
        OSError: If it is damaged.
    """
    try:
        return safetensors.torch.load(content)
    except Exception as e:  # SafetensorError, and for headers that are wrong KeyError, AssertionError, ...
        raise OSError(f'{source} is damaged: {e or type(e).__name__}') from e


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a file of weights, safetensors or a checkpoint of timm, whose averaged weights go before the others.

    Args:
        path: The file. Nothing that is pickled in it is executed.

    Raises:
        InputError: If it holds something else.
        OSError: If it does not exist or cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path} does not exist')
    try:
        tensors = load_state_dict(str(path))
    except OSError:
        raise
    except Exception as e:  # of timm, safetensors, torch and pickle, which name many types
        raise InputError(f'{path} is not a file of weights: {type(e).__name__}') from e
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f'{path} is not a file of weights: it holds more than tensors')
    return tensors


def check_weights(
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        cfg: Mapping[str, Any],
        source: str,
        *,
        whole: bool = True,
) -> None:
    """Check pretrained weights that timm is to load into a model.

    Args:
        tensors: Tensors by name.
        model: The model, whose classes and channels may be others than those of the weights.
        cfg: timm's pretrained configuration of the weights.
        source: What error messages call the place that they come from.
        whole: As for `check_tensors`.

    Raises:
        InputError: If `check_tensors` refuses them, or they have other classes than the configuration says.
    """
    classifier, first_conv = (_names(cfg.get(key)) for key in ('classifier', 'first_conv'))
    for name in classifier:
        weight = f'{name}.weight'
        if weight in tensors and (rows := len(tensors[weight]) - (cfg.get('label_offset') or 0)) != cfg['num_classes']:
            raise InputError(
                f'num_classes of the configuration must be {rows}, as in {weight} of {source}, '
                f'got {cfg["num_classes"]}'
            )
    adapted = set()
    if getattr(model, 'num_classes', None) != cfg['num_classes']:
        adapted |= set(classifier)
    if getattr(model, 'in_chans', None) != cfg.get('input_size', (3,))[0]:
        adapted |= set(first_conv)
    check_tensors(tensors, model, source, adapted=adapted, whole=whole)


def check_tensors(
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        source: str,
        adapted: Iterable[str] = (),
        whole: bool = True,
) -> None:
    """Check the tensors of a state dict.

    Args:
        tensors: Tensors by name.
        model: The model that they are for.
        source: What error messages call the place that they come from.
        adapted: Names of modules whose shapes may differ from those of the model.
        whole: Whether the tensors are those of this model, no more and no fewer. Those of sub-nets may be missing: the
            model itself judges that.

    Raises:
        InputError: If tensors are missing or unknown, one has another shape than in the model, or `check_values`
            refuses them.
    """
    def is_adapted(name: str) -> bool:
        return full_net_name(name).rpartition('.')[0] in adapted

    own = model.state_dict()
    missing, unknown = (
        [name for name in names if not name.startswith('subnets.') and not name.endswith('num_batches_tracked')
         and not is_adapted(name)]
        for names in (own.keys() - tensors.keys(), tensors.keys() - own.keys())
    )
    if whole and (missing or unknown):
        raise InputError(
            f'{source} must hold the tensors of the model: {len(missing)} are missing{_example(missing)}, '
            f'{len(unknown)} are unknown{_example(unknown)}'
        )
    for name, expected in own.items():
        shape, fits = tuple(expected.shape), name in tensors and tensors[name].shape == expected.shape
        if name in tensors and not fits and not is_adapted(name) and name != 'subnets.trained':
            raise InputError(
                f'{name} of {source} must have shape {shape} as in the model, got {tuple(tensors[name].shape)}')
    check_values(tensors, own, source)


def full_net_name(name: str) -> str:
    """Name, in the full-net, of the tensor in whose place a sub-net has one for itself."""
    return re.sub(r'^subnets\.\d+\.', '', name)


def check_values(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], source: str) -> None:
    """Check types and values of tensors that are to be loaded, whatever their shapes are.

    Args:
        tensors: Tensors by name.
        own: State dict of the model that they are for.
        source: What error messages call the place that they come from.

    Raises:
        InputError: If one is of integers or of fewer than 16 bits, counters and the like excepted, has values that are
            not finite in the type of the model, or is a negative variance.
    """
    for name in (name for name in {**own, **tensors} if name in tensors):  # the first that is wrong is named
        tensor, dtype = tensors[name], own[name].dtype if name in own else torch.float32
        last = name.rpartition('.')[2]
        if last in ('num_batches_tracked', 'trained') or not dtype.is_floating_point:
            dtype = torch.float32  # a counter, flags of the sub-nets, indices
        elif tensor.dtype not in FLOATS:
            raise InputError(f'{name} of {source} must be of type {", ".join(map(str, FLOATS))}, got {tensor.dtype}')
        if tensor.is_meta:
            continue
        if not torch.isfinite(tensor.to(dtype)).all():
            raise InputError(f'{name} of {source} must have finite values, got NaN or infinity')
        if last == 'running_var' and (tensor < 0).any():
            raise InputError(f'{name} of {source} must be variances of at least 0, got {tensor.min().item()}')


def _example(names: list[str]) -> str:
    return f' such as {min(names)!r}' if names else ''


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())
