#!/usr/bin/env python3
"""Write results/runs.csv, summary.csv and verdict.csv from the JSON files of the runs, and draw the plots.

    python benchmarks/results.py

`runs.csv` has a row for every depth of every run, `summary.csv` one for every depth of every method: the mean over
seeds, and what it gains on the same depth trained alone, seed by seed. `verdict.csv` has the tests of
results/PROTOCOL.md. The page about them is results/README.md, which a person writes. `experiments.py` makes the runs.
"""
import csv
import json
import math
import re
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

from timm_ddnn.evaluation.metrics import wilson_interval
from timm_ddnn.evaluation.plots import save_figure, show_macs, widen_axis

RESULTS = Path(__file__).resolve().parent.parent / 'results'
# What is drawn: color, marker, line, label
STYLES = {
    'alone': ('tab:gray', 's', '--', 'trained alone'),
    'kd': ('tab:gray', 'x', ':', 'alone, distilled from the full-net'),
    'joint': ('tab:orange', '^', ':', 'shared, cross-entropy only'),
    'ekd': ('tab:blue', 'o', '-', 'EKD'),
    'kd_shared_deep': ('tab:green', 'D', '-', 'shared, distilled from a deeper net'),
}
JUDGED_SEEDS = {'promise_cifar10_2500': 5}  # of results/PROTOCOL.md
DATA = {
    'cifar10': 'CIFAR-10 (JPEG)', 'tiny_imagenet': 'Tiny ImageNet', 'photos_judged': 'photographs',
    'cifar10_2500_judged': '2,500 CIFAR-10 images'}


def split_name(stem):
    """'alone-20-1' -> 'alone', 1. Nets trained alone are one method at several depths."""
    name, _, seed = stem.rpartition('-')
    return re.sub(r'(alone|alone_ema|alone_late|kd|kd_deep)[-_]\d+$', r'\1', name), int(seed)


def load_runs(experiment):
    """Read the runs of an experiment: {'ekd-0': {...}, ...}."""
    paths = sorted((RESULTS / experiment).glob('*.json'))
    return {path.stem: json.loads(path.read_text(encoding='utf-8')) for path in paths}


def load_experiments():
    names = {path.parent.name for path in RESULTS.glob('*/*.json')} - {'tuning'}  # whose page is written by hand
    return {name: load_runs(name) for name in sorted(names)}


def alone_for(method):
    """Name the nets trained alone that a method is compared with; the first that has the depth counts."""
    if method in ('alone', 'few_alone', 'few_44_alone', 'alone_late'):
        return ()
    if method.endswith('_late'):
        return 'alone_late', 'alone'
    if method.startswith('few_44'):
        return 'few_44_alone', 'few_alone'
    return ('few_alone',) if method.startswith('few_') else ('alone',)


def run_rows(experiments):
    """Make the rows of runs.csv."""
    for experiment, runs in experiments.items():
        for name, run in runs.items():
            method, seed = split_name(name)
            last = (run['history'] or [{}])[-1]
            for row in run['depths']:
                yield {
                    'experiment': experiment,
                    'method': method,
                    'seed': seed,
                    'model': run['options']['--model'],
                    'depth': row['depth'],
                    'top1': row['top1'],
                    'top5': row['top5'],
                    'training_loss': last.get(f'train_ce_{row["depth"]}'),  # cross-entropy, last epoch
                    'parameters': row['parameters'],
                    'macs': row['macs'],
                    'data': run['arguments']['dataset'],
                    'training_images': run.get('training_images'),
                    'validation_images': run['validation_images'],
                    'epochs': run['options']['--epochs'],
                    'training_macs': run.get('training_macs'),  # forward and backward; older runs do not know it
                    'teacher_training_macs': run.get('teacher_training_macs'),
                    'hours': round(
                        run.get('training_seconds', sum(record['seconds'] for record in run['history'])) / 3600, 3),
                    'device': ' '.join(run['hardware']['gpus'][:1]) or run['hardware']['cpu'],
                    'teacher': run['teacher'],
                    'options': ' '.join(f'{flag} {value or ""}'.strip() for flag, value in run['options'].items()),
                    'commit': (run['git'] or {}).get('commit'),
                    'dirty': (run['git'] or {}).get('dirty'),
                }


def summary_rows(rows):
    """Make the rows of summary.csv. Standard errors are over seeds, of three and more."""
    top1 = defaultdict(dict)  # {(experiment, method, depth): {seed: top-1}}
    for row in rows:
        top1[row['experiment'], row['method'], row['depth']][row['seed']] = row['top1']
    for (experiment, method, depth), mine in sorted(top1.items(), key=lambda item: (*item[0][:2], -item[0][2])):
        against, theirs = next(
            ((other, top1[experiment, other, depth]) for other in alone_for(method)
             if (experiment, other, depth) in top1), ('', {}))
        gains = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
        yield {
            'experiment': experiment,
            'method': method,
            'depth': depth,
            'seeds': ' '.join(map(str, sorted(mine))),
            'top1': f'{mean(mine.values()):.2f}',
            'standard_error': standard_error(mine.values()),
            'against': against,
            'gain': f'{mean(gains):+.2f}' if gains else '',
            'gain_standard_error': standard_error(gains),
        }


def verdict_rows(rows):
    """Make the rows of verdict.csv: the one-sided t-tests of the protocol, with p-values by Holm over all of them.

    `holds` tests that the mean gain over seeds is above the margin, -0.2 at full depth and 0 at a sub-net, `fails` that
    it is below.
    """
    top1 = defaultdict(dict)  # {(experiment, depth): {(method, seed): top-1}}
    for row in rows:
        if row['experiment'] in JUDGED_SEEDS:
            top1[row['experiment'], row['depth']][row['method'], row['seed']] = row['top1']
    verdicts = []
    for ((experiment, depth), found), method in product(sorted(top1.items(), reverse=True), ('ekd', 'recipe')):
        seeds = [seed for name, seed in sorted(found) if name == method and ('alone', seed) in found]
        gains = [found[method, seed] - found['alone', seed] for seed in seeds]
        if len(gains) == JUDGED_SEEDS[experiment]:
            margin = -0.2 if depth == max(d for e, d in top1 if e == experiment) else 0.0
            verdicts.append({
                'experiment': experiment, 'method': method, 'depth': depth, 'seeds': ' '.join(map(str, seeds)),
                'gain': f'{mean(gains):+.2f}', 'standard_error': standard_error(gains), 'margin': margin,
                'holds': ttest_1samp(gains, margin, alternative='greater').pvalue,
                'fails': ttest_1samp(gains, margin, alternative='less').pvalue})
    for side in ('holds', 'fails'):
        adjusted = 0.0
        for i, row in enumerate(sorted(verdicts, key=lambda row: row[side])):
            adjusted = max(adjusted, min(1.0, (len(verdicts) - i) * row[side]))
            row |= {side: f'{row[side]:.4f}', f'{side}_by_holm': f'{adjusted:.4f}'}
    return verdicts


def standard_error(values):
    return f'{stdev(values) / math.sqrt(len(values)):.2f}' if len(values) > 2 else ''


def write_csv(path, rows):
    rows = list(rows)
    if not rows:
        return
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, rows[0], lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def draw(path, rows, title):
    """Draw accuracy over multiply-accumulates of the methods in STYLES, mean and standard error over seeds.

    Each method is moved sideways a little, so that error bars of one depth stand beside each other.
    """
    figure = Figure(figsize=(6.5, 4.8), layout='constrained')
    axes = figure.add_subplot()
    macs = {row['depth']: row['macs'] for row in rows}
    step = 0.008 * (max(macs.values()) - min(macs.values()))
    for i, (method, (color, marker, line, label)) in enumerate(STYLES.items()):
        top1 = defaultdict(list)
        for row in rows:
            if row['method'] == method:
                top1[row['depth']].append(row['top1'])
        if not top1:
            continue
        depths, seeds = sorted(top1), min(map(len, top1.values()))
        axes.errorbar(
            [macs[depth] + step * (i - len(STYLES) // 2) for depth in depths], [mean(top1[depth]) for depth in depths],
            yerr=[stdev(top1[depth]) / math.sqrt(seeds) for depth in depths] if seeds > 2 else None,
            color=color, marker=marker, linestyle=line, capsize=3,
            label=f'{label} ({seeds} seed{"s" if seeds > 1 else ""})',
        )
    for depth, value in macs.items():
        axes.axvline(value, color='black', alpha=0.08)
        place = dict(xycoords=('data', 'axes fraction'), ha='center', fontsize='small')
        axes.annotate(f'depth {depth}', (value, 0.02), **place)
    show_macs(axes, max(macs.values()))
    axes.margins(x=0.12, y=0.18)
    images = [row['validation_images'] for row in rows]
    widen_axis(axes, [
        wilson_interval(round(row['top1'] * n / 100), n) for row, n in zip(rows, images, strict=True)])
    axes.set(xlabel='multiply-accumulates per image', ylabel='top-1 accuracy (%)', title=title)
    axes.grid(alpha=0.3, axis='y')
    figure.legend(
        loc='outside lower center', ncols=2, fontsize='small', title='mean, and standard error where there are 3 seeds',
        title_fontsize='small')
    save_figure(figure, path)


def main():
    rows = list(run_rows(load_experiments()))
    write_csv(RESULTS / 'runs.csv', rows)
    write_csv(RESULTS / 'summary.csv', summary_rows(rows))
    write_csv(RESULTS / 'verdict.csv', verdict_rows(rows))
    for experiment in sorted({row['experiment'] for row in rows} - {'ablations', 'tags'}):
        shown = [row for row in rows if row['experiment'] == experiment]
        data = DATA.get(shown[0]['data'], shown[0]['data'])
        net = shown[0]['model'].removeprefix('ddnn_').removeprefix('cifar_')
        net = net.replace('resnet', 'ResNet-').replace('convnext_a', 'ConvNeXt-A')
        length = 'at equal cost' if experiment in JUDGED_SEEDS else f'{shown[0]["epochs"]} epochs'
        title = f'{net} and its sub-nets on {data}, {length}'
        draw(RESULTS / f'{experiment}.png', shown, title)


if __name__ == '__main__':
    main()
