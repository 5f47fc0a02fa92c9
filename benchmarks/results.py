#!/usr/bin/env python3
"""Write results/README.md, MODEL_CARD.md and the table of results in README.md from the JSON files in results/.

    python benchmarks/results.py

The runs come from `experiments.py`. No number stands in the texts that is not in a JSON file.
"""
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from matrix import ABLATIONS, RECIPE

from timm_ddnn.cli import ArgumentParser
from timm_ddnn.ddnn_resnet import WEIGHTS
from timm_ddnn.model_card import CITATION, PAPER, cost_cells, markdown_table
from timm_ddnn.report import save_figure, show_macs, write_section, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
DATA = {
    'cifar10': 'CIFAR-10, recoded as JPEG of quality 75 (slightly lossy, so that accuracies are near those of the '
    'original files, not the same); the validation images are half of its test set',
    'tiny_imagenet': 'Tiny ImageNet (200 classes, 64 px)',
}
SHORT = {
    'cifar10': 'CIFAR-10 (JPEG)',
    'cifar10_part': 'the training split of CIFAR-10 (JPEG)',
    'tiny_imagenet': 'Tiny ImageNet',
}
TOLERANCE = 0.2  # points that the full-net may lose
HIDDEN = '--seed', '--model', '--epochs'
METHODS = {
    'alone': 'each depth trained alone, as a stock net',
    'kd': 'each depth trained alone, the full-net that was trained alone teaching it',
    'joint': 'all depths in shared weights, cross-entropy only',
    'joint_weighted': 'joint, the sub-nets weighed as in `ekd`',
    'kl': 'KL divergence from the full-net besides, the sub-nets weighed as in `ekd`',
    'attention': 'attention of the full-net besides, the sub-nets weighed as in `ekd`',
    'ekd': 'both besides: embedded knowledge distillation, the shallowest sub-net with weight 0.75, others with 0.25',
    'ekd_equal': 'as `ekd`, but all sub-nets with weight 1',
    'ekd_private': 'as `ekd`, but with scale and shift of its own for every path',
    'ekd_light': 'as `ekd`, but with weights 0.15 and 0.05',
    'kl_only': 'shared weights, sub-nets learn by KL divergence only, temperature 1',
    'truncation': 'the full-net trained alone, cut to a depth, statistics estimated again',
}


def split_name(stem):
    """'alone-20-1' -> 'alone', 1; a run that is alone at its depth has the depth in its name."""
    name, _, seed = stem.rpartition('-')
    return re.sub(r'^(alone|kd)-\d+$', r'\1', name), int(seed)


def load_runs(experiment):
    """-> {method or variant: {depth: {seed: top-1}}}, and the runs themselves by name."""
    tops, runs = defaultdict(lambda: defaultdict(dict)), {}
    for path in sorted((RESULTS / experiment).glob('*.json')):
        run = runs[path.stem] = json.loads(path.read_text())
        name, seed = split_name(path.stem)
        for row in run['depths']:
            tops[name][row['depth']][seed] = row['top1']
    return {name: dict(by_depth) for name, by_depth in tops.items()}, runs


def standard_error(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def with_error(values, sign=False):
    text = f'{mean(values):+.2f}' if sign else f'{mean(values):.2f}'
    error = standard_error(values)
    return text if error is None else f'{text} ± {error:.2f}'


def difference(tops, method, other, depth):
    """Differences of two methods at a depth, by seed, for the seeds that both have."""
    mine, theirs = (tops.get(name, {}).get(depth, {}) for name in (method, other))
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def count_seeds(by_depth):
    least, most = (bound(map(len, by_depth.values())) for bound in (min, max))
    return str(most) if least == most else f'{least} to {most}'


def comparison(experiment):
    """Table of the methods, top-1 per depth, and the differences to training alone."""
    tops, runs = load_runs(experiment)
    depths = sorted({depth for method in tops.values() for depth in method}, reverse=True)
    rows = []
    for method in METHODS:
        if method not in tops:
            continue
        cells, gains = [], {'alone': [], 'joint': []}
        for depth in depths:
            values = list(tops[method].get(depth, {}).values())
            cells.append(with_error(values) if values else '')
            for other in gains:
                gain = difference(tops, method, other, depth) if method != other else []
                gains[other].append(with_error(gain, sign=True) if gain else '')
        rows.append([method, *cells, *gains['alone'], *gains['joint'], count_seeds(tops[method])])
    versus = [f'{depth} against {other}' for other in ('alone', 'joint') for depth in depths]
    head = ['method', *map(str, depths), *versus, 'seeds']
    return markdown_table(head, rows), tops, runs


def gains_by_depth(tops):
    gains = {depth: difference(tops, 'ekd', 'alone', depth) for depth in sorted(tops['ekd'], reverse=True)}
    return {depth: values for depth, values in gains.items() if values}


def list_gains(tops):
    return ', '.join(f'{with_error(values, sign=True)} ({depth})' for depth, values in gains_by_depth(tops).items())


def verdict(tops):
    """Say whether the promise holds, depth by depth: sub-nets better than alone, the full-net as good as alone."""
    gains = gains_by_depth(tops)
    fails = [
        depth for depth, values in gains.items() if mean(values) < (-TOLERANCE if depth == max(tops['ekd']) else 0)]
    seeds = count_seeds(gains)
    return (
        f'The promise of EKD is that every sub-net is better than the same net trained alone and that the full-net '
        f'loses nothing, for which {TOLERANCE} points are allowed here. By these means, of {seeds} '
        f'seed{"s"[:seeds != "1"]}, that '
        + (f'does not hold at depth {" and ".join(map(str, fails))}' if fails else 'holds at every depth')
        + f': {list_gains(tops)}.\n'
    )


def final_loss(runs, method, depth):
    """Cross-entropy of a depth on its training images as they were augmented, mean over the last epoch and the runs."""
    name = f'train_ce_{depth}'
    return mean(
        run['history'][-1][name] for stem, run in runs.items()
        if split_name(stem)[0] == method and name in run['history'][-1]
    )


def explanation(tops, runs):
    """Say what the full-net's accuracy goes with, where there are lighter sub-nets and runs on few images."""
    few_tops, few_runs = load_runs('ablations')
    full, *subnets = sorted(tops['ekd'], reverse=True)
    if 'ekd_light' not in tops or not {f'few_alone_{full}', 'few_ekd'} <= few_tops.keys():
        return ''
    losses = [final_loss(runs, method, full) for method in ('ekd', 'alone', 'ekd_light')]
    light = [with_error(list(tops['ekd_light'][depth].values())) for depth in (full, *subnets)]
    few_losses = [final_loss(few_runs, method, full) for method in ('few_ekd', f'few_alone_{full}')]
    few = {
        'ekd': few_tops['few_ekd'],
        'alone': {depth: few_tops.get(f'few_alone_{depth}', {}).get(depth, {}) for depth in few_tops['few_ekd']},
    }
    return (
        f'The full-net differs on its training images already: in the last epoch its cross-entropy on them is '
        f'{losses[0]:.3f} by EKD and {losses[1]:.3f} alone. With sub-nets so light that they hardly train the weights '
        f'(`ekd_light`, seeds: {count_seeds(tops["ekd_light"])}) it is {losses[2]:.3f}, the full-net has {light[0]} '
        f'and the sub-nets {", ".join(light[1:])}. A lack of capacity after this schedule would look so; it is not '
        f'proved. With 5,000 images and 60 epochs the cross-entropy is {few_losses[0]:.3f} by EKD (sub-nets of weight '
        f'1) and {few_losses[1]:.3f} alone, and EKD against training alone has {list_gains(few)} (seeds: '
        f'{count_seeds(gains_by_depth(few))}, see the choice of options).\n'
    )


def method_table():
    return markdown_table(['method', ''], [[f'`{name}`', text] for name, text in METHODS.items()])


def join(options):
    return ' '.join(flag if value is None else f'{flag} {value}'.strip() for flag, value in options.items())


def ablation_tables(tops, runs):
    """A table for every question that options were chosen by, with the differences to what was changed."""
    depths = sorted(tops['joint'], reverse=True)
    questions = defaultdict(list)
    for question, base, changes in ABLATIONS:
        names = [f'{base}_{name}' if base else name for name in changes]
        done = [(name, base) for name in names if name in tops]
        questions[question] += [(base, None), *done] if base in tops and done else done
    parts = []
    for question, variants in questions.items():
        if not variants:
            continue
        rows = []
        for name, base in variants:
            by_depth = dict(sorted(tops[name].items(), reverse=True))
            options = next(run['options'] for stem, run in runs.items() if split_name(stem)[0] == name)
            options = {k: v for k, v in options.items() if RECIPE.get(k) != v and k not in HIDDEN}
            others = {d: values for d, values in by_depth.items() if d not in depths}
            gains = [difference(tops, name, base, depth) for depth in depths]
            rows.append([
                f'`{name}`',
                *(with_error(list(by_depth[depth].values())) if depth in by_depth else '' for depth in depths),
                ', '.join(f'{with_error(list(values.values()))} ({d})' for d, values in others.items()),
                f'`{base}`' if base else '',
                *(with_error(gain, sign=True) if gain else '' for gain in gains),
                count_seeds(by_depth),
                f'`{join(options)}`',
            ])
        head = ['variant', *map(str, depths), 'other depths', 'against', *(f'at {d}' for d in depths)]
        parts += [f'### {question}\n', markdown_table([*head, 'seeds', 'options'], rows)]
    return parts


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


def name_machine(run):
    hardware = run['hardware']
    return ', '.join(hardware['gpus']) or f'a machine with {hardware["cpu_cores"]} cores of {hardware["cpu"]}'


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


def write_results():
    experiments = sorted({path.parent.name for path in RESULTS.glob('*/*.json')} - {'ablations'})
    parts = [
        '# Results\n',
        'Written by `python benchmarks/results.py` from the JSON files beside it, one per run of '
        '`benchmarks/experiments.py`: change those, not this. Top-1 in percent on images that no option was chosen on; '
        'where there are several seeds, mean ± standard error over seeds, and differences are those of runs with the '
        'same seed.\n',
        method_table(),
        'The weights of the sub-nets were chosen below. The other options of EKD are what a few runs of one seed, not '
        'all of them kept, spoke least against. Temperature 4 and weight 1 of `kd`, and weight 1 of `kl_only`, are '
        'usual in the literature.\n',
    ]
    for experiment in experiments:
        table, tops, runs = comparison(experiment)
        trained = {name: run for name, run in runs.items() if run['history']}
        run = next(iter(runs.values()))
        parts += [
            f'## {run["arguments"]["model"]} on {SHORT[run["arguments"]["dataset"]]}\n',
            *([recipe(trained) + '\n'] if trained else ()),
            table,
            f'That the validation images are a sample adds a standard error of {sampling_error(runs)} points to each '
            'top-1, and less to differences, whose images are the same.\n',
        ]
        if {'alone', 'ekd'} <= tops.keys():
            draw(experiment, tops, runs)
            parts += [
                verdict(tops), explanation(tops, runs),
                f'![Accuracy of every depth over its multiply-accumulates]({experiment}.png)\n',
            ]
    if (RESULTS / 'ablations').is_dir():
        tops, runs = load_runs('ablations')
        parts += [
            '## Choice of options\n',
            'On images of the training split only, the validation images being others of it. `ekd` has all sub-nets '
            'with weight 1 here, as `ekd_equal` above. With one seed, differences of a point may be chance: a standard '
            f'error of {sampling_error(runs)} points comes from the validation images alone. '
            f'Unless the options say otherwise: {recipe(runs)}\n',
            *ablation_tables(tops, runs),
        ]
    write_text(RESULTS / 'README.md', '\n'.join(parts))


CARD = """## {tag}

```python
import timm
import timm_ddnn

model = timm.create_model('{tag}', pretrained=True)
logits = model(images, depth={shallow})  # model(images) is the same with depth={full}
```

One set of {parameters:.3f} million weights, {size:,} bytes, that holds depths {depths}, for images of {side} px and the
classes {classes}. It was trained by embedded knowledge distillation ([arXiv 2103.00793]({paper})).

{results}
Top-1, top-5 and expected calibration error of {images:,} validation images in float32, in percent. Parameters and
multiply-accumulates (MACs) are those of the plain net of a depth. Latency: median of batches of {batch} on {threads}
of {latency_cpu}, {runtime}, torch {torch}, all depths in turn.

![Accuracy of every depth over its multiply-accumulates](results/{experiment}.png)

### Against other methods

{comparison}
{methods}
Top-1 in percent; where there are several seeds, mean ± standard error, and differences are those of runs with the same
seed. What is known of the choice of these options, and on which images it was made, is in [results](results/README.md).

### Training

- **Data:** {data}; {training_images:,} images to train and {images:,} to validate. No other data, no pretrained
  weights.
- **Recipe:** `train_scripts/train_ekd.py {options}`
- **Choice:** of {seeds} EKD run(s), the one with the highest mean top-1 on the images of the table above. What a run of
  your own may be expected to reach are the means in the table of methods.
- **Hardware and cost:** {hours:.1f} hours of training for {epochs} epochs on {training_machine}. The weights
  show what depth costs after a short schedule, and are not the best nets of their size.

### Limits and biases

- The net names one of its classes whatever the picture shows, and knows pictures of {side} px of the kind it was
  trained on.
- {extremes}
- The confidence is what training left, without calibration afterwards: see the table.
- {bias}
"""
BIAS = {
    'cifar10': 'CIFAR-10 was collected from the Internet by search terms as a part of 80 Million Tiny Images, which '
    'its authors withdrew in 2020 for offensive labels among its other classes. Whom and what its pictures show was '
    'not balanced, and nothing here measures what follows from that.',
    'tiny_imagenet': 'Tiny ImageNet is a part of ImageNet, whose photographs are from the Internet, most of them taken '
    'in North America and Europe. Nothing here measures what follows from that.',
}


def card_section(tag):
    """The part of MODEL_CARD.md on the weights in a folder: what they reach, cost, and come from."""
    measurements = RESULTS / 'weights' / tag.name
    config, evaluation, profile = (
        json.loads(path.read_text())
        for path in (tag / 'config.json', measurements / 'evaluation.json', measurements / 'profile.json')
    )
    experiment = evaluation['run'].partition('/')[0]
    run = json.loads((RESULTS / f'{evaluation["run"]}.json').read_text())
    measured = {row['depth']: row for row in profile['measurements']}
    full, *_, shallow = depths = [row['depth'] for row in evaluation['depths']]
    extremes = []
    for depth in (full, shallow):
        low, *_, high = sorted(evaluation['per_class'], key=lambda row, key=f'top1_{depth}': row[key])
        low, high = (f'{row[f"top1_{depth}"]:.1f} % ({row["class"]})' for row in (low, high))
        extremes.append(f'from {low} to {high} at depth {depth}')
    setting = measured[full]
    return CARD.format(
        tag=tag.name,
        full=full,
        shallow=shallow,
        parameters=evaluation['parameters'] / 1e6,
        size=(tag / 'model.safetensors').stat().st_size,
        depths=', '.join(map(str, depths)),
        side=evaluation['input_size'][-1],
        classes=', '.join(config['label_names']),
        paper=PAPER,
        results=markdown_table(
            ['depth', 'blocks', 'parameters (M)', 'MACs (M)', 'top-1', 'top-5', 'calibration error', 'latency (ms)'],
            [
                [
                    *cost_cells(row), *(f'{row[name]:.2f}' for name in ('top1', 'top5', 'ece')),
                    f'{measured[row["depth"]]["median_ms"]:.2f}',
                ]
                for row in evaluation['depths']
            ],
        ),
        images=evaluation['images'],
        batch=setting['batch_size'],
        threads='one thread' if setting['threads'] == 1 else f'{setting["threads"]} threads',
        latency_cpu=profile['hardware']['cpu'],
        runtime=setting['runtime'],
        torch=profile['versions']['torch'],
        experiment=experiment,
        comparison=comparison(experiment)[0],
        methods=method_table(),
        data=DATA[evaluation['data']],
        training_images=run['training_images'],
        options=join(run['options']),
        hours=sum(record['seconds'] for record in run['history']) / 3600,
        training_machine=name_machine(run),
        seeds=len(list((RESULTS / experiment).glob('ekd-*.json'))),
        epochs=run['arguments']['epochs'],
        extremes=f'Accuracy is not the same for all classes: {", and ".join(extremes)}.',
        bias=BIAS[evaluation['data']],
    )


def summary_table(experiment):
    """Table by depth of EKD against training alone, and whether the promise holds."""
    tops, runs = load_runs(experiment)
    macs = {row['depth']: row['macs'] for run in runs.values() for row in run['depths']}
    rows = []
    for depth in sorted(macs, reverse=True):
        values = [list(tops.get(method, {}).get(depth, {}).values()) for method in ('alone', 'joint', 'ekd')]
        values.append(difference(tops, 'ekd', 'alone', depth))
        cells = [with_error(each, sign=i == 3) if each else '' for i, each in enumerate(values)]
        rows.append([str(depth), f'{macs[depth] / 1e6:.1f} M', *cells])
    head = ['depth', 'MACs', 'trained alone', 'shared, cross-entropy only', 'EKD', 'EKD against alone']
    return '\n'.join([markdown_table(head, rows), *([verdict(tops)] if {'alone', 'ekd'} <= tops.keys() else ())])


def write_readme():
    experiment = 'cifar10_resnet20'
    write_section(ROOT / 'README.md', experiment, summary_table(experiment))


def write_card():
    tags = [path.parent for path in sorted(WEIGHTS.glob('*/config.json'))]
    parts = [
        '# Model card\n',
        'Weights that come with timm_ddnn, under Apache-2.0. Written by `python benchmarks/results.py` from the JSON '
        'files in `results/` and beside the weights: change those, not this.\n',
        *map(card_section, tags),
        f'## Citation\n\nThe method:\n\n```bibtex\n{CITATION}\n```\n\nThis library: [CITATION.cff](CITATION.cff).\n',
    ]
    if tags:
        write_text(ROOT / 'MODEL_CARD.md', '\n'.join(parts))


def main():
    ArgumentParser(__doc__.splitlines()[0]).parse_args()
    write_results()
    write_card()
    write_readme()


if __name__ == '__main__':
    main()
