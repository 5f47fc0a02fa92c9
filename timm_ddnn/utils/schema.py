"""JSON files from elsewhere: one reader, and the checks that describe what a file may hold.

A check takes a value and returns its first fault, or None. The functions below make checks and combine them, so that a
file is described by a table, which stands where the file is read:

    ROW = record({'depth': integer(1, 10_000)}, {'top1': number(0, 100)})
    evaluation = read_json('evaluation.json', record({'depths': items(ROW, most=1_000)}))
"""
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .errors import InputError

__all__ = [
    'Check', 'Fault', 'all_of', 'any_of', 'brief', 'choice', 'flag', 'integer', 'items', 'judge', 'mapping', 'number',
    'optional', 'parse_json', 'read_json', 'record', 'text',
]


MAX_BYTES = 2 ** 24


class Fault(NamedTuple):
    """What is wrong in a value.

    Attributes:
        path: Keys and indices that lead to it, such as '.depths[2].top1'.
        allowed: What may stand there.
        value: What stands there.
    """
    path: str
    allowed: str
    value: Any


Check = Callable[[Any], Fault | None]


class _Repr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxlong = self.maxother = 80

    def repr_Tensor(self, tensor: Any, level: int) -> str:
        return f'<{type(tensor).__name__} of shape {tuple(tensor.shape)}>'

    repr_Parameter = repr_ndarray = repr_Tensor


_repr = _Repr()


def brief(value: Any) -> str:
    """Format a value for an error message, in bounded length whatever it is."""
    return _repr.repr(value)


def read_json(path: str | Path, check: Check, name: str | None = None) -> Any:
    """Read a JSON file that may hold anything, and check it.

    Args:
        path: The file, in UTF-8, of at most 16 MiB.
        check: What it may hold.
        name: What error messages call the file, its path if None.

    Raises:
        InputError: If it is no JSON, or not what the check allows.
        OSError: If it cannot be read.
    """
    name = str(path) if name is None else name
    with open(path, 'rb') as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise InputError(f'{name} must have at most {MAX_BYTES} bytes')
    value = parse_json(content, name)
    judge(value, check, name)
    return value


def parse_json(content: str | bytes, name: str) -> Any:
    """Parse JSON, in which NaN and infinity, which it has not, become text: they are refused where a number must be.

    Args:
        content: Text, or its bytes in UTF-8.
        name: What the error message calls it.

    Raises:
        InputError: If it is not JSON.
    """
    try:
        return json.loads(content if isinstance(content, str) else content.decode('utf-8'), parse_constant=str)
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or nested by the thousand
        raise InputError(f'{name} must be JSON in UTF-8: {e}') from None


def judge(value: Any, check: Check, name: str) -> None:
    """Raise an InputError if a value is not what a check allows.

    Args:
        value: What is checked.
        check: What it may be.
        name: What the error message calls it.
    """
    fault = check(value)
    if fault:
        where = f'{fault.path.removeprefix(".")} in {name}' if fault.path else name
        raise InputError(f'{where} must be {fault.allowed}, got {brief(fault.value)}')


def _leaf(allowed: str, valid: Callable[[Any], bool]) -> Check:
    return lambda value: None if valid(value) else Fault('', allowed, value)


def number(low: float = -math.inf, high: float = math.inf, *, above: float | None = None) -> Check:
    """Check for a finite number.

    Args:
        low: The least allowed.
        high: The greatest allowed.
        above: What it must be greater than.
    """
    return _leaf(
        'a number' + _range(low, high, above),
        lambda value: type(value) in (int, float) and low <= value <= high and abs(value) < math.inf
        and (above is None or value > above),
    )


def integer(low: float = -math.inf, high: float = math.inf) -> Check:
    """Check for an integer in [low, high]."""
    return _leaf('an integer' + _range(low, high), lambda value: type(value) is int and low <= value <= high)


def _range(low: float, high: float, above: float | None = None) -> str:
    if above is not None:
        return f' above {above}' + (f', at most {high}' if high < math.inf else '')
    if low > -math.inf and high < math.inf:
        return f' from {low} to {high}'
    return f' of at least {low}' if low > -math.inf else f' of at most {high}' if high < math.inf else ''


def text(most: int = 10_000, pattern: str | None = None) -> Check:
    """Check for a string.

    Args:
        most: The greatest length allowed.
        pattern: Regular expression that all of it must match.
    """
    allowed = f'text of at most {most} characters' if pattern is None else f'text that matches {pattern}'
    return _leaf(allowed, lambda value: isinstance(value, str) and len(value) <= most and (
        pattern is None or re.fullmatch(pattern, value) is not None))


flag: Check = _leaf('true or false', lambda value: isinstance(value, bool))


def choice(*values: Any) -> Check:
    """Check for one of some values."""
    return _leaf(
        f'one of {values}' if len(values) > 1 else repr(values[0]),
        lambda value: any(value == v and type(value) is type(v) for v in values),
    )


def items(check: Check, least: int = 0, most: int = 1_000, key: str | None = None) -> Check:
    """Check for a list, or a tuple, which is not JSON but may stand for a list in Python.

    Args:
        check: What each item must be.
        least: The least length allowed.
        most: The greatest length allowed.
        key: Entry by which the items are known, so that no two may have the same.
    """
    def check_items(value: Any) -> Fault | None:
        if not (isinstance(value, list | tuple) and least <= len(value) <= most):
            length = f'{most} items' if least == most else f'{least} to {most} items'
            return Fault('', f'a list of {length}', value)
        fault = _first((f'[{i}]', check(item)) for i, item in enumerate(value))
        if fault or key is None:
            return fault
        known = set()
        for i, item in enumerate(value):
            if item[key] in known:
                return Fault(f'[{i}].{key}', 'another one in each item', item[key])
            known.add(item[key])
        return None
    return check_items


def mapping(check: Check, most: int = 1_000) -> Check:
    """Check for an object with any keys.

    Args:
        check: What each value must be.
        most: The greatest number of keys allowed.
    """
    def check_mapping(value: Any) -> Fault | None:
        if not (isinstance(value, dict) and len(value) <= most):
            return Fault('', f'an object of at most {most} entries', value)
        return _first((f'.{brief(key)[1:-1]}', check(item)) for key, item in value.items())
    return check_mapping


def record(required: Mapping[str, Check], others: Mapping[str, Check] | None = None, *, strict: bool = False) -> Check:
    """Check for an object with known keys.

    Args:
        required: What must be under the keys that must be there.
        others: What must be under keys that may be missing.
        strict: Whether further keys are refused; if not, they may hold anything.
    """
    checks = {**required, **(others or {})}

    def check_record(value: Any) -> Fault | None:
        if not isinstance(value, dict):
            return Fault('', 'an object', value)
        for key in required:
            if key not in value:
                return Fault('', f'an object with {key!r}', sorted(value))
        for key in value if strict else ():
            if key not in checks:
                return Fault('', f'an object with keys of {sorted(checks)}', key)
        return _first((f'.{key}', check(value[key])) for key, check in checks.items() if key in value)
    return check_record


def _first(faults: Any) -> Fault | None:
    return next((fault._replace(path=where + fault.path) for where, fault in faults if fault), None)


def optional(check: Check) -> Check:
    """Check for null or what another check allows."""
    return lambda value: None if value is None else check(value)


def any_of(*checks: Check) -> Check:
    """Check for what any of some checks allows; the fault is that of the last."""
    def check_any(value: Any) -> Fault | None:
        fault = None
        for check in checks:
            fault = check(value)
            if fault is None:
                return None
        return fault
    return check_any


def all_of(*checks: Check) -> Check:
    """Check for what all of some checks allow; later ones may rely on what earlier ones have checked."""
    return lambda value: next((fault for check in checks if (fault := check(value))), None)
