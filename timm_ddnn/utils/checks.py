"""Values and JSON files that come from elsewhere, checked against a schema with limits.

A schema is a `Number`; str; [schema], a list of such; or a dict of schemas by key. A key that ends with '?' may be
missing or null. Keys that the schema does not name are passed over.
"""
import json
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError

__all__ = ['Number', 'check_value', 'read_json']


MAX_BYTES = 100_000_000
MAX_ITEMS = 100_000
MAX_TEXT = 10_000


class Number(NamedTuple):
    """A number in [low, high], an integer if `kind` is int."""
    kind: type
    low: float
    high: float = 1e18

    def describe(self) -> str:
        """Say in words what is allowed."""
        noun = 'an integer' if self.kind is int else 'a number'
        if self.high == 1e18:
            return f'{noun} of at least {self.low:g}'
        return f'{noun} from {self.low:g} to {self.high:g}'


def read_json(path: str | Path, schema: Any, writer: str) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        schema: What it must hold, see the head of this module.
        writer: What writes such a file, for the error where there is none.

    Raises:
        OSError: If the file cannot be read.
        InputError: If it is not a JSON file, too large, or holds something else.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f'expected a file that {writer} wrote, there is no {str(path)!r}') from None
    if size > MAX_BYTES:
        raise InputError(f'{path} must have at most {MAX_BYTES} bytes, got {size}')
    try:
        content = json.loads(path.read_bytes().decode('utf-8'))
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, too many digits, nested too deeply
        raise InputError(f'{path} is not a JSON file: {e}') from None
    check_value(content, schema, str(path))
    return content


def check_value(content: Any, schema: Any, name: str) -> None:
    """Check a value.

    Args:
        content: The value.
        schema: See the head of this module.
        name: What it is, for the error.

    Raises:
        InputError: If it is not as the schema says.
    """
    def require(fits: bool, allowed: str) -> None:
        if not fits:
            raise InputError(f'{name} must be {allowed}, got {str(content)[:80]!r}')

    if isinstance(schema, Number):
        kind = Integral if schema.kind is int else Real
        fits = isinstance(content, kind) and not isinstance(content, bool)
        require(fits and schema.low <= content <= schema.high, schema.describe())
    elif schema is str:
        require(isinstance(content, str) and len(content) <= MAX_TEXT, f'text of at most {MAX_TEXT} characters')
    elif isinstance(schema, list):
        require(isinstance(content, list | tuple) and 0 < len(content) <= MAX_ITEMS, f'1 to {MAX_ITEMS} items')
        for i, item in enumerate(content):
            check_value(item, schema[0], f'{name}[{i}]')
    else:
        require(isinstance(content, Mapping), 'a mapping')
        for key, part in schema.items():
            optional = key.endswith('?')
            key = key.removesuffix('?')
            if content.get(key) is not None or not optional:
                check_value(content.get(key), part, f'{name}: {key}' if ':' not in name else f'{name}.{key}')
