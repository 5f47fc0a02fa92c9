"""What command-line scripts share: errors of one line, models from a name that a user typed, folders written whole."""
import argparse
import ast
import difflib
import json
import logging
import math
import os
import pickle
import runpy
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import timm
from torch import nn

from .dynamic_depth import DynamicDepthMixin
from .hub import fetch, read_config

__all__ = [
    'ArgumentParser', 'create_ddnn', 'fail', 'integers', 'load_model', 'load_teacher', 'number', 'one_line_errors',
    'parse_blocks', 'parse_option', 'parse_weight', 'resolve_name', 'run_script', 'saved_results', 'staged_folder',
    'warn_of_untrained',
]

_logger = logging.getLogger(__name__)


def fail(message: str, every_process: bool = False) -> NoReturn:
    """End the program with a line on stderr and exit status 2.

    Args:
        message: What is allowed and what was received. White space, line breaks included, becomes single spaces.
        every_process: Whether each of several processes prints it, and not the first of every machine alone.
    """
    if every_process or os.environ.get('LOCAL_RANK', '0') == '0':
        print(f'error: {" ".join(message.split())}', file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors(*kinds: type[Exception], every_process: bool = False) -> Iterator[None]:
    """Turn exceptions of some types into one line on stderr and exit status 2.

    Args:
        *kinds: The types.
        every_process: As for `fail`; for errors that a single process meets.
    """
    try:
        yield
    except kinds as e:
        message = str(e)
        if 'in DataLoader worker process' in message:  # then it is a traceback that ends in the message proper
            message = message.strip().splitlines()[-1].partition(': ')[2]
        fail(message, every_process)


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


def integers(what: str) -> Callable[[str], tuple[int, ...]]:
    """Make a parser of integers with commas between them, for the `type` of an argument.

    Args:
        what: What they are and an example, for the error.
    """
    def parse(text: str) -> tuple[int, ...]:
        try:
            return tuple(int(n) for n in text.split(','))
        except ValueError:
            raise argparse.ArgumentTypeError(f'must be {what}, got {text!r}') from None
    return parse


parse_blocks = integers("blocks per stage such as '2,2,2,2'")


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
    """Parse a keyword argument, for example 'channels=16,32,64'. What is no Python literal is a string.

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


def resolve_name(name: str) -> str:
    """Make the name that timm takes of a model's folder; any other name, and one in timm's registry, stays as it is.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.
    """
    return f'local-dir:{name}' if os.path.isdir(name) and not timm.is_model(name.split('.')[0]) else name


@contextmanager
def _creation_errors(name: str, checkpoint_path: str = '') -> Iterator[None]:
    try:
        yield
    except Exception as e:  # timm and its loaders raise many types, and none that they share
        weights = f' with the weights in {checkpoint_path!r}' if checkpoint_path else ''
        pickled = isinstance(e.__cause__, pickle.UnpicklingError)  # timm's advice is to execute what stands there
        reason = 'it is no file of weights alone' if pickled else e
        raise ValueError(f'model {name!r} cannot be created{weights}: {textwrap.shorten(str(reason), 600)}') from e


def create_ddnn(name: str, checkpoint_path: str = '', **kwargs: Any) -> nn.Module:
    """Create a dynamic-depth model by `timm.create_model`, every failure being an error of the user's input.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.
        checkpoint_path: File with weights.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        ValueError: If there is no such model, it has not several depths, or timm cannot make it from the arguments.
    """
    name = resolve_name(name)
    known = timm.list_models('ddnn_*')
    similar = difflib.get_close_matches(name, known, n=3) or known
    wrong = ValueError(f'model must be a dynamic-depth model such as {", ".join(similar)}, got {name!r}')
    if ':' not in name and name.split('.')[0] not in known:
        if '/' in name:
            raise ValueError(f"model must be a folder of a model, 'hf-hub:OWNER/NAME' or a name, got {name!r}")
        raise wrong
    with _creation_errors(name, checkpoint_path):
        if name.startswith(('local-dir:', 'hf-hub:')):
            read_config(name, kwargs.get('cache_dir'))
        model = timm.create_model(name, checkpoint_path=checkpoint_path, **kwargs)
    if not isinstance(model, DynamicDepthMixin):  # classes of timm have an attribute `depths`, too
        raise wrong
    return model


def load_model(name: str) -> nn.Module:
    """Load a model with its weights, in eval mode.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.

    Raises:
        ValueError: If there is no such model or it has no weights.
    """
    return create_ddnn(name, pretrained=True).eval()


def load_teacher(name: str) -> nn.Module:
    """Load any trained net of timm, dynamic-depth models among them, for `EKDTask.set_teacher`.

    Args:
        name: Name in timm's registry, 'local-dir:FOLDER', 'hf-hub:ID', or the folder of a training run.

    Raises:
        ValueError: If there is no such net or it has no weights.
    """
    name = resolve_name(name)
    with _creation_errors(name):
        return timm.create_model(name, pretrained=True)


def saved_results(model: nn.Module) -> list[dict[str, Any]]:
    """Find the results per depth that were saved with the weights of a model, none if none were.

    Args:
        model: What `load_model` returned.

    Returns:
        Rows as at the head of `report.py`.
    """
    cfg = model.pretrained_cfg
    try:
        if cfg.get('file'):
            file = Path(cfg['file'])
            config = (file if file.is_dir() else file.parent) / 'config.json'
        else:
            repo_id, _, revision = cfg['hf_hub_id'].partition('@')
            config = fetch(repo_id, 'config.json', revision=revision or None)
        rows = json.loads(config.read_text())['depths']
        return [dict(row) for row in rows if row['depth'] in model.depths]
    except (KeyError, AttributeError, TypeError, ValueError, OSError):  # not saved by this library
        return []


def warn_of_untrained(model: nn.Module, depths: Sequence[int]) -> None:
    """Log a warning if some of the depths that are to be written were not trained."""
    untrained = [depth for depth in depths if depth not in model.trained_depths]
    if untrained:
        _logger.warning(f'of depths {untrained} the weights or statistics are not trained')


@contextmanager
def staged_folder(folder: str | Path, new: bool = False) -> Iterator[Path]:
    """Give a temporary folder whose files move to `folder` when the block ends, and vanish when it fails.

    Args:
        folder: Where the files are to be, made if it is not there.
        new: Whether it must be new or empty.

    Raises:
        FileExistsError: If it is not new or empty.
        NotADirectoryError: If it is, or lies in, something else than a folder.
    """
    folder = Path(folder).absolute()
    if new and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f'output must be a new or an empty folder, got {str(folder)!r}')
    base = next(path for path in (folder, *folder.parents) if path.exists())
    if not base.is_dir():
        raise NotADirectoryError(f'output must be a folder, got {str(folder)!r}: {str(base)!r} is none')
    with tempfile.TemporaryDirectory(dir=base, prefix='.timm-ddnn-') as temporary:
        yield Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)
