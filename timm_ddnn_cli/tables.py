"""What the commands print: tables that fit 80 columns, lines that other programs can read, and short numbers."""
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.status import Status
from rich.table import Table
from rich.text import Text

__all__ = [
    'cost_cells', 'create_table', 'format_count', 'format_interval', 'print_files', 'print_line', 'print_table',
    'result_table', 'show_progress', 'show_status',
]


def format_count(value: float) -> str:
    """Write a number with three digits and a unit: 1.81 G, 25.6 M, 269 k."""
    for unit, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if value >= 0.9995 * unit:
            scaled = value / unit
            return f'{scaled:.{max(0, 2 - (scaled >= 9.995) - (scaled >= 99.95))}f} {letter}'
    return f'{value:.0f}'


def format_interval(ends: Sequence[float]) -> str:
    """Write the ends of a confidence interval in percent: 83.21 - 89.46."""
    return ' - '.join(f'{end:.2f}' for end in ends)


def cost_cells(row: Mapping[str, Any]) -> list[str]:
    """Format what a depth costs: depth, blocks, parameters and multiply-accumulates.

    Args:
        row: Row with depth, blocks, parameters and macs, as `count_costs` gives it.
    """
    blocks = '-'.join(map(str, row['blocks']))
    return [str(row['depth']), blocks, format_count(row['parameters']), format_count(row['macs'])]


def create_table(
        columns: Sequence[str],
        *,
        left: Sequence[str] = (),
        fold: Sequence[str] = (),
        title: str = '',
        caption: str = '',
) -> Table:
    """Create a table of numbers without a row.

    Args:
        columns: Names of the columns.
        left: Those of text, which are aligned to the left.
        fold: Those of text of any length, which go on in the next line where they must.
        title: Title.
        caption: Text below it.
    """
    table = Table(
        title=Text(title) if title else None, caption=Text(caption) if caption else None, box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        text = column in left or column in fold
        table.add_column(
            column, justify='left' if text else 'right', no_wrap=column not in fold, overflow='fold')
    return table


def result_table(rows: Sequence[Mapping[str, Any]], title: str, num_parameters: int) -> Table:
    """Lay out costs and accuracy per depth.

    Args:
        rows: Rows with depth, blocks, parameters, macs, top1 and top5.
        title: Title.
        num_parameters: Parameters of the model that holds all depths.
    """
    table = create_table(
        ('depth', 'blocks', 'parameters', 'MACs', 'top-1 (%)', 'top-5 (%)'), title=title,
        caption=f'all depths in one model: {format_count(num_parameters)} parameters')
    for row in rows:
        table.add_row(*cost_cells(row), f'{row["top1"]:.2f}', f'{row["top5"]:.2f}')
    return table


def print_table(table: Table) -> None:
    """Print a table."""
    Console().print(table)


def print_line(text: str) -> None:
    """Print a line as it is, however long."""
    Console().print(text, soft_wrap=True, markup=False, highlight=False)


def print_files(folder: str | os.PathLike, names: Iterable[str]) -> None:
    """Print which files were written to a folder."""
    print_line(f'{os.fspath(folder)}: {" ".join(names)}')


_stderr = Console(stderr=True, quiet=os.environ.get('LOCAL_RANK', '0') != '0')  # one: what it shows may be nested


def show_progress(batches: Iterable[Any]) -> Iterable[Any]:
    """Show on stderr, if it is a terminal, how many of some batches were taken."""
    return track(batches, '', console=_stderr, transient=True, disable=not _stderr.is_terminal)


def show_status(text: str) -> Status:
    """Show on stderr, if it is a terminal, what is being done as long as the block runs.

    A command does so from the import of the library on, which takes seconds.
    """
    return _stderr.status(text)
