"""Whether weights can be right: types, shapes and values of their tensors."""
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..utils.errors import InputError

__all__ = ['check_file', 'check_tensors']


FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16


def check_file(path: Path, model: nn.Module, cfg: Mapping[str, Any], *, whole: bool = True) -> None:
    """Check a file of weights that timm is to load into a model.

    Args:
        path: safetensors file.
        model: The model, whose classes and channels may be others than those of the weights.
        cfg: timm's pretrained configuration of the weights.
        whole: Whether the file holds the tensors of this model, no more and no fewer.

    Raises:
        InputError: If `check_tensors` refuses them, or they have other classes than the configuration says.
        OSError: If the file is damaged.
    """
    classifier, first_conv = (_names(cfg.get(key)) for key in ('classifier', 'first_conv'))
    tensors = dict(_tensors(path))
    for name in classifier:
        rows = len(tensors.get(f'{name}.weight', ())) - (cfg.get('label_offset') or 0)
        if f'{name}.weight' in tensors and rows != cfg['num_classes']:
            raise InputError(
                f'num_classes of the configuration must be {rows}, as in {name}.weight of {path}, '
                f'got {cfg["num_classes"]}'
            )
    adapted = set()
    if getattr(model, 'num_classes', None) != cfg['num_classes']:
        adapted |= set(classifier)
    if getattr(model, 'in_chans', None) != cfg.get('input_size', (3,))[0]:
        adapted |= set(first_conv)
    check_tensors(tensors, model, str(path), adapted=adapted, whole=whole)


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
        InputError: If tensors are missing or unknown, or one has another shape than in the model, is of integers or of
            fewer than 16 bits, has values that are not finite, or is a negative variance.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, unknown = (
        [name for name in names if not name.startswith('subnets.') and not name.endswith('num_batches_tracked')
         and name.rpartition('.')[0] not in adapted]
        for names in (shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys())
    )
    if whole and (missing or unknown):
        raise InputError(
            f'{source} must hold the tensors of the model: {len(missing)} are missing{_example(missing)}, '
            f'{len(unknown)} are unknown{_example(unknown)}'
        )
    for name, tensor in tensors.items():
        module, _, last = name.rpartition('.')
        if name in shapes and module not in adapted and tensor.shape != shapes[name] and last != 'trained':
            raise InputError(
                f'{name} of {source} must have shape {tuple(shapes[name])} as in the model, got {tuple(tensor.shape)}')
        if last in ('num_batches_tracked', 'trained'):  # a counter, and flags of the sub-nets
            continue
        if tensor.dtype not in FLOATS:
            raise InputError(f'{name} of {source} must be of type {", ".join(map(str, FLOATS))}, got {tensor.dtype}')
        if not torch.isfinite(tensor).all():
            raise InputError(f'{name} of {source} must have finite values, got NaN or infinity')
        if last == 'running_var' and (tensor < 0).any():
            raise InputError(f'{name} of {source} must be variances of at least 0, got {tensor.min().item()}')


def _example(names: list[str]) -> str:
    return f' such as {min(names)!r}' if names else ''


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework='pt') as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
    except SafetensorError as e:
        raise OSError(f'{path} is damaged: {e}') from e
