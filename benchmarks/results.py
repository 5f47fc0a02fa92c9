#!/usr/bin/env python3
"""Write the tables and pictures of results/README.md and MODEL_CARD.md from the JSON files in results/.

    python benchmarks/results.py

The runs come from `experiments.py`. No number stands in the texts that is not in a JSON file.
"""
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from experiments import RECIPE
from matplotlib.figure import Figure

from timm_ddnn.cli import ArgumentParser
from timm_ddnn.model_card import markdown_table
from timm_ddnn.report import save_figure, show_macs, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
HIDDEN = '--seed', '--model', '--epochs'
METHODS = {
    'alone': 'each depth trained alone, as a stock net',
    'kd': 'each depth trained alone, the full-net that was trained alone teaching it',
    'joint': 'all depths in shared weights, cross-entropy only',
    'kl': 'joint, and KL divergence from the full-net',
    'attention': 'joint, and attention of the full-net',
    'ekd': 'joint, and both: embedded knowledge distillation',
    'kl_only': 'shared weights, sub-nets learn by KL divergence only, temperature 1',
    'truncation': 'the full-net trained alone, cut to a depth, statistics estimated again',
}


def load_runs(experiment):
    """-> {method or variant: {depth: {seed: top-1}}}, and the runs themselves by name."""
    tops, runs = defaultdict(lambda: defaultdict(dict)), {}
    for path in sorted((RESULTS / experiment).glob('*.json')):
        run = json.loads(path.read_text())
        name, _, seed = path.stem.rpartition('-')
        runs[path.stem] = run
        name = re.sub(r'^(alone|kd)-\d+$', r'\1', name)
        for row in run['depths']:
            tops[name][row['depth']][int(seed)] = row['top1']
    return tops, runs


def standard_error(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def with_error(values, sign=False):
    text = f'{mean(values):+.2f}' if sign else f'{mean(values):.2f}'
    error = standard_error(values)
    return text if error is None else f'{text} ± {error:.2f}'


def difference(tops, method, other, depth):
    """Mean difference of two methods at a depth over the seeds that both have."""
    mine, theirs = tops[method].get(depth, {}), tops[other].get(depth, {})
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def comparison(experiment):
    """Table of the methods, top-1 per depth, and the differences to training alone."""
    tops, runs = load_runs(experiment)
    depths = sorted({depth for method in tops.values() for depth in method}, reverse=True)
    rows = []
    for method in METHODS:
        if method not in tops:
            continue
        cells, gains = [], []
        for depth in depths:
            values = list(tops[method].get(depth, {}).values())
            cells.append(with_error(values) if values else '')
            gain = difference(tops, method, 'alone', depth) if method != 'alone' else []
            gains.append(with_error(gain, sign=True) if gain else '')
        seeds = max(len(values) for values in tops[method].values())
        rows.append([method, *cells, *gains, str(seeds)])
    head = ['method', *map(str, depths), *(f'{depth} against alone' for depth in depths), 'seeds']
    return markdown_table(head, rows), tops, runs


def ablation_table(tops, runs):
    rows = []
    for name, by_depth in sorted(tops.items()):
        cells = ', '.join(f'{with_error(list(v.values()))} ({d})' for d, v in sorted(by_depth.items(), reverse=True))
        options = next(run['options'] for key, run in runs.items() if key.rpartition('-')[0] == name)
        options = {k: v for k, v in options.items() if RECIPE.get(k) != v and k not in HIDDEN}
        average = mean(mean(values.values()) for values in by_depth.values())
        seeds = max(len(values) for values in by_depth.values())
        text = ' '.join(flag if value is None else f'{flag} {value}'.strip() for flag, value in options.items())
        rows.append([name, cells, f'{average:.2f}', str(seeds), f'`{text}`'])
    return markdown_table(['variant', 'top-1 (depth)', 'mean', 'seeds', 'options'], rows)


def draw(experiment, tops, runs):
    """Accuracy over multiply-accumulates, EKD against alone, mean and standard error over seeds."""
    macs = {row['depth']: row['macs'] for run in runs.values() for row in run['depths']}
    figure = Figure(figsize=(6.5, 4.2), layout='constrained')
    axes = figure.add_subplot()
    styles = {'alone': ('tab:gray', 's', '--'), 'joint': ('tab:orange', '^', ':'), 'ekd': ('tab:blue', 'o', '-')}
    for method, (color, marker, line) in styles.items():
        if method in tops:
            depths = sorted(tops[method])
            values = [list(tops[method][depth].values()) for depth in depths]
            axes.errorbar(
                [macs[depth] for depth in depths], [mean(v) for v in values],
                yerr=[standard_error(v) or 0 for v in values], color=color, marker=marker, linestyle=line, capsize=3,
                label={'alone': 'trained alone', 'joint': 'shared, cross-entropy only', 'ekd': 'EKD'}[method],
            )
    for depth, value in macs.items():
        axes.axvline(value, color='black', alpha=0.08)
        place = dict(xycoords=('data', 'axes fraction'), ha='center', fontsize='small')
        axes.annotate(f'depth {depth}', (value, 0.02), **place)
    show_macs(axes, max(macs.values()))
    axes.margins(x=0.12, y=0.18)
    axes.set(xlabel='multiply-accumulates per image', ylabel='top-1 accuracy (%)', title=experiment)
    axes.grid(alpha=0.3)
    axes.legend(loc='lower right', bbox_to_anchor=(1, 0.08))
    save_figure(figure, RESULTS / f'{experiment}.png')


def recipe(runs):
    run = next(iter(runs.values()))
    arguments, hardware = run['arguments'], run['hardware']
    machine = ', '.join(hardware['gpus']) or f'{hardware["cpu_cores"]} cores of {hardware["cpu"]}'
    hours = sum(record['seconds'] for each in runs.values() for record in each['history']) / 3600
    versions = ', '.join(f'{name} {run["versions"][name]}' for name in ('torch', 'timm', 'accelerate', 'datasets'))
    return (
        f'{run["training_images"]:,} training and {run["validation_images"]:,} validation images of '
        f'{arguments["dataset"]}, {arguments["epochs"]} epochs, {arguments["opt"]} at learning rate {arguments["lr"]} '
        f'with a {arguments["sched"]} schedule, batches of {arguments["batch_size"]}, weight decay '
        f'{arguments["weight_decay"]}, {run["mixed_precision"]}. {machine}; {len(runs)} runs of {hours:.1f} h in all; '
        f'{versions}.'
    )


def write_results():
    experiments = sorted({path.parent.name for path in RESULTS.glob('*/*.json')} - {'ablations'})
    parts = [
        '# Results\n',
        'Written by `python benchmarks/results.py` from the JSON files beside it, one per run of '
        '`benchmarks/experiments.py`: change those, not this. Top-1 in percent on images that no option was chosen on; '
        'where there are several seeds, mean ± standard error, and differences are those of runs with the same seed.\n',
        markdown_table(['method', ''], [[f'`{name}`', text] for name, text in METHODS.items()]),
    ]
    for experiment in experiments:
        table, tops, runs = comparison(experiment)
        trained = {name: run for name, run in runs.items() if run['history']}
        parts += [f'## {experiment}\n', *([recipe(trained) + '\n'] if trained else ()), table]
        if {'alone', 'ekd'} <= tops.keys():
            draw(experiment, tops, runs)
            parts.append(f'![Accuracy of every depth over its multiply-accumulates]({experiment}.png)\n')
    if (RESULTS / 'ablations').is_dir():
        tops, runs = load_runs('ablations')
        parts += [
            '## Choice of options\n',
            'On images of the training split only, the validation images being others of it. Of one seed, differences '
            f'below about half a point mean nothing. Unless the options say otherwise: {recipe(runs)}\n',
            ablation_table(tops, runs),
        ]
    write_text(RESULTS / 'README.md', '\n'.join(parts))


def main():
    ArgumentParser(__doc__.splitlines()[0]).parse_args()
    write_results()


if __name__ == '__main__':
    main()
