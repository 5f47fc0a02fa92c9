"""The command `timm-ddnn`: parses the arguments, runs a command of `commands/`, and prints what it returns as JSON.

Until the arguments are parsed only the standard library is imported, so that help and wrong arguments cost no time.
"""
import argparse
import importlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .arguments import ArgumentParser, fail, run
from .commands import NAMES

__all__ = ['main']


SHELLS = 'bash', 'zsh', 'fish', 'tcsh', 'powershell'
EXIT_STATUSES = 'exit status: 0 done, 1 an error in this program, 2 wrong input, 3 nothing is within the limits'


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: The command line without the program's name, that of the process if None.
    """
    run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> None:
    parser = _create_parser()
    args = parser.parse_args(arguments)
    if args.version:
        from importlib.metadata import version

        print(f'timm-ddnn {version("timm-ddnn")}')
    elif args.print_completion:
        with _naming_packages():
            _print_completion(parser, args.print_completion)
    elif args.command is None:
        parser.print_help()
    else:
        _run_command(args)


class _StderrHandler(logging.StreamHandler):
    """Writes to what stderr is at the time: a status that is shown puts itself there, and lines above it."""

    stream = property(lambda self: sys.stderr, lambda self, stream: None)


def _create_parser() -> ArgumentParser:
    parser = ArgumentParser(
        'Dynamic-depth networks for timm: train, evaluate, bring to a device, publish.', prog='timm-ddnn',
        epilog=EXIT_STATUSES)
    parser.add_argument('--version', action='store_true', help='print the version')
    parser.add_argument('--print-completion', choices=SHELLS, metavar='SHELL',
                        help=f'print a script that completes words in a shell: {", ".join(SHELLS)}')
    subparsers = parser.add_subparsers(dest='command', metavar='COMMAND')
    for name in NAMES:
        module = importlib.import_module(f'.commands.{name}', __package__)
        command = subparsers.add_parser(
            name, description=module.HELP, help=module.HELP, epilog=f'examples:\n{module.EXAMPLES}\n\n{EXIT_STATUSES}')
        module.add_arguments(command)
        command.add_argument('--json', action='store_true', help='print JSON in the place of tables')
        command.set_defaults(run=module.run)
    return parser


def _print_completion(parser: ArgumentParser, shell: str) -> None:
    import shtab

    subparsers, = (action for action in parser._actions if isinstance(action.choices, dict))
    for command in subparsers.choices.values():
        for action in command._actions:
            if action.type in (None, Path) and action.nargs != 0 and not action.choices:  # text, which may be a file
                action.complete = shtab.FILE
    print(shtab.complete(parser, shell))


@contextmanager
def _naming_packages() -> Iterator[None]:
    """Name the extra that has a package which is missing."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name and e.name.split('.')[0] in ('timm_ddnn', 'timm_ddnn_cli'):
            raise
        extra = 'train' if e.name and e.name.startswith('sklearn') else 'cli,export'
        fail(f"timm-ddnn needs the package {e.name} for this: pip install 'timm-ddnn[{extra}]'")


def _run_command(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s', handlers=[_StderrHandler()])
    logging.getLogger('huggingface_hub').propagate = False  # it writes to stderr itself
    # where CUDA is installed and there is no GPU, it warns when something imports it
    logging.getLogger('torch.utils.cpp_extension').setLevel(logging.ERROR)
    with _naming_packages():
        result = args.run(args)
    if args.json and result is not None:  # one of several processes prints
        print(json.dumps(result, indent=2, allow_nan=False))
