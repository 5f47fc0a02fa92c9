#!/usr/bin/env python3
"""Write results/README.md, MODEL_CARD.md and the table of results in README.md from the JSON files in results/.

    python benchmarks/results.py

The runs come from `experiments.py`. No number stands in the texts that is not in a JSON file.
"""
import math
from collections import defaultdict
from statistics import mean

from card import write_card
from comparison import (
    RESULTS,
    ROOT,
    against_teacher,
    comparison,
    difference,
    distillation_gains,
    explanation,
    gains_by_depth,
    join_depths,
    join_options,
    judge,
    judge_variants,
    list_gains,
    load_runs,
    method_table,
    name_machine,
    name_seeds,
    outcome,
    split_name,
    standard_error,
    verdict,
    with_error,
)
from matplotlib.figure import Figure
from matrix import ABLATION_RECIPE, ABLATIONS, AGAINST

from timm_ddnn.cli import ArgumentParser
from timm_ddnn.model_card import markdown_table
from timm_ddnn.report import save_figure, show_macs, write_section, write_text

SHORT = {
    'cifar10': 'CIFAR-10 (JPEG)',
    'cifar10_part': 'the training split of CIFAR-10 (JPEG)',
    'tiny_imagenet': 'Tiny ImageNet',
}
# Ways of training that are held against the promise, and those of the ablations
WAYS = (
    'ekd', 'ekd_private', 'ekd_full_first', 'ekd_ema_teacher', 'kd_shared', 'kd_shared_weighted', 'kd_shared_deep',
    'kd_shared_deep_private')
FEW = 'few_ekd', 'few_ekd_full_first', 'few_ekd_ema_teacher', 'few_kd_shared', 'few_44_ekd', 'few_44_ekd_full_first'
# What a variant is compared with, the first that has the depth: what it changes, unless the matrix says otherwise
COMPARED = {
    f'{base}_{name}': [join_depths(base)] for _, base, changes in ABLATIONS if base for name in changes} | AGAINST


def ablation_tables(tops, runs):
    """A table for every question that options were chosen by, with the differences to what was changed."""
    questions = defaultdict(list)
    for question, base, changes in ABLATIONS:
        names = [join_depths(f'{base}_{name}' if base else name) for name in changes]
        if any(name in tops for name in names):
            questions[question] += [name for name in ([join_depths(base)] if base else []) + names if name in tops]
    parts = []
    for question, names in questions.items():
        depths = sorted({depth for name in names for depth in tops[name]}, reverse=True)
        rows, verdicts = [], []
        for name in dict.fromkeys(names):
            options = [run['options'].items() for stem, run in runs.items() if split_name(stem)[0] == name]
            options = dict(item for item in options[0] if all(item in other for other in options))
            options = {k: v for k, v in options.items() if (k, v) not in ABLATION_RECIPE.items() and k != '--seed'}
            others = COMPARED.get(name, [])
            gains = [difference(tops, name, others, depth) for depth in depths]
            rows.append([
                f'`{name}`',
                *(with_error(list(tops[name][depth].values())) if depth in tops[name] else '' for depth in depths),
                ', '.join(f'`{other}`' for other in others),
                *(with_error(gain, sign=True) if gain else '' for gain in gains),
                name_seeds(tops[name]),
                f'`{join_options(options)}`' if options else '',
            ])
            if 'kd' in name and 'alone' in others[0] and (judged := judge(tops, name, others)):
                verdicts.append(f'Against nets that are trained alone, the promise of `{name}` {judged}.\n')
                if added := distillation_gains(tops, runs, name):
                    verdicts.append(f'Distillation adds {list_gains(added)} to the same training without it.\n')
        head = ['variant', *map(str, depths), 'against', *(f'at {d}' for d in depths)]
        parts += [f'### {question}\n', markdown_table([*head, 'seeds', 'options'], rows), *verdicts]
    return parts


def spread(tops):
    """Largest difference in points of runs of one variant that differ by their seed only."""
    by_seed = [list(values.values()) for variant in tops.values() for values in variant.values()]
    return max(max(values) - min(values) for values in by_seed)


def draw(experiment, tops, runs):
    """Accuracy over multiply-accumulates, EKD against alone, mean and standard error over seeds."""
    figure = Figure(figsize=(6.5, 4.2), layout='constrained')
    axes = figure.add_subplot()
    styles = {
        'alone': ('tab:gray', 's', '--', 'trained alone'),
        'joint': ('tab:orange', '^', ':', 'shared, cross-entropy only'),
        'ekd': ('tab:blue', 'o', '-', 'EKD'),
        'kd_shared_deep': ('tab:green', 'D', '-', 'shared, a deeper net as teacher'),
    }
    shown = [run for name, run in runs.items() if split_name(name)[0] in styles]
    macs = {row['depth']: row['macs'] for run in shown for row in run['depths']}
    for method, (color, marker, line, label) in styles.items():
        if method in tops:
            depths = sorted(tops[method])
            values = [list(tops[method][depth].values()) for depth in depths]
            errors = [standard_error(v) for v in values]
            axes.errorbar(
                [macs[depth] for depth in depths], [mean(v) for v in values],
                yerr=None if None in errors else errors, color=color, marker=marker, linestyle=line, capsize=3,
                label=label,
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
    arguments = run['arguments']
    hours = sum(record['seconds'] for each in runs.values() for record in each['history']) / 3600
    machines = sorted({name_machine(each) for each in runs.values()})
    versions = sorted({
        ', '.join(f'{name} {each["versions"][name]}' for name in ('torch', 'timm', 'accelerate', 'datasets'))
        for each in runs.values()
    })
    return (
        f'{run["training_images"]:,} training and {run["validation_images"]:,} validation images of '
        f'{SHORT[arguments["dataset"]]}, {arguments["epochs"]} epochs, {arguments["opt"]} at learning rate '
        f'{arguments["lr"]} with a {arguments["sched"]} schedule, batches of {arguments["batch_size"]}, weight decay '
        f'{arguments["weight_decay"]}, {run["mixed_precision"]}. {"; ".join(machines)}: '
        f'{len(runs)} run{"s"[:len(runs) != 1]}, {hours:.1f} h of training in all; {"; ".join(versions)}.'
    )


def sampling_error(runs):
    """Standard error in points of an accuracy that comes from the choice of the validation images."""
    errors = [
        math.sqrt(row['top1'] * (100 - row['top1']) / run['validation_images'])
        for run in runs.values() for row in run['depths']
    ]
    return f'{mean(errors):.1f}'


def load_experiments():
    return {name: load_runs(name) for name in sorted({path.parent.name for path in RESULTS.glob('*/*.json')})}


def write_results(experiments):
    kept = [run for _, runs in experiments.values() for run in runs.values()]
    compared = {name for experiment, (tops, _) in experiments.items() if experiment != 'ablations' for name in tops}
    parts = [
        '# Results\n',
        'Written by `python benchmarks/results.py` from the JSON files beside it, one per run of '
        '`benchmarks/experiments.py`: change those, not this. Top-1 in percent. Of several seeds the mean stands, from '
        'three on with its standard error over seeds, and differences are those of runs with the same seed. Each file '
        'names the commit that its run began with, and whether the code was that of the commit: '
        f'in {sum(bool(run["git"]) and not run["git"]["dirty"] for run in kept)} of {len(kept)} it was.\n',
        method_table(compared),
        'Options were chosen on other images, see below. Temperature and weight of `kd` and weight of `kl_only` are '
        'usual in the literature and were not tuned.\n',
        '## Where the promise holds\n',
        promise_table(experiments),
    ]
    choice, chosen_by = experiments.get('ablations', ({}, {}))
    experiments = {name: experiment for name, experiment in experiments.items() if name != 'ablations'}
    for experiment, (tops, runs) in experiments.items():
        trained = {name: run for name, run in runs.items() if run['history']}
        run = next(iter(runs.values()))
        parts += [
            f'## {run["arguments"]["model"]} on {SHORT[run["arguments"]["dataset"]]}\n',
            *([recipe(trained) + '\n'] if trained else ()),
            comparison(tops),
            f'That the validation images are a sample adds a standard error of {sampling_error(runs)} points to each '
            'top-1, which is not in the errors over seeds.\n',
            *(() if 'ekd' in tops else ('There is no result of EKD here yet, so nothing is said of its promise.\n',)),
        ]
        if {'alone', 'ekd'} <= tops.keys():
            draw(experiment, tops, runs)
            parts += [
                verdict(tops),
                *(f'The same of `{name}`: it {judged}.\n' for name, judged in judge_variants(tops)),
                explanation(tops, runs),
                (taught := against_teacher(tops)) and f'{taught}\n',
                f'![Accuracy of every depth over its multiply-accumulates]({experiment}.png)\n',
            ]
    if choice:
        parts += [
            '## Choice of options\n',
            'On images of the training split only, the validation images being others of it. `ekd` has all sub-nets '
            'with weight 1 here, as `ekd_equal` above. A single seed says little: runs that differ by their seed only '
            f'lie up to {spread(choice):.1f} points apart. So what was chosen is what no run speaks clearly against, '
            'not the best of these tables. '
            f'Unless the options say otherwise, {ABLATION_RECIPE["--model"]}: {recipe(chosen_by)}\n',
            *ablation_tables(choice, chosen_by),
        ]
    write_text(RESULTS / 'README.md', '\n'.join(part for part in parts if part))


def summary_table(experiments, experiment):
    """Table by depth of EKD against training alone, whether the promise holds, and what users would do otherwise."""
    tops, runs = experiments[experiment]
    columns = {
        'alone': 'trained alone', 'kd': 'alone, the full-net alone as teacher', 'joint': 'shared, cross-entropy only',
        'ekd': 'EKD', 'kd_shared_deep': 'shared, a deeper net as teacher',
    }
    columns = {method: text for method, text in columns.items() if method in tops}
    judged = [method for method in ('ekd', 'kd_shared_deep') if method in tops]
    shown = [run for name, run in runs.items() if split_name(name)[0] in columns]
    rows = {row['depth']: row for run in shown for row in run['depths']}
    cells = []
    for depth in sorted(rows, reverse=True):
        values = [list(tops[method].get(depth, {}).values()) for method in columns]
        gains = [difference(tops, method, ['alone'], depth) for method in judged]
        cells.append([
            str(depth), f'{rows[depth]["macs"] / 1e6:.1f} M', *(with_error(each) if each else '' for each in values),
            *(with_error(gain, sign=True) if gain else '' for gain in gains),
        ])
    seeds = {method: max(map(len, tops[method].values())) for method in columns}
    head = [f'{text} ({seeds[name]} seed{"s"[:seeds[name] > 1]})' for name, text in columns.items()]
    versus = [f'{columns[method]}, against alone' for method in judged]
    table = markdown_table(['depth', 'MACs', *head, *versus], cells)
    parameters = [rows[depth]['parameters'] / 1e6 for depth in rows]
    parts = [table, verdict(tops), promise_table(experiments, seeds=3)]
    if taught := against_teacher(tops):
        parts.append(
            f'{taught} What EKD has over both is one training and one file: '
            f'{max(parameters):.2f} million parameters in the place of {sum(parameters):.2f}.\n'
        )
    return '\n'.join(part for part in parts if part)


def promise_table(experiments, seeds=1):
    """Table of what all depths at once gain on training alone, and whether the promise holds, by setting.

    Args:
        experiments: What `load_experiments` gives.
        seeds: How many a setting must have at some depth to be in the table.
    """
    rows = []
    for experiment in sorted(experiments, key='ablations'.__eq__):
        tops, runs = experiments[experiment]
        if experiment == 'ablations':
            methods = {name: AGAINST[name] for name in FEW}
        else:
            methods = dict.fromkeys(WAYS, ('alone',))
        for method, others in methods.items():
            gains = gains_by_depth(tops, method, others)
            trained = max(map(len, gains.values()), default=0)
            if trained < seeds:
                continue
            run = next(run for stem, run in runs.items() if split_name(stem)[0] == method)
            arguments, first = run['arguments'], run['options'].get('--full-net-updates')
            private = 'shared_affine=False' in run['options'].get('--model-kwargs', '')
            rows.append([
                f'`{arguments["model"]}`{", private scale and shift" if private else ""}',
                f'{run["training_images"]:,} of {SHORT[arguments["dataset"]].removeprefix("the training split of ")}',
                str(arguments['epochs']),
                ', '.join(f'{weight:g}' for _, weight in arguments['weights']) or '1',
                f'{first} of {run["history"][-1]["updates"]}' if first else '0',
                f'`{run["options"]["--teacher"]}`' if '--teacher' in run['options'] else
                'full-net trained alone before' if run['teacher'] else
                'averaged weights' if '--ema-teacher' in run['options'] else 'full-net',
                list_gains(gains),
                list_gains(distillation_gains(tops, runs, method)),
                f'{outcome(gains, tops[method])} ({trained} seed{"s"[:trained > 1]})',
            ])
    head = [
        'model', 'training images', 'epochs', 'weights of sub-nets', '`--full-net-updates`', 'teacher',
        'against alone', 'what distillation adds', 'promise',
    ]
    return markdown_table(head, rows) + (
        '\nWhat distillation adds is the difference to the same training without it, where that was done. The 5,000 '
        'images are of the training split, and judged on 30,000 others of it. Settings differ because one was looked '
        'for in which the promise holds. Where there are six seeds, the first three had left depth 8 '
        'undecided, and the others were added to decide it.\n')


def write_readme(experiments):
    experiment = 'cifar10_resnet20'
    write_section(ROOT / 'README.md', experiment, summary_table(experiments, experiment))


def main():
    ArgumentParser(__doc__.splitlines()[0]).parse_args()
    experiments = load_experiments()
    write_results(experiments)
    write_card(experiments)
    write_readme(experiments)


if __name__ == '__main__':
    main()
