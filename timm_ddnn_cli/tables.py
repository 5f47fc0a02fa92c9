"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from timm_ddnn.hub.model_card import cost_cells

__all__ = ['result_table']


def result_table(rows: Sequence[Mapping[str, Any]], title: str, num_parameters: int) -> Table:
    """Lay out results per depth for the terminal.

    Args:
        rows: Rows of results, as above.
        title: Title.
        num_parameters: Parameters of the model that holds all depths.
    """
    table = Table(title=Text(title), caption=f'all depths in one model: {num_parameters / 1e6:.3f} M parameters')
    for column in ('depth', 'blocks', 'parameters (M)', 'MACs (M)', 'top-1 (%)', 'top-5 (%)'):
        table.add_column(column, justify='right')
    for row in rows:
        table.add_row(*cost_cells(row), f'{row["top1"]:.2f}', f'{row["top5"]:.2f}')
    return table
