"""`timm-ddnn profile`: what every depth costs on this machine."""
import argparse
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..arguments import fail, number

HELP = 'Measure latency, peak memory and multiply-accumulates of every depth on this machine.'
EXAMPLES = """  timm-ddnn profile ddnn_resnet50 --batch-sizes 1 8 --threads 1 2
  timm-ddnn profile output/ddnn_resnet20-digits --runtimes eager compiled onnxruntime --output output/phone
  timm-ddnn profile hf-hub:OWNER/NAME --evaluation evaluation/evaluation.json --json
  timm-ddnn profile --file files/ddnn_resnet50-int8.onnx --threads 1 2"""
RUNTIMES = ('eager', 'compiled', 'onnxruntime')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    arg, count = parser.add_argument, number(int, 1)
    arg('model', nargs='?',
        help="folder of a training run, timm's name (of weights that do not come with this library it is created "
             'untrained: costs do not depend on them), local-dir:FOLDER or hf-hub:ID')
    arg('--file', type=Path, metavar='FILE', help='in place of a model, an ONNX file that `timm-ddnn export` wrote: '
        'latency of its depths and of a switch, memory of each and of all, on one thread if not given')
    arg('--depths', nargs='+', type=int, metavar='DEPTH', help='some of its depths, all if not given')
    arg('--batch-sizes', nargs='+', type=count, default=[1], metavar='N', help='images per batch')
    arg('--threads', nargs='+', type=count, metavar='N', help="threads, PyTorch's choice if not given")
    arg('--runtimes', nargs='+', choices=RUNTIMES, help='what runs the nets, eager if not given')
    arg('--rounds', type=count, default=20, help='rounds, each with a call of every depth that counts')
    arg('--img-size', type=count, metavar='PIXELS', help="side of the images, the model's if not given")
    arg('--device', help="'cpu' or 'cuda': the GPU if there is one, else the CPU, if not given")
    arg('--evaluation', type=Path, metavar='FILE',
        help='JSON with the accuracy of every depth, from `timm-ddnn evaluate`; that saved with the model if not given')
    arg('--output', type=Path, default=Path('output/profile'), help='folder for profile.json and profile.png')


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Profile, and print a table."""
    if (args.model is None) is (args.file is None):
        fail(f'either a model or --file must be given, got {"neither" if args.file is None else "both"}')
    of_model = ('runtimes', 'img_size', 'device', 'evaluation')
    if args.file and (given := [name for name in of_model if getattr(args, name) is not None]):
        fail(f'--{given[0].replace("_", "-")} is for a model, got --file')

    from ..tables import print_files, print_table, show_status

    with show_status('loading') as status:
        from timm_ddnn.deploy.profile import profile_saved
        from timm_ddnn.deploy.profile_file import profile_file

        common = dict(
            depths=args.depths, batch_sizes=args.batch_sizes, rounds=args.rounds, on_step=status.update)
        if args.file:
            profile = profile_file(args.file, args.output, threads=args.threads or (1,), **common)
        else:
            profile = profile_saved(
                args.model, args.output, evaluation=args.evaluation, threads=args.threads,
                runtimes=args.runtimes or ('eager',), img_size=args.img_size, device=args.device, **common)
    if not args.json:
        print_table(_table(profile))
        print_files(args.output, ('profile.json', 'profile.png'))
    return profile


def _table(profile: Mapping[str, Any]) -> Any:
    from ..tables import create_table, format_count

    rows = {row['depth']: row for row in profile['depths']}
    compiled = any(m['compile_s'] is not None for m in profile['measurements'])
    known = any('top1' in row for row in rows.values())
    runtimes = {m['runtime'] for m in profile['measurements']}
    ways = ('runtime', 'batch', 'threads') if len(runtimes) > 1 else ('batch', 'threads')
    columns = [*ways, 'depth', 'MACs', 'median', '90 %', 'peak']
    switched = any(m.get('switch_ms') is not None for m in profile['measurements'])
    columns += ['compile'] * compiled + ['switch', 'all'] * switched + ['top-1'] * known
    memory = 'memory of a process' if profile['device'] == 'cpu' else 'memory of the tensors'
    table = create_table(
        columns, left=('runtime',),
        title=f'{profile["architecture"]} on {profile["device"]}, {", ".join(sorted(runtimes))}',
        caption=f'latency of a batch (ms): median and 90th percentile of {profile["measurements"][0]["runs"]} runs\n'
                f'peak {memory} with {"this depth" if switched else "the plain net"} alone (MB)'
                + '; compile: first call (s)' * compiled
                + '\nswitch: first call after another depth (ms); all: peak memory of all depths (MB)' * switched
                + ('' if profile['trained_depths'] else '\nthe weights are not trained'))
    groups = itertools.groupby(profile['measurements'], key=lambda m: (m['runtime'], m['batch_size'], m['threads']))
    for way, group in groups:
        for i, m in enumerate(group):
            row = rows[m['depth']]
            cells = ['' if i else str(value) for value in way[-len(ways):]]
            cells += [str(m['depth']), format_count(row['macs'])]
            cells += [f'{m["median_ms"]:.2f}', f'{m["p90_ms"]:.2f}', f'{m["memory_mb"]:.1f}']
            if compiled:
                cells.append('' if m['compile_s'] is None else f'{m["compile_s"]:.1f}')
            if switched:
                cells += [f'{m["switch_ms"]:.2f}', f'{m["memory_all_mb"]:.1f}']
            if known:
                cells.append(f'{row["top1"]:.2f}' if 'top1' in row else '')
            table.add_row(*cells)
        table.add_section()
    return table
