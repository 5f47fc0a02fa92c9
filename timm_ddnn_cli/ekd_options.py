"""Options of embedded knowledge distillation, for each command that trains. Their ranges are judged by `EKDLoss`."""
import argparse
from typing import Any

from .arguments import parse_weight

__all__ = ['add_ekd_options', 'ekd_options']


LOSS_OPTIONS = 'temperature', 'alpha', 'beta', 'attention', 'stages', 'weights'


def add_ekd_options(parser: Any, prefix: str = '') -> None:
    """Declare the options of the loss and of its teacher.

    Args:
        parser: `argparse.ArgumentParser`, or a group of one.
        prefix: What the names begin with: 'ekd-' gives --ekd-alpha.
    """
    def add(to: Any, name: str, **kwargs: Any) -> None:
        to.add_argument(f'--{prefix}{name}', **kwargs)

    add(parser, 'temperature', type=float, default=1.0, help='temperature of the KL divergence, > 0')
    add(parser, 'alpha', type=float, default=0.3, help='weight of the KL divergence, >= 0')
    add(parser, 'beta', type=float, default=0.1, help='weight of the attention, >= 0')
    add(parser, 'attention', choices=('energy', 'standardized'), default='energy', help='form of the attention')
    add(parser, 'stages', nargs='+', type=int, default=[-1], metavar='STAGE',
        help='stages whose attention is compared, from 0, or from the last by negative numbers; the last if not given')
    add(parser, 'weights', nargs='+', type=parse_weight, default=[], metavar='DEPTH=WEIGHT',
        help='loss weights of sub-nets, 1 if not given')
    teacher = parser.add_mutually_exclusive_group()
    add(teacher, 'teacher', metavar='MODEL',
        help="timm's name, the folder or hf-hub:ID of a trained net that teaches all depths, the full-net too, in the "
             f'place of the full-net; for one without the maps of the model: --{prefix}beta 0')
    add(teacher, 'ema-teacher', action='store_true',
        help='the averaged weights (--model-ema) teach all depths, the full-net too, in the place of the full-net')


def ekd_options(args: argparse.Namespace, prefix: str = '') -> dict[str, Any]:
    """Collect the arguments of `EKDLoss`, without the criterion.

    Args:
        args: Arguments that were parsed.
        prefix: As for `add_ekd_options`.
    """
    options = {name: getattr(args, prefix.replace('-', '_') + name) for name in LOSS_OPTIONS}
    return options | {'weights': dict(options['weights'])}
