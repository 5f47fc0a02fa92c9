"""`timm-ddnn profile`: what every depth costs on this machine."""
import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from timm_ddnn.deploy.profile import RUNTIMES, _title, profile_saved

from ..arguments import number

HELP = 'Measure latency, peak memory and multiply-accumulates of every depth on this machine.'
EXAMPLES = """  timm-ddnn profile ddnn_resnet50 --batch-sizes 1 8 --threads 1 2
  timm-ddnn profile output/ddnn_resnet20-digits --runtimes eager compiled onnxruntime --output output/phone
  timm-ddnn profile hf-hub:OWNER/NAME --evaluation evaluation.json --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    arg, count = parser.add_argument, number(int, 1)
    arg('model', help="folder of a training run, timm's name (of weights that do not come with this library it is "
                      'created untrained: costs do not depend on them), local-dir:FOLDER or hf-hub:ID')
    arg('--depths', nargs='+', type=int, metavar='DEPTH', help='some of its depths, all if not given')
    arg('--batch-sizes', nargs='+', type=count, default=[1], metavar='N', help='images per batch')
    arg('--threads', nargs='+', type=count, metavar='N', help="threads, PyTorch's choice if not given")
    arg('--runtimes', nargs='+', choices=RUNTIMES, default=['eager'], help='what runs the nets')
    arg('--rounds', type=count, default=20, help='rounds, each with a call of every depth that counts')
    arg('--img-size', type=count, metavar='PIXELS', help="side of the images, the model's if not given")
    arg('--device', help="'cpu' or 'cuda': the GPU if there is one, else the CPU, if not given")
    arg('--evaluation', type=Path, metavar='FILE',
        help='JSON with the accuracy of every depth, from `timm-ddnn evaluate`; that saved with the model if not given')
    arg('--output', type=Path, default=Path('output/profile'), help='folder for profile.json and profile.png')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Profile, and print a table."""
    with Console(stderr=True).status('loading') as status:
        profile = profile_saved(
            args.model, args.output, evaluation=args.evaluation, depths=args.depths, batch_sizes=args.batch_sizes,
            threads=args.threads, runtimes=args.runtimes, rounds=args.rounds, img_size=args.img_size,
            device=args.device, on_step=status.update,
        )
    if not args.json:
        console = Console()
        console.print(_table(profile))
        console.print(f'{args.output}: profile.json profile.png', soft_wrap=True, markup=False, highlight=False)
    return profile


def _table(profile: Mapping[str, Any]) -> Table:
    rows = {row['depth']: row for row in profile['depths']}
    compiled = any(m['compile_s'] is not None for m in profile['measurements'])
    known = any('top1' in row for row in rows.values())
    memory = 'growth of the resident memory of a process with the plain net alone, libraries left out'
    if profile['device'] != 'cpu':
        memory = 'what tensors hold at once with the plain net alone'
    caption = (
        f'latency of a batch, runs of each: {profile["measurements"][0]["runs"]}; peak: {memory}'
        + ('' if profile['trained_depths'] else '; the weights are not trained')
    )
    table = Table(title=_title(profile), caption=caption)
    columns = ['runtime', 'depth', 'MACs (M)', 'median (ms)', '90 % (ms)', 'peak (MB)']
    columns += ['compile (s)'] * compiled + ['top-1 (%)'] * known
    for column in columns:
        text = column == 'runtime'
        table.add_column(column, justify='left' if text else 'right', no_wrap=text)
    ways = itertools.groupby(profile['measurements'], key=lambda m: (m['runtime'], m['batch_size'], m['threads']))
    for (runtime, batch_size, threads), group in ways:
        group = list(group)
        lines = {
            'runtime': [runtime, f'batch of {batch_size}', f'{threads} thread{"s"[:threads != 1]}'],
            'depth': [str(m['depth']) for m in group],
            'MACs (M)': [f'{rows[m["depth"]]["macs"] / 1e6:.1f}' for m in group],
            'median (ms)': [f'{m["median_ms"]:.2f}' for m in group],
            '90 % (ms)': [f'{m["p90_ms"]:.2f}' for m in group],
            'peak (MB)': [f'{m["memory_mb"]:.1f}' for m in group],
            'compile (s)': ['' if m['compile_s'] is None else f'{m["compile_s"]:.1f}' for m in group],
            'top-1 (%)': [f'{rows[m["depth"]]["top1"]:.2f}' if 'top1' in rows[m['depth']] else '' for m in group],
        }
        table.add_row(*('\n'.join(lines[column]) for column in columns), end_section=True)
    return table
