"""`timm-ddnn list`: what models there are."""
import argparse
from itertools import zip_longest
from typing import Any

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
    from ..tables import cost_cells, create_table, print_table, show_status

    with show_status('counting'):
        import timm

        from timm_ddnn.models.load import list_models

        models = list_models(args.pattern)
    if not models:
        fail(f'PATTERN must match some of {", ".join(timm.list_models("ddnn_*"))}, got {args.pattern!r}')
    if not args.json:
        table = create_table(('model, .tags', 'px', 'depth', 'blocks', 'params', 'MACs'), left=('model, .tags',))
        for model in models:
            names = [model['model'], *(f'  .{tag}' for tag in model['tags'])]
            for name, pixels, row in zip_longest(names, [str(model['input_size'][-1])], model['depths'], fillvalue=''):
                table.add_row(name, pixels, *(cost_cells(row) if row else [''] * 4))
            table.add_section()
        print_table(table)
    return models
