"""`timm-ddnn list`: what models there are."""
import argparse
from typing import Any

import timm
from rich import box
from rich.console import Console
from rich.table import Table

from timm_ddnn.models.load import list_models

from ..arguments import fail

HELP = 'List the dynamic-depth models: depths, blocks, parameters, multiply-accumulates, and tags of weights.'
EXAMPLES = '''  timm-ddnn list
  timm-ddnn list "*resnet50*"
  timm-ddnn list --json | jq ".[].tags"'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument('pattern', nargs='?', default='*', help='names of models, with wildcards')


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the models."""
    models = list_models(args.pattern)
    if not models:
        fail(f'PATTERN must match some of {", ".join(timm.list_models("ddnn_*"))}, got {args.pattern!r}')
    if not args.json:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)  # fits a terminal of 80 columns
        for column in ('model', 'px', 'depth', 'blocks', 'parameters (M)', 'MACs (M)', 'weights'):
            text = column in ('model', 'weights')
            table.add_column(column, justify='left' if text else 'right', overflow='fold', no_wrap=text)
        for model in models:
            for i, row in enumerate(model['depths']):
                last = i + 1 == len(model['depths'])
                table.add_row(
                    '' if i else model['model'],
                    '' if i else str(model['input_size'][-1]),
                    str(row['depth']),
                    '-'.join(map(str, row['blocks'])),
                    f'{row["parameters"] / 1e6:.2f}',
                    f'{row["macs"] / 1e6:.1f}',
                    '' if i else ', '.join(model['tags']),
                    end_section=last,
                )
        Console().print(table)
    return models
