"""Choice of a depth from what was measured of each: `profile.py` measures, `controller.py` moves it under load."""
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.errors import InputError
from ..utils.schema import Check, brief, integer, items, judge, mapping, number, optional, read_json, record, text

__all__ = ['Choice', 'NoDepthError', 'percentile_90', 'profile_rows', 'read_accuracies', 'read_profile', 'select_depth']


_logger = logging.getLogger(__name__)

# What files of other machines may hold; further keys are passed over
_AMOUNT, _COUNT = number(0, 1e18), integer(1, 10 ** 9)
_ROWS_MOST = 100_000
_ABOUT = {
    'model': optional(text()),
    'architecture': text(),
    'input_size': items(_COUNT, least=3, most=3),
}
_TOP1 = number(0, 100)
EVALUATION = record({'depths': items(record({'depth': _COUNT, 'top1': _TOP1}), 1, _ROWS_MOST, 'depth')}, _ABOUT)
_COSTS = record({'depth': _COUNT, 'macs': _AMOUNT}, {'top1': optional(_TOP1)})
_MEASUREMENT = record(
    {
        'depth': _COUNT, 'runtime': text(), 'batch_size': _COUNT, 'threads': _COUNT, 'median_ms': _AMOUNT,
        'p90_ms': _AMOUNT,
    },
    {'memory_mb': optional(_AMOUNT)},
)
_ANYTHING = mapping(lambda value: None)
PROFILE = record(
    {'depths': items(_COSTS, 1, _ROWS_MOST, 'depth'), 'measurements': items(_MEASUREMENT, 1, _ROWS_MOST)},
    {**_ABOUT, 'hardware': _ANYTHING, 'versions': _ANYTHING},
)
_COLUMNS = {'latency_ms': 'p90_ms', 'macs': 'macs', 'memory_mb': 'memory_mb', 'min_top1': 'top1'}  # by limit


class NoDepthError(InputError):
    """No depth is within all limits; the message names the nearest.

    Attributes:
        nearest: Row of the nearest depth, see `profile_rows`.
    """

    exit_status = 3

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
        reason: What it was chosen for.
        ties: Other depths within the limits that are as accurate, but slower.
        row: What was measured of it, one of `rows`.
        rows: What the choice was made from, see `profile_rows`; each with `beyond`, the names of the limits that it
            is beyond.
    """
    depth: int
    reason: str
    ties: list[int]
    row: dict[str, Any]
    rows: list[dict[str, Any]]


def percentile_90(values: Sequence[float]) -> float:
    """Find the least of some values that 90 % of them do not exceed (nearest rank, nothing is interpolated)."""
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


def read_profile(path: str | Path) -> dict[str, Any]:
    """Read a profile that `timm-ddnn profile` wrote.

    Args:
        path: `profile.json`.

    Raises:
        OSError: If the file cannot be read.
        InputError: If it is not a profile.
    """
    return _read(path, PROFILE, '`timm-ddnn profile`')


def read_accuracies(
        path: str | Path,
        architecture: str | None,
        input_size: Sequence[int] | None = None,
        model: str | None = None,
) -> dict[int, float]:
    """Read the top-1 accuracy of every depth, in percent.

    A warning is logged if it is that of another architecture, of another model, or of images of another size.

    Args:
        path: JSON file with the key 'depths', rows with depth and top1: `evaluation.json`, or of a training run
            `summary.json` or `config.json`.
        architecture: timm's name of the model that the accuracy is wanted of; this and the next two are None if they
            are not known.
        input_size: Size of its images, (C, H, W).
        model: Its name or folder as it was given.

    Raises:
        OSError: If the file cannot be read.
        InputError: If it has no such rows.
    """
    content = _read(path, EVALUATION, '`timm-ddnn evaluate` or a training run')
    wanted = {'architecture': architecture, 'model': model, 'input_size': input_size and list(input_size)}
    for key, value in wanted.items():
        found = content.get(key)
        if found and value and found != value:
            _logger.warning(f'{path} has the accuracy for {key} {brief(found)}, the costs are for {brief(value)}')
            break  # a model of another architecture has another name, too
    return {row['depth']: row['top1'] for row in content['depths']}


def _read(path: str | Path, check: Check, writer: str) -> dict[str, Any]:
    if not Path(path).exists():
        raise FileNotFoundError(f'there must be a file that {writer} wrote, got {str(path)!r}')
    return read_json(path, check)


def profile_rows(
        profile: Mapping[str, Any],
        *,
        accuracies: Mapping[int, float] | None = None,
        batch_size: int | None = None,
        threads: int | None = None,
        runtime: str | None = None,
) -> list[dict[str, Any]]:
    """Select measurements of a profile.

    Args:
        profile: Profile, see `timm_ddnn.deploy.profile`.
        accuracies: Top-1 accuracy of every depth in percent, in the place of those in the profile.
        batch_size: Images per batch; this and the next two select what was measured so, all if None.
        threads: Threads.
        runtime: 'eager', 'compiled' or 'onnxruntime'.

    Returns:
        A row per measurement, the deepest first: depth, macs, runtime, batch_size, threads, median_ms, p90_ms,
        memory_mb, ..., and top1 where it is known.

    Raises:
        InputError: If that is not a profile, has no such measurements, or a depth without accuracy.
    """
    judge(profile, PROFILE, 'profile')
    wanted = {'batch_size': batch_size, 'threads': threads, 'runtime': runtime}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    for key, value in wanted.items():
        known = sorted({row[key] for row in profile['measurements']})
        if value not in known:
            raise InputError(f'{key} must be one that was measured, {", ".join(map(str, known))}, got {value!r}')
    costs = {row['depth']: row for row in profile['depths']}
    measured = {row['depth'] for row in profile['measurements']}
    if costs.keys() != measured:
        raise InputError(
            f'profile must have costs and measurements of the same depths, got {sorted(costs)} and {sorted(measured)}')
    rows = [
        {**costs[row['depth']], **row} for row in profile['measurements']
        if all(row[key] == value for key, value in wanted.items())
    ]
    if not rows:
        raise InputError(f'no depth was measured with {wanted}')
    if accuracies is not None:
        missing = sorted({row['depth'] for row in rows} - set(accuracies))
        if missing:
            raise InputError(f'accuracies must be of all depths of the profile; {missing} are not in {[*accuracies]}')
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
    """Choose the best depth within limits, and how to run it if the profile has several ways.

    The best has the highest top-1; of equal ones, and where `min_top1` is the only limit, the least median latency per
    image. Where no accuracy is known it is the deepest.

    Args:
        profile: Profile, see `timm_ddnn.deploy.profile`.
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
        InputError: If no limit is given, one is negative or not finite, or the profile lacks what a limit is about.
    """
    limits = {'latency_ms': latency_ms, 'macs': macs, 'memory_mb': memory_mb, 'min_top1': min_top1}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if not limits:
        raise InputError(f'a limit is expected, one of {", ".join(_COLUMNS)}, got none')
    rows = profile_rows(profile, accuracies=accuracies, batch_size=batch_size, threads=threads, runtime=runtime)
    for name, limit in limits.items():
        judge(limit, _AMOUNT, name)
        if all(row.get(_COLUMNS[name]) is None for row in rows):
            raise InputError(f'{name} needs a profile or an evaluation with {_COLUMNS[name]}, which is in neither')
    for row in rows:
        row['beyond'] = [name for name, limit in limits.items() if _excess(row, name, limit) > 0]
    fitting = [row for row in rows if not row['beyond']]
    if not fitting:
        nearest = min(rows, key=lambda row: max(_excess(row, name, limit) for name, limit in limits.items()))
        asked = ', '.join(f'{name} {limit:g}' for name, limit in limits.items())
        found = ', '.join(
            f'{column} {"unknown" if nearest.get(column) is None else format(nearest[column], ".4g")}'
            for column in map(_COLUMNS.get, limits))
        raise NoDepthError(
            f'no depth is within {asked}; the nearest is depth {nearest["depth"]} ({nearest["runtime"]}): {found}',
            nearest)

    if [*limits] == ['min_top1']:
        best, reason = fitting, 'least latency per image'
    elif any(row.get('top1') is not None for row in fitting):
        unknown = sorted({row['depth'] for row in fitting if row.get('top1') is None})
        if unknown:
            _logger.warning(f'the accuracy of depths {unknown} is not known, they are left out')
        top1 = max(row.get('top1') or 0 for row in fitting)
        best, reason = [row for row in fitting if row.get('top1') == top1], f'highest top-1, {top1:.2f} %'
    else:
        depth = max(row['depth'] for row in fitting)
        best, reason = [row for row in fitting if row['depth'] == depth], 'most layers, no accuracy is known'
    row = min(best, key=lambda row: row['median_ms'] / row['batch_size'])
    ties = {other['depth'] for other in fitting if other.get('top1') is not None and other['top1'] == row.get('top1')}
    return Choice(row['depth'], reason, sorted(ties - {row['depth']}, reverse=True), row, rows)


def _excess(row: Mapping[str, Any], name: str, limit: float) -> float:
    """How far a row is beyond a limit, relative to it unless that is 0; at most 0 within it, infinite if unknown."""
    value = row.get(_COLUMNS[name])
    if value is None:
        return math.inf
    beyond = limit - value if name == 'min_top1' else value - limit
    return beyond / (limit or 1.0)
