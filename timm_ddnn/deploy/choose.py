"""Choice of a depth from what was measured of each: `profiling.py` measures, `controller.py` moves it under load.

This module imports the standard library alone.
"""
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ['Choice', 'NoDepthError', 'percentile_90', 'profile_rows', 'read_accuracies', 'read_profile', 'select_depth']


_logger = logging.getLogger(__name__)
_COLUMNS = {
    'depths': ('depth', 'macs'),
    'measurements': ('depth', 'batch_size', 'threads', 'median_ms', 'p90_ms'),
}
_OPTIONAL = ('top1', 'memory_mb')


class NoDepthError(ValueError):
    """No depth fulfils what was asked for; the message names the nearest.

    Attributes:
        nearest: Row of the nearest depth, see `profile_rows`.
    """

    def __init__(self, message: str, nearest: dict[str, Any]) -> None:
        """Make the error.

        Args:
            message: What was asked for and what there is.
            nearest: Row of the nearest depth.
        """
        super().__init__(message)
        self.nearest = nearest


class Choice(NamedTuple):
    """A depth that was chosen.

    Attributes:
        depth: The depth.
        reason: Why this one, and what each of the others failed by, in a sentence or two.
        row: What was measured of it, see `profile_rows`.
    """
    depth: int
    reason: str
    row: dict[str, Any]


class _Constraint(NamedTuple):
    name: str
    key: str
    limit: float | None
    unit: str
    scale: float = 1.0
    least: bool = False  # whether the limit is the least value allowed, not the greatest

    def __str__(self) -> str:
        return f'{self.name} of at {"least" if self.least else "most"} {self.limit / self.scale:g} {self.unit}'

    def value(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        return f'{self.name} {"unknown" if value is None else f"{value / self.scale:.4g} {self.unit}"}'

    def excess(self, row: Mapping[str, Any]) -> float:
        """How far a row is beyond the limit, relative to it unless that is 0; at most 0 if it is not beyond."""
        value = row.get(self.key)
        if value is None:
            return math.inf
        beyond = self.limit - value if self.least else value - self.limit
        return beyond / (self.limit or 1.0)


def percentile_90(values: Sequence[float]) -> float:
    """Find the least of some values that 90 % of them do not exceed (nearest rank, nothing is interpolated)."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


def read_profile(path: Path) -> dict[str, Any]:
    """Read a profile that `timm-ddnn profile` wrote.

    Args:
        path: `profile.json`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not a profile.
    """
    profile = _read_json(path, 'a profile', '`timm-ddnn profile`')
    try:
        profile_rows(profile)
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None
    return profile


def read_accuracies(
        path: Path,
        architecture: str,
        input_size: Sequence[int] | None = None,
        model: str | None = None,
) -> dict[int, float]:
    """Read the top-1 accuracy of every depth, in percent.

    A warning says if it is that of another architecture, of another model, or of images of another size.

    Args:
        path: JSON file with the key 'depths', rows with depth and top1: `evaluation.json`, or of a training run
            `summary.json` or `config.json`.
        architecture: timm's name of the model that the accuracy is wanted of.
        input_size: Size of the images that it is wanted of, (C, H, W), None if that is not known.
        model: The model's name or folder as it was given, None if that is not known.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it has no such rows.
    """
    content = _read_json(path, 'accuracies', '`timm-ddnn evaluate` or a training run')
    try:
        _check_rows(content, 'depths', ('depth', 'top1'))
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from None
    if content.get('architecture', architecture) != architecture:
        _logger.warning(f'{path} is of {content["architecture"]}, and the costs are of {architecture}.')
    elif model and content.get('model', model) != model:
        _logger.warning(f'{path} is of the model {content["model"]}, and the costs are of {model}.')
    if input_size and list(content.get('input_size', input_size)) != list(input_size):
        _logger.warning(f'{path} is of images {content["input_size"]}, and the costs are of {list(input_size)}.')
    return {row['depth']: row['top1'] for row in content['depths']}


def _read_json(path: Path, content: str, writer: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        message = f'{content} must be in a file that {writer} wrote, there is no {str(path)!r}'
        raise FileNotFoundError(message) from None
    except ValueError as e:
        raise ValueError(f'{path} is not a JSON file: {e}') from None


def _check_rows(content: Any, name: str, columns: Sequence[str]) -> None:
    rows = content.get(name) if isinstance(content, Mapping) else None
    if not (isinstance(rows, (list, tuple)) and rows and all(isinstance(row, Mapping) for row in rows)):
        raise ValueError(f'key {name!r} must hold rows with {", ".join(columns)}')
    for row in rows:
        for column in (*columns, *(c for c in _OPTIONAL if row.get(c) is not None)):
            value = row.get(column)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f'{column} in {name!r} must be a number, got {value!r}')


def profile_rows(
        profile: Mapping[str, Any],
        *,
        accuracies: Mapping[int, float] | None = None,
        batch_size: int | None = None,
        threads: int | None = None,
        runtime: str | None = None,
) -> list[dict[str, Any]]:
    """Select from a profile what was measured in one way.

    Args:
        profile: Profile, see `timm_ddnn.profiling.profile_model`.
        accuracies: Top-1 accuracy of every depth in percent, in the place of those in the profile.
        batch_size: Images per batch; this and the next two are those measured first if None.
        threads: Threads.
        runtime: 'eager', 'compiled' or 'onnxruntime'.

    Returns:
        A row per depth, the deepest first: depth, macs, median_ms, p90_ms, memory_mb, ..., and top1 where it is known.

    Raises:
        ValueError: If that is not a profile, has no such measurements, or a depth without accuracy.
    """
    if not isinstance(profile, Mapping):
        raise ValueError(f'profile must be a mapping, as read_profile gives it, got {type(profile).__name__}')
    for name, columns in _COLUMNS.items():
        _check_rows(profile, name, columns)
    measurements = profile['measurements']
    wanted = {'batch_size': batch_size, 'threads': threads, 'runtime': runtime}
    for key, value in wanted.items():
        known = list(dict.fromkeys(row.get(key) for row in measurements))
        if value is None:
            wanted[key] = known[0]
        elif value not in known:
            raise ValueError(f'{key} must be one that was measured, {", ".join(map(str, known))}, got {value!r}')
    rows = {row['depth']: dict(row) for row in profile['depths']}
    rows = [
        {**rows[row['depth']], **row} for row in measurements
        if row['depth'] in rows and all(row.get(key) == value for key, value in wanted.items())
    ]
    if not rows:
        raise ValueError(f'no depth was measured with {wanted}')
    if accuracies is not None:
        missing = [row['depth'] for row in rows if row['depth'] not in accuracies]
        if missing:
            raise ValueError(f'accuracies must be of all depths of the profile; {missing} are not in {[*accuracies]}')
        rows = [{**row, 'top1': accuracies[row['depth']]} for row in rows]
    return sorted(rows, key=lambda row: -row['depth'])


def select_depth(
        profile: Mapping[str, Any],
        *,
        latency_ms: float | None = None,
        macs: float | None = None,
        memory_mb: float | None = None,
        min_top1: float | None = None,
        accuracies: Mapping[int, float] | None = None,
        batch_size: int | None = None,
        threads: int | None = None,
        runtime: str | None = None,
) -> Choice:
    """Choose the best depth within limits.

    The best is that of the highest top-1; of equal ones, and where `min_top1` is the only limit, that of the least
    median latency. Where no accuracy is known it is the deepest.

    Args:
        profile: Profile, see `timm_ddnn.profiling.profile_model`.
        latency_ms: Most that the 90th percentile of the latency of a batch may be, in milliseconds.
        macs: Most multiply-accumulates of an image.
        memory_mb: Most memory of the net of that depth, in 10^6 bytes, as the profile defines it.
        min_top1: Least top-1 accuracy in percent.
        accuracies: As for `profile_rows`.
        batch_size: As for `profile_rows`.
        threads: As for `profile_rows`.
        runtime: As for `profile_rows`.

    Raises:
        NoDepthError: If no depth is within all limits.
        ValueError: If no limit is given, one is negative or not finite, or the profile has not what it takes.
    """
    rows = profile_rows(profile, accuracies=accuracies, batch_size=batch_size, threads=threads, runtime=runtime)
    unit, scale = ('G', 1e9) if max(row['macs'] for row in rows) >= 1e9 else ('M', 1e6)
    latency = _Constraint('latency', 'p90_ms', latency_ms, 'ms')
    constraints = [constraint for constraint in (
        latency,
        _Constraint('MACs', 'macs', macs, unit, scale),
        _Constraint('memory', 'memory_mb', memory_mb, 'MB'),
        _Constraint('top-1', 'top1', min_top1, '%', least=True),
    ) if constraint.limit is not None]
    if not constraints:
        raise ValueError('give a limit: latency_ms, macs, memory_mb or min_top1')
    for constraint in constraints:
        if not (constraint.limit >= 0 and math.isfinite(constraint.limit)):
            raise ValueError(f'the limit of {constraint.name} must be a number of at least 0, got {constraint.limit}')
        if all(row.get(constraint.key) is None for row in rows):
            raise ValueError(f'a limit of {constraint.name} needs a profile that has it, or an evaluation')

    failed = {row['depth']: [c for c in constraints if c.excess(row) > 0] for row in rows}
    fitting = [row for row in rows if not failed[row['depth']]]
    asked = ' and '.join(map(str, constraints))
    if not fitting:
        nearest = min(rows, key=lambda row: max(c.excess(row) for c in constraints))
        values = ', '.join(c.value(nearest) for c in constraints)
        raise NoDepthError(f'no depth has {asked}; the nearest is depth {nearest["depth"]}: {values}', nearest)
    if [c.key for c in constraints] == ['top1']:
        best, why = min(fitting, key=lambda row: row['median_ms']), 'the least latency'
    elif any(row.get('top1') is not None for row in fitting):
        best = max(fitting, key=lambda row: (row.get('top1') or 0, -row['median_ms']))
        why = f'the highest top-1 ({best["top1"]:.2f} %)'
    else:
        best, why = fitting[0], 'the most layers (no accuracy is known)'
    shown = dict.fromkeys([*constraints, latency])
    reason = (
        f'Of the depths with {asked}, {best["depth"]} has {why}: {", ".join(c.value(best) for c in shown)} (90th '
        f'percentile of the latency; batch of {best["batch_size"]}, {best["threads"]} '
        f'thread{"s"[:best["threads"] != 1]}, {best.get("runtime", "runtime unknown")}).'
    )
    others = [f'depth {d} by {", ".join(c.value(row) for c in failed[d])}' for row in rows if failed[d := row['depth']]]
    return Choice(best['depth'], f'{reason} Failed: {"; ".join(others)}.' if others else reason, best)
