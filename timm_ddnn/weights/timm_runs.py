"""Output folders of timm's train.py and of train_timm.py as models: args.yaml and a checkpoint."""
from pathlib import Path
from typing import Any

import yaml
from timm.models import get_pretrained_cfg, is_model

from ..utils.errors import InputError
from ..utils.schema import choice, integer, items, judge, mapping, number, optional, record, text
from .config_checks import CROP, CROP_MODES, INTERPOLATIONS, MAX_SIDE, SIZE
from .weight_checks import read_checkpoint

__all__ = ['read_timm_run']


CHECKPOINTS = 'model_best.pth.tar', 'last.pth.tar'
DATA_CONFIG = {
    'input_size': optional(SIZE),
    'mean': optional(items(number(), 1, MAX_SIDE)),
    'std': optional(items(number(above=0), 1, MAX_SIDE)),
    'interpolation': optional(choice('', *INTERPOLATIONS)),
    'crop_pct': optional(CROP),
    'crop_mode': optional(choice('', *CROP_MODES)),
}
ARGS = record({'model': text(200)}, {
    'model_kwargs': optional(mapping(lambda value: None)),
    'in_chans': optional(integer(1, MAX_SIDE)),
    'img_size': optional(integer(1, MAX_SIDE)),
    'gp': optional(text(100)),
    **DATA_CONFIG,
})


def read_timm_run(folder: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Read an output folder of timm's train.py.

    The best checkpoint is taken, else the last one, and of it the averaged weights if it has any. The names of the
    classes are not known there.

    Args:
        folder: The folder.

    Returns:
        Name of the model and the arguments of `timm.create_model` that make it with its weights; None for another
        folder.

    Raises:
        InputError: If a file is damaged.
    """
    path = Path(folder) / 'args.yaml'
    checkpoint = next((file for name in CHECKPOINTS if (file := Path(folder) / name).is_file()), None)
    if checkpoint is None or not path.is_file():
        return None
    try:
        args = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as e:
        raise InputError(f'{path} must be YAML: {e}') from None
    judge(args, ARGS, str(path))
    architecture = args['model'].partition('.')[0]
    if not is_model(architecture):
        raise InputError(f'model in {path} must be one of timm or of this library, got {args["model"]!r}')
    tensors = read_checkpoint(checkpoint)
    cfg = {key: args[key] for key in DATA_CONFIG if args.get(key)}
    default = get_pretrained_cfg(architecture)
    if args.get('img_size') and 'input_size' not in cfg:
        cfg['input_size'] = (args.get('in_chans') or default.input_size[0], args['img_size'], args['img_size'])
    classifier = default.classifier if isinstance(default.classifier, str) else next(iter(default.classifier or ()), '')
    weight = tensors.get(f'{classifier}.weight')
    if weight is not None:
        cfg['num_classes'] = len(weight)
    kwargs = {'in_chans': args.get('in_chans'), 'global_pool': args.get('gp'), **(args.get('model_kwargs') or {})}
    return architecture, {
        **{key: value for key, value in kwargs.items() if value is not None},
        **({'num_classes': cfg['num_classes']} if 'num_classes' in cfg else {}),
        'pretrained_cfg_overlay': {**cfg, 'state_dict': tensors},
    }
