"""`timm-ddnn choose`: the best depth for this machine."""
import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from timm_ddnn.deploy.choose import NoDepthError, read_accuracies, read_profile, select_depth
from timm_ddnn.deploy.profile import RUNTIMES, compare_machines

from ..arguments import number

HELP = 'Choose the best depth within limits, from what `profile` measured on this machine and `evaluate` found.'
EXAMPLES = """  timm-ddnn choose --latency-ms 20
  timm-ddnn choose --profile output/phone/profile.json --memory-mb 100 --min-top1 75 --runtime onnxruntime
  timm-ddnn choose --evaluation evaluation.json --macs 2.5e9 --json | jq .depth"""
_logger = logging.getLogger(__name__)


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
    arg('--batch-size', type=count, metavar='N', help='as it was measured; the first of the profile if not given')
    arg('--threads', type=count, metavar='N', help='likewise')
    arg('--runtime', choices=RUNTIMES, help='likewise')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Choose, and print the depth and the reason."""
    limits = {name: getattr(args, name) for name in ('latency_ms', 'macs', 'memory_mb', 'min_top1')}
    if all(limit is None for limit in limits.values()):
        raise ValueError('a limit must be given by --latency-ms, --macs, --memory-mb or --min-top1, got none')
    profile = read_profile(args.profile)
    name = profile.get('architecture', 'unknown')
    accuracies = args.evaluation and read_accuracies(
        args.evaluation, name, profile.get('input_size'), profile.get('model'))
    for difference in compare_machines(profile):
        _logger.warning(f'{args.profile} was measured otherwise: {difference}.')
    try:
        choice = select_depth(
            profile, **limits, accuracies=accuracies, batch_size=args.batch_size, threads=args.threads,
            runtime=args.runtime,
        )
    except NoDepthError as e:
        print(f'error: {e}', file=sys.stderr)
        sys.exit(3)
    if not args.json:
        console = Console(soft_wrap=True, markup=False, highlight=False)
        console.print(f'{name}, depth {choice.depth}')
        console.print(choice.reason)
    return {'model': profile.get('model'), **choice._asdict()}
