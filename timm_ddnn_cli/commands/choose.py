"""`timm-ddnn choose`: the best depth for this machine."""
import argparse
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..arguments import fail, number
from .profile import RUNTIMES

HELP = 'Choose the best depth within limits, from what `profile` measured on this machine and `evaluate` found.'
EXAMPLES = """  timm-ddnn choose --latency-ms 20
  timm-ddnn choose --profile output/phone/profile.json --memory-mb 100 --min-top1 75 --runtime onnxruntime
  timm-ddnn choose --evaluation evaluation/evaluation.json --macs 2.5e9 --json | jq .depth"""
_logger = logging.getLogger(__name__)
LIMITS = {'latency_ms': 'latency', 'macs': 'MACs', 'memory_mb': 'memory', 'min_top1': 'top-1'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    arg, amount, count = parser.add_argument, number(float, 0), number(int, 1)
    arg('--profile', type=Path, default=Path('output/profile/profile.json'), metavar='FILE',
        help='what `timm-ddnn profile` wrote')
    arg('--evaluation', type=Path, metavar='FILE',
        help='JSON with the accuracy of every depth, from `timm-ddnn evaluate`; that in the profile if not given')
    arg('--latency-ms', type=amount, metavar='MS', help='most that the 90th percentile of the latency may be')
    arg('--macs', type=amount, help='most multiply-accumulates of an image, such as 2.5e9')
    arg('--memory-mb', type=amount, metavar='MB', help='most peak memory, in 10^6 bytes')
    arg('--min-top1', type=number(float, 0, 100), metavar='PERCENT',
        help='least top-1 accuracy; alone, it is the fastest depth that is chosen')
    arg('--batch-size', type=count, metavar='N', help='as it was measured; all of the profile if not given')
    arg('--threads', type=count, metavar='N', help='likewise')
    arg('--runtime', choices=RUNTIMES, help='likewise')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Choose, and print the table that the choice was made from."""
    limits = {name: getattr(args, name) for name in LIMITS}
    if all(limit is None for limit in limits.values()):
        fail('a limit must be given by --latency-ms, --macs, --memory-mb or --min-top1, got none')

    from ..tables import print_line, print_table, show_status

    with show_status('choosing'):
        from timm_ddnn.deploy.choose import read_accuracies, read_profile, select_depth
        from timm_ddnn.deploy.profile import compare_machines

    profile = read_profile(args.profile)
    accuracies = None
    if args.evaluation:
        accuracies = read_accuracies(
            args.evaluation, profile.get('architecture'), profile.get('input_size'), profile.get('model'))
    for difference in compare_machines(profile):
        _logger.warning(f'{args.profile} was measured otherwise: {difference}')
    choice = select_depth(
        profile, **limits, accuracies=accuracies, batch_size=args.batch_size, threads=args.threads,
        runtime=args.runtime,
    )
    if not args.json:
        print_table(_table(choice.rows, choice.row))
        setting = f'{choice.row["runtime"]}, batch of {choice.row["batch_size"]}, threads {choice.row["threads"]}'
        print_line(f'depth {choice.depth} ({setting}): {choice.reason}')
        if choice.ties:
            print_line(f'as accurate and slower: depth {", ".join(map(str, choice.ties))}')
    return {'model': profile.get('model'), **choice._asdict()}


def _table(rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any]) -> Any:
    from ..tables import create_table, format_count

    table = create_table(
        ('', 'depth', 'runtime', 'batch', 'threads', '90 %', 'peak', 'MACs', 'top-1', 'beyond'),
        left=('runtime',), fold=('beyond',),
        caption='90 %: 90th percentile of the latency of a batch (ms); peak memory (MB); beyond: limits')
    for row in rows:
        memory, top1 = row.get('memory_mb'), row.get('top1')
        table.add_row(
            '*' if row is chosen else '', str(row['depth']), row['runtime'], str(row['batch_size']),
            str(row['threads']), f'{row["p90_ms"]:.2f}', '' if memory is None else f'{memory:.1f}',
            format_count(row['macs']), '' if top1 is None else f'{top1:.2f}',
            ' '.join(LIMITS[name] for name in row['beyond']),
        )
    return table
