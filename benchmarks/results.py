#!/usr/bin/env python3
"""Write results/README.md, MODEL_CARD.md and the table of results in README.md from the JSON files in results/.

    python benchmarks/results.py

The runs come from `experiments.py`. No number stands in the texts that is not in a JSON file.
"""
import json
import math
from collections import defaultdict
from statistics import mean

from card import write_card
from comparison import (
    PROMISE,
    RESULTS,
    ROOT,
    against_taught,
    common_options,
    comparison,
    count_seeds,
    difference,
    distillation_gains,
    explanation,
    join_depths,
    join_options,
    judge,
    judge_variants,
    list_gains,
    load_runs,
    method_table,
    name_machine,
    name_seeds,
    rank_runs,
    split_name,
    standard_error,
    with_error,
)
from matplotlib.figure import Figure
from matrix import ABLATION_RECIPE, ABLATIONS, AGAINST, KD_DEEP
from promise import SHORT, TESTED, list_options, name_data, name_model, promise_summary, promise_table, recipe_options

from timm_ddnn.evaluation.plots import save_figure, show_macs
from timm_ddnn.hub.model_card import markdown_table
from timm_ddnn.utils.files import write_section, write_text
from timm_ddnn_cli.arguments import ArgumentParser

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
            options = dict(item for item in common_options(runs, name).items() if item not in ABLATION_RECIPE.items())
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
            if name in TESTED and (judged := judge(tops, name, others)):
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
    """Accuracy over multiply-accumulates of the main methods, mean and standard error over seeds."""
    figure = Figure(figsize=(6.5, 4.2), layout='constrained')
    axes = figure.add_subplot()
    styles = {
        'alone': ('tab:gray', 's', '--', 'trained alone'),
        'kd': ('tab:gray', 'x', ':', 'alone, taught by the full-net alone'),
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
                label=f'{label} ({count_seeds(len(values[-1]))})',
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
    size = f', {arguments["img_size"]} px' if arguments['img_size'] else ''
    return (
        f'{run["training_images"]:,} training and {run["validation_images"]:,} validation images of '
        f'{SHORT[arguments["dataset"]]}, {arguments["epochs"]} epochs, {arguments["opt"]} at learning rate '
        f'{arguments["lr"]} with a {arguments["sched"]} schedule, batches of {arguments["batch_size"]}, weight decay '
        f'{arguments["weight_decay"]}, {run["mixed_precision"]}{size}. On {"; ".join(machines)}: '
        f'{len(runs)} run{"s"[:len(runs) != 1]}, {hours:.1f} h of training in all, '
        f'{sum(bool(each["git"]) and not each["git"]["dirty"] for each in runs.values())} of them by the code of a '
        f'commit; {"; ".join(versions)}.'
    )


def sampling_error(runs):
    """Standard error in points of an accuracy that comes from the choice of the validation images."""
    errors = [
        math.sqrt(row['top1'] * (100 - row['top1']) / run['validation_images'])
        for run in runs.values() for row in run['depths']
    ]
    return f'{mean(errors):.1f}'


def load_experiments():
    names = {path.parent.name for path in RESULTS.glob('*/*.json')} - {'tuning'}  # whose page is written by hand
    return {name: load_runs(name) for name in sorted(names)}


def write_results(experiments):
    kept = [run for _, runs in experiments.values() for run in runs.values()]
    compared = {name for experiment, (tops, _) in experiments.items() if experiment != 'ablations' for name in tops}
    parts = [
        '# Results\n',
        'Written by `python benchmarks/results.py` from the JSON files beside it, one per run of '
        '`benchmarks/experiments.py`: change those, not this. Top-1 in percent. Of several seeds the mean stands, from '
        'three on with its standard error over seeds. Means of other seeds do not compare; differences do, which are '
        'those of runs with the same seed. Each file names the commit that its run began with, and whether the code '
        f'was that of the commit: in {sum(bool(run["git"]) and not run["git"]["dirty"] for run in kept)} of '
        f'{len(kept)} it was.\n',
        method_table(compared),
        'Options of `ekd` were chosen on other images, see below. Other teachers, private scale and shift, and '
        '`--full-net-updates` were tried there and on the images of these tables, a deeper teacher on the latter '
        'alone. Temperature and weight of `kd` and weight of `kl_only` are usual in the literature and were not tuned.'
        '\n',
        '## Where the promise holds\n',
        PROMISE,
        promise_table(experiments),
    ]
    choice, chosen_by = experiments.get('ablations', ({}, {}))
    experiments = {name: experiment for name, experiment in experiments.items() if name != 'ablations'}
    for experiment, (tops, runs) in experiments.items():
        trained = {name: run for name, run in runs.items() if run['history']}
        parts += [
            f'## {name_model(runs)} on {name_data(runs)}\n',
            *([recipe(trained) + '\n'] if trained else ()),
            comparison(tops),
            f'That the validation images are a sample adds a standard error of {sampling_error(runs)} points to each '
            'top-1, which is not in the errors over seeds.\n',
            *(() if 'ekd' in tops else ('There is no result of EKD here yet, so nothing is said of its promise.\n',)),
        ]
        if {'alone', 'ekd'} <= tops.keys():
            draw(experiment, tops, runs)
            parts += [
                f'The promise of `ekd` {judged}.\n' if (judged := judge(tops)) else '',
                *(f'The promise of `{name}` {judged}.\n' for name, judged in judge_variants(tops)),
                explanation(tops, runs),
                f'Against nets that were taught one by one: {taught}.\n' if (taught := against_taught(tops)) else '',
                f'![Accuracy of every depth over its multiply-accumulates]({experiment}.png)\n',
            ]
    if choice:
        parts += [
            '## Choice of options\n',
            'On images of the training split only, the validation images being others of it. Every sub-net has weight '
            '1 here unless the options say otherwise: `ekd` is what `ekd_equal` is above, and `ekd_uneven_weights` '
            'what `ekd` is. `--sample`, `--ramp-updates`, `--average-teacher` and `--subnet-ce` are options of '
            '`benchmarks/train_method.py`, not of the library. A single seed says little: runs that differ by their '
            f'seed only lie up to {spread(choice):.1f} points apart. So what was chosen is what no run speaks clearly '
            'against, not the best of these tables. '
            f'Unless the options say otherwise, {ABLATION_RECIPE["--model"]}: {recipe(chosen_by)}\n',
            *ablation_tables(choice, chosen_by),
        ]
    write_text(RESULTS / 'README.md', '\n'.join(part for part in parts if part))


def summary_table(experiments, experiment):
    """What README says of an experiment: its main methods, where the promise holds, and what competes with it."""
    tops, runs = experiments[experiment]
    texts = {
        'alone': 'each depth alone, as a stock net',
        'kd': 'each sub-net alone, taught by the full-net trained alone',
        'kd_deep': 'each depth alone, taught by a deeper net',
        'joint': 'shared weights, cross-entropy only',
        'ekd': '**EKD**',
        'kd_shared_deep': '**shared weights, taught by a deeper net**',
    }
    texts = {method: text for method, text in texts.items() if method in tops}
    costs = {row['depth']: row for name, run in runs.items() if split_name(name)[0] in texts for row in run['depths']}
    depths = sorted(costs, reverse=True)
    rows = []
    for method, text in texts.items():
        cells = []
        for depth in depths:
            values = list(tops[method].get(depth, {}).values())
            gains = difference(tops, method, ['alone'], depth) if method != 'alone' else []
            gain = f' ({with_error(gains, sign=True)})' if gains else ''
            cells.append(f'{with_error(values)}{gain}' if values else '')
        rows.append([text, *cells, name_seeds(tops[method]), list_options(runs, method)])
    head = ['method', *(f'depth {depth}, {costs[depth]["macs"] / 1e6:.1f} M MACs' for depth in depths)]
    parameters = [costs[depth]['parameters'] / 1e6 for depth in depths]
    parts = [
        markdown_table([*head, 'seeds', 'options'], rows),
        'In brackets the difference to training alone with the same seeds; compare rows of other seeds by it, not by '
        'their means. ALONE is the run of the full-net trained alone, BLOCKS are those of the depth, 1,1,1 for 8. '
        f'Common options: {recipe_options(runs)}.\n',
        describe_teacher(experiments, depths) if {'kd_deep', 'kd_shared_deep'} & texts.keys() else '',
        PROMISE,
        promise_summary(experiments),
    ]
    taught = {name: against_taught(by_method) for name, (by_method, _) in experiments.items()}
    if any(taught.values()):
        names = {name: f'`{name_model(others)}`, {name_data(others)}' for name, (_, others) in experiments.items()}
        parts += [
            'Against nets that were taught one by one:\n',
            *(f'- {names[name]}: {text}' for name, text in taught.items() if text),
            '\nWhat EKD has over those is one training in the place of three. All shared weights are one file, here of '
            f'{max(parameters):.2f} million parameters in the place of {sum(parameters):.2f}.\n',
        ]
    return '\n'.join(part for part in parts if part)


def describe_teacher(experiments, depths):
    """Say how the deeper net came about, and what nets alone reach at some of the depths with as many epochs."""
    tag = KD_DEEP['--teacher']
    experiment, _, name = json.loads((RESULTS / 'weights' / tag / 'evaluation.json').read_text())['run'].partition('/')
    tops, runs = experiments[experiment]
    ranked = rank_runs(runs, split_name(name)[0])
    text = (
        f'The deeper net is `{tag}`, trained on the same images for {runs[name]["arguments"]["epochs"]} epochs, number '
        f'{1 + ranked.index(name)} of {len(ranked)} seeds by mean top-1 of these validation images.'
    )
    if alone := [depth for depth in depths if depth in tops['alone']]:
        reached = ', '.join(f'{with_error(list(tops["alone"][depth].values()))} ({depth})' for depth in alone)
        text += f' A net that is trained alone for as many epochs as the teacher reaches {reached}.'
    return f'{text}\n'


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
