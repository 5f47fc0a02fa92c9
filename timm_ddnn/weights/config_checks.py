"""What a configuration from elsewhere may ask for, checked before anything is built of it."""
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

from safetensors import safe_open
from timm.models import PretrainedCfg
from torch import nn

__all__ = ['check_config', 'check_names', 'check_size']


# What a configuration from elsewhere may ask for
MAX_BLOCKS = 1_000
MAX_SIDE = 4_096
MAX_WIDTH = 1_000_000
MAX_PARAMETERS = 1_000_000_000


def check_config(cfg: Mapping[str, Any]) -> None:
    """Check the pretrained configuration of a config.json from elsewhere.

    Args:
        cfg: As timm reads it.

    Raises:
        ValueError: If it has unknown entries or wrong types, or names files.
    """
    known = {field.name for field in fields(PretrainedCfg)}
    unknown = sorted(set(cfg) - known)
    if unknown:
        raise ValueError(f'pretrained_cfg in config.json must have keys of {sorted(known)}, got {unknown}')
    own = {'local-dir': 'file', 'hf-hub': 'hf_hub_id'}[cfg['source']]
    for key in {'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'custom_load'} - {own}:
        if cfg.get(key):
            raise ValueError(f'pretrained_cfg in config.json must not say where weights are, got {key}={cfg[key]!r}')

    def check(key: str, allowed: str, valid: Callable[[Any], bool]) -> None:
        value = cfg.get(key)
        needed = key in cfg and key in ('input_size', 'num_classes')
        if (needed or value is not None) and not valid(value):
            raise ValueError(f'{key} in config.json must be {allowed}, got {str(value)[:80]!r}')

    def is_list(value: Any, kind: type | tuple[type, ...]) -> bool:
        return isinstance(value, list | tuple) and all(
            isinstance(item, kind) and not isinstance(item, bool) for item in value)

    def is_size(value: Any) -> bool:
        return is_list(value, int) and len(value) == 3 and 1 <= value[0] <= 1024 and all(
            1 <= side <= MAX_SIDE for side in value[1:])

    for key in ('input_size', 'test_input_size', 'min_input_size'):
        check(key, f'channels, height and width, of at most {MAX_SIDE} pixels', is_size)
    channels = cfg.get('input_size', (3,))[0]

    def is_statistic(value: Any, least: float) -> bool:
        return is_list(value, (int, float)) and len(value) in (1, channels) and all(
            least < number < math.inf for number in value)

    check('mean', f'{channels} numbers', lambda value: is_statistic(value, -math.inf))
    check('std', f'{channels} numbers above 0', lambda value: is_statistic(value, 0))
    check('num_classes', f'an integer from 0 to {MAX_WIDTH}',
          lambda value: type(value) is int and 0 <= value <= MAX_WIDTH)
    for key in ('crop_pct', 'test_crop_pct'):
        check(key, 'a number above 0, at most 2', lambda value: type(value) in (int, float) and 0 < value <= 2)
    for key in ('interpolation', 'crop_mode', 'license'):
        check(key, 'text', lambda value: isinstance(value, str))
    for key in ('first_conv', 'classifier'):
        check(key, 'text', lambda value: isinstance(value, str) or is_list(value, str))
    check('label_names', 'names', lambda value: isinstance(value, dict) or is_list(value, str))
    check('label_offset', 'an integer', lambda value: type(value) is int)


def check_names(cls: type[nn.Module], model_args: Mapping[str, Any]) -> None:
    """Check the names of the model arguments of a config.json from elsewhere.

    Args:
        cls: Class of the model.
        model_args: As they stand there.

    Raises:
        ValueError: If one is not an argument of the class, or is about where a model is put.
    """
    known = {name for parent in cls.__mro__ for name in signature(parent.__init__).parameters}
    known -= {'self', 'args', 'kwargs', 'device', 'dtype', 'block'}
    unknown = sorted(set(model_args) - known)
    if unknown:
        raise ValueError(f'model_args in config.json must be of {sorted(known)}, got {unknown}')


def check_size(cls: type[nn.Module], model_args: Mapping[str, Any], weights: Path | None) -> None:
    """Check what a config.json from elsewhere would build, before memory is taken for it.

    Args:
        cls: Class of the model.
        model_args: Its arguments.
        weights: The safetensors file that is to be loaded, if any.

    Raises:
        ValueError: If the arguments make no model, or one that is much larger than its weights.
    """
    def check(name: str, value: Any) -> None:
        if isinstance(value, list | tuple):
            if len(value) > MAX_BLOCKS:
                raise ValueError(f'{name} in config.json must have at most {MAX_BLOCKS} entries, got {len(value)}')
            for item in value:
                check(name, item)
        elif isinstance(value, int | float) and abs(value) > MAX_WIDTH:
            raise ValueError(f'{name} in config.json must be at most {MAX_WIDTH}, got {value}')

    for name, value in model_args.items():
        check(name, value)
    layers, subnets = model_args['layers'], model_args.get('subnets', ())
    if not isinstance(subnets, list | tuple):
        raise ValueError(f'subnets in config.json must be a list, got {str(subnets)[:80]!r}')
    for name, value in [('layers', layers), *(('subnets', subnet) for subnet in subnets)]:
        if not (isinstance(value, list | tuple) and all(type(count) is int and count > 0 for count in value)):
            raise ValueError(f'{name} in config.json must be numbers of blocks per stage, got {value!r}')
    blocks = sum(layers) * (1 + len(subnets))
    if blocks > MAX_BLOCKS:
        raise ValueError(f'layers and subnets in config.json must be of at most {MAX_BLOCKS} blocks, got {blocks}')
    try:
        model = cls(**{**model_args, 'device': 'meta'})
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError, AssertionError) as e:
        raise ValueError(f'config.json, and the arguments given, make no {cls.__name__}: {e}') from e
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    allowed = MAX_PARAMETERS
    if weights is not None:
        with safe_open(weights, framework='pt') as file:
            held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        allowed = 2 * held + 100_000_000  # a larger classifier, and statistics of sub-nets that the file has not
    if count > allowed:
        held = '' if weights is None else f', the weights hold {held}'
        raise ValueError(f'config.json must describe a model of at most {allowed} values, got {count}{held}')
