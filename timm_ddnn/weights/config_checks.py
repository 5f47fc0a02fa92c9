"""What a config.json from elsewhere may ask for: tables of its entries, and the size of what it would build."""
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..utils.errors import InputError
from ..utils.schema import (
    Fault,
    all_of,
    any_of,
    brief,
    choice,
    flag,
    integer,
    items,
    judge,
    mapping,
    number,
    optional,
    record,
    text,
)

__all__ = ['BASE_MODEL', 'CONFIG', 'ROW', 'SAVED', 'check_arguments', 'check_size']


MAX_BLOCKS = 1_000  # of all nets of a model together
MAX_SIDE = 4_096  # of an image, and of one before it is cropped
MAX_PIXELS = 2 ** 26  # values of an image, channels included
MAX_CLASSES = 1_000_000
MAX_PARAMETERS = 200_000_000  # of a model without weights

SIZE = items(integer(1, MAX_SIDE), 3, 3)  # channels, height, width
INTERPOLATIONS = 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'
CROP_MODES = 'center', 'squash', 'border'
CROP = number(0.1, 2)
LABELS = items(text(1_000), most=MAX_CLASSES)
NAMES = any_of(items(text(1_000)), text(1_000))
BLOCKS = items(integer(1, MAX_BLOCKS), 1, 8)
PLAIN = any_of(flag, text(100), number(-1e6, 1e6))

# Results of one depth
ROW = record({'depth': integer(1, 1_000_000)}, {
    'blocks': BLOCKS,
    'parameters': integer(0),
    'macs': integer(0),
    'top1': number(0, 100),
    'top5': number(0, 100),
    'temperature': number(0.01, 100),
})
BASE_MODEL = items(text(200), most=100)
# What this library adds to a config.json
SAVED = record({}, {
    'weights_sha256': text(pattern='[0-9a-fA-F]{64}'),
    'depths': items(ROW, key='depth'),
    'base_model': BASE_MODEL,
    'epoch': integer(0),
})
RATES = 'drop_rate', 'drop_path_rate', 'drop_block_rate', 'attn_drop_rate', 'pos_drop_rate', 'proj_drop_rate'
# Arguments of a model by any caller; the classes judge the others themselves
ARGUMENTS = record({}, {
    'layers': BLOCKS,
    'depths': BLOCKS,
    'channels': items(integer(1, 100_000), 1, 8),
    'in_chans': integer(1, MAX_SIDE),
    'num_classes': integer(0, MAX_CLASSES),
    **dict.fromkeys(RATES, optional(number(0, 1))),
})
MODEL_ARGS = all_of(
    ARGUMENTS,
    record({}, {'base': text(100), 'blocks': BLOCKS, 'subnets': items(BLOCKS)}),
    mapping(optional(any_of(items(PLAIN), mapping(PLAIN), items(items(PLAIN)), PLAIN))),
)
# timm's PretrainedCfg, but for entries that say where weights are
PRETRAINED_CFG = record({}, {
    **dict.fromkeys(('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source'), choice(None)),
    'custom_load': choice(False),
    'architecture': optional(text(100)),
    'tag': optional(text(100)),
    'input_size': SIZE,
    'test_input_size': optional(SIZE),
    'min_input_size': optional(SIZE),
    'fixed_input_size': flag,
    'interpolation': choice(*INTERPOLATIONS),
    'crop_pct': CROP,
    'test_crop_pct': optional(CROP),
    'crop_mode': choice(*CROP_MODES),
    'mean': items(number(), 1, MAX_SIDE),
    'std': items(number(above=0), 1, MAX_SIDE),
    'num_classes': integer(0, MAX_CLASSES),
    'label_offset': optional(integer(0, MAX_CLASSES)),
    'label_names': optional(LABELS),
    'label_descriptions': optional(mapping(text(), most=MAX_CLASSES)),
    'pool_size': optional(items(integer(1, MAX_SIDE), 2, 2)),
    'test_pool_size': optional(items(integer(1, MAX_SIDE), 2, 2)),
    'first_conv': optional(NAMES),
    'classifier': optional(NAMES),
    **dict.fromkeys(('license', 'description', 'origin_url', 'paper_name'), optional(text())),
    'paper_ids': optional(NAMES),
    'notes': optional(NAMES),
}, strict=True)


def _check_together(config: Mapping[str, Any]) -> Fault | None:
    """Check entries that must agree with each other."""
    cfg, args = config['pretrained_cfg'], config.get('model_args', {})
    input_size = cfg.get('input_size', (3, 224, 224))
    channels = args.get('in_chans', input_size[0])
    for key in ('mean', 'std'):
        if key in cfg and len(cfg[key]) not in (1, channels):
            return Fault(f'.pretrained_cfg.{key}', f'{channels} numbers, one for each channel', cfg[key])
    for key in ('input_size', 'test_input_size', 'min_input_size'):
        _, height, width = cfg.get(key) or input_size
        if channels * height * width > MAX_PIXELS:
            return Fault(f'.pretrained_cfg.{key}', f'of at most {MAX_PIXELS} values', cfg[key])
        for crop in ('crop_pct', 'test_crop_pct'):
            if max(height, width) > MAX_SIDE * (cfg.get(crop) or 1):
                allowed = f'large enough to cut {height} x {width} from at most {MAX_SIDE} pixels'
                return Fault(f'.pretrained_cfg.{crop}', allowed, cfg[crop])
    num_classes = config.get('num_classes', cfg.get('num_classes', 1000))
    if args.get('num_classes', num_classes) != num_classes:
        return Fault('.model_args.num_classes', f'{num_classes} as elsewhere', args['num_classes'])
    labels = config.get('label_names') or cfg.get('label_names')
    if labels and len(labels) != num_classes:
        return Fault('.label_names', f'{num_classes} names, one for each class', labels)
    blocks = sum(map(sum, (args.get('layers', ()), *args.get('subnets', ()))))
    if blocks > MAX_BLOCKS:
        return Fault('.model_args', f'layers and subnets of at most {MAX_BLOCKS} blocks', blocks)
    return None

# A config.json of one of this library's architectures
CONFIG = all_of(
    record(
        {'architecture': text(100), 'pretrained_cfg': PRETRAINED_CFG},
        {
            'num_classes': integer(0, MAX_CLASSES),
            'label_names': optional(LABELS),
            'label_descriptions': optional(mapping(text(), most=MAX_CLASSES)),
            'model_args': MODEL_ARGS,
        },
    ),
    SAVED,
    _check_together,
)


def check_arguments(cls: type[nn.Module], model_args: Mapping[str, Any], *, saved: bool = False) -> None:
    """Check the names of model arguments, those that a class takes by any value, and those that switch something.

    Args:
        cls: Class of the model.
        model_args: Its arguments.
        saved: Whether they are those of a config.json, which are not about where a model is put.

    Raises:
        InputError: If one is not an argument of the class, or is out of its range.
    """
    known = {}
    for made in (cls, getattr(cls, 'plain_cls', cls)):  # a dynamic class makes a net of the plain one
        for parent in made.__mro__:
            parameters = signature(parent.__init__).parameters
            known = {**parameters, **known}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break  # this one passes nothing on to its parents
    for name in ('self', 'args', 'kwargs', 'net', *(('block', 'device', 'dtype') if saved else ())):
        known.pop(name, None)
    unknown = sorted(set(model_args) - known.keys())
    where = 'model_args in config.json' if saved else f'arguments of {cls.__name__}'
    if unknown:
        raise InputError(f'{where} must be of {sorted(known)}, got {brief(unknown)}')
    flags = {name: optional(flag) for name in model_args if isinstance(known[name].default, bool)}
    judge(model_args, all_of(ARGUMENTS, record({}, flags)), where)


def check_size(model: nn.Module, weights: Mapping[str, torch.Tensor] | None) -> None:
    """Check that a model that a config.json from elsewhere describes is not much larger than its weights.

    Args:
        model: The model, on the meta device.
        weights: The tensors that are to be loaded, if any.

    Raises:
        InputError: If it is.
    """
    count, held, allowed = _count(model.state_dict()), '', MAX_PARAMETERS
    if weights is not None:
        size = _count(weights)
        allowed = 2 * size + 100_000_000  # a larger classifier, and statistics of sub-nets that the file has not
        held = f', the weights hold {size}'
    if count > allowed:
        raise InputError(f'config.json must describe a model of at most {allowed} values, got {count}{held}')


def _count(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
