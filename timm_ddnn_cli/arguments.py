"""What command lines share: the parser, types of arguments, and errors of one line.

A list is written as separate words (`--cascade 14 26 50`); a comma only joins what belongs to one net (`2,2,2,2`).
"""
import argparse
import ast
import io
import math
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = [
    'ArgumentParser', 'fail', 'number', 'parse_blocks', 'parse_depth', 'parse_option', 'parse_weight', 'parse_workers',
    'run', 'run_script',
]


_MAX_LENGTH = 2_000  # of a message: that of an OSError may hold the answer of a server


def fail(message: str, status: int = 2, every_process: bool = False) -> NoReturn:
    """End the program with a line on stderr.

    Args:
        message: What is allowed and what was given. White space, line breaks included, becomes single spaces.
        status: Exit status.
        every_process: Whether each of several processes prints it, and not the first of every machine alone.
    """
    if every_process or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {" ".join(message.split())[:_MAX_LENGTH]}', file=sys.stderr)
    sys.exit(status)


def run(main: Callable[[], Any]) -> None:
    """Run a program: an `InputError` or OSError becomes one line and its exit status, a bug keeps its traceback.

    What the console cannot show is replaced.

    Args:
        main: The program.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='replace')
    try:
        main()
    except Exception as e:  # InputError is known by its attributes: importing it would import torch and timm
        status = 2 if isinstance(e, OSError) else getattr(e, 'exit_status', None)
        if status is None:
            raise
        fail(str(e), status, getattr(e, 'on_every_process', False))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default else action.help


class ArgumentParser(argparse.ArgumentParser):
    """Parser that shows defaults in its help, and reports a wrong argument in one line without the usage."""

    def __init__(self, description: str, **kwargs: Any) -> None:
        """Make a parser without arguments.

        Args:
            description: What the script does.
            **kwargs: Further arguments of `argparse.ArgumentParser`.
        """
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """End the program, see `fail`."""
        fail(message)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """Make a parser of numbers in [low, high], for the `type` of an argument.

    Args:
        kind: `int` or `float`.
        low: The least number allowed.
        high: The greatest number allowed.
    """
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            noun = 'an integer' if kind is int else 'a number'
            allowed = f'of at least {low}' if high == math.inf else f'from {low} to {high}'
            raise argparse.ArgumentTypeError(f'must be {noun} {allowed}, got {text!r}')
        return value
    return parse


parse_workers = number(int, 0, max(16, 4 * (os.cpu_count() or 1)))  # of processes that load data


def parse_blocks(text: str) -> tuple[int, ...]:
    """Parse the blocks per stage of a net, for example '2,2,2,2'.

    Raises:
        ArgumentTypeError: If the text is not integers with commas between them.
    """
    try:
        return tuple(int(n) for n in text.split(','))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be blocks per stage such as '2,2,2,2', got {text!r}") from None


def parse_depth(text: str) -> int | str:
    """Parse 'all' or one depth.

    Raises:
        ArgumentTypeError: If the text is neither.
    """
    if text == 'all' or text.isdecimal():
        return text if text == 'all' else int(text)
    raise argparse.ArgumentTypeError(f"must be a depth such as 26, or 'all', got {text!r}")


def parse_weight(text: str) -> tuple[int, float]:
    """Parse the loss weight of a depth, for example '26=0.5'.

    Raises:
        ArgumentTypeError: If the text is not an integer, '=' and a number.
    """
    depth, _, weight = text.partition('=')
    try:
        return int(depth), float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be DEPTH=WEIGHT such as '26=0.5', got {text!r}") from None


def parse_option(text: str) -> tuple[str, Any]:
    """Parse a keyword argument, for example 'channels=16,32,64'. A value that is not a Python literal is a string.

    Raises:
        ArgumentTypeError: If the text is not a name, '=' and a value.
    """
    name, equals, value = text.partition('=')
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE such as 'channels=16,32,64', got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run another script in this process, as `python PATH ARGUMENTS...` would.

    Args:
        path: The script.
        arguments: Its arguments.
    """
    if not os.path.isfile(path):
        fail(f'the first argument must be a script, got {path!r}')
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    runpy.run_path(path, run_name='__main__')
