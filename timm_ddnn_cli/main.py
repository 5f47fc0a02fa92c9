"""The command `timm-ddnn`: finds a command's module in `commands/`, and reports every wrong input in one line."""
import argparse
import importlib
import json
import logging
import pkgutil
import sys
from collections.abc import Sequence

import timm_ddnn

from . import commands
from .arguments import ArgumentParser, fail, one_line_errors

__all__ = ['main']


EXIT_STATUSES = 'exit status: 0 done, 1 an error in this program, 2 wrong input, 3 nothing fulfils what was asked for'


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The command line without the program's name, that of the process if None.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s', stream=sys.stderr)
    logging.getLogger('huggingface_hub').propagate = False  # it writes to stderr itself
    # where there is CUDA and no GPU, it says so when something imports it, amid the one line of an error
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)
    try:
        args = _parse(arguments)
        with one_line_errors(ValueError, OSError):
            result = args.run(args)
    except ModuleNotFoundError as e:
        if e.name and e.name.split('.')[0] == 'timm_ddnn':
            raise
        extras = 'train' if e.name and e.name.startswith('sklearn') else 'cli,export'
        fail(f"timm-ddnn needs the package {e.name} for this: pip install 'timm-ddnn[{extras}]'")
    if args.json:
        print(json.dumps(result, indent=2, allow_nan=False))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser('Dynamic-depth networks: from a trained model to a device.', epilog=EXIT_STATUSES)
    parser.add_argument('--version', action='version', version=f'timm-ddnn {timm_ddnn.__version__}')
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    names = [name for _, name, _ in pkgutil.iter_modules(commands.__path__)]
    # the command that is asked for does not wait for what the others import
    for name in arguments[:1] if arguments and arguments[0] in names else names:
        module = importlib.import_module(f'{commands.__name__}.{name}')
        command = subparsers.add_parser(
            name, description=module.HELP, help=module.HELP, epilog=f'examples:\n{module.EXAMPLES}\n\n{EXIT_STATUSES}')
        module.add_arguments(command)
        command.add_argument('--json', action='store_true', help='print JSON in the place of tables')
        command.set_defaults(run=module.run)
    return parser.parse_args(arguments)
