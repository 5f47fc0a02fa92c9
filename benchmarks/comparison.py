"""What the runs in results/ have reached, by method, depth and seed, and how methods compare."""
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from timm_ddnn.model_card import markdown_table

RESULTS = Path(__file__).resolve().parent.parent / 'results'
TOLERANCE = 0.2  # points that the full-net may lose
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


def rank_runs(experiment):
    """-> [(name, result)] of the EKD runs of an experiment, that with the highest top-1, mean over depths, first."""
    found = {
        f'{experiment}/{path.stem}': json.loads(path.read_text()) for path in (RESULTS / experiment).glob('ekd-*.json')}
    return sorted(found.items(), key=lambda run: (-mean(row['top1'] for row in run[1]['depths']), run[0]))


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


def list_gains(gains):
    return ', '.join(f'{with_error(values, sign=True)} ({depth})' for depth, values in gains.items())


def verdict(tops):
    """Say depth by depth whether the promise holds: sub-nets better than alone, the full-net as good as alone."""
    gains = gains_by_depth(tops)
    outcomes = {'holds': [], 'fails': [], 'is undecided': []}
    for depth, values in gains.items():
        least = -TOLERANCE if depth == max(tops['ekd']) else 0
        margin, error = mean(values) - least, standard_error(values)
        decided = error is not None and abs(margin) > 2 * error
        outcomes[('holds' if margin > 0 else 'fails') if decided else 'is undecided'].append(depth)
    seeds = count_seeds(gains)
    found = [
        f'{outcome} at depth{"s"[:len(depths) > 1]} {" and ".join(map(str, depths))}'
        for outcome, depths in outcomes.items() if depths
    ]
    return (
        f'The promise of EKD is that every sub-net is better than the same net trained alone and that the full-net '
        f'loses nothing, for which {TOLERANCE} points are allowed here. With {seeds} seed{"s"[:seeds != "1"]}, and two '
        f'standard errors over seeds as the limit, it {", ".join(found)}: {list_gains(gains)}.\n'
    )


def final_loss(runs, method, depth):
    """Cross-entropy of a depth on its training images as they were augmented, mean over the last epoch and the runs."""
    name = f'train_ce_{depth}'
    return mean(
        run['history'][-1][name] for stem, run in runs.items()
        if split_name(stem)[0] == method and name in run['history'][-1]
    )


def explanation(tops, runs, few_tops, few_runs):
    """Say what the full-net's accuracy goes with, where there are lighter sub-nets and runs on few images.

    Args:
        tops: What `load_runs` gives for an experiment, as `runs`.
        runs: See `tops`.
        few_tops: What `load_runs` gives for the ablations, with runs on few images among them, as `few_runs`.
        few_runs: See `few_tops`.
    """
    full, *subnets = sorted(tops['ekd'], reverse=True)
    if 'ekd_light' not in tops or not {f'few_alone_{full}', 'few_ekd'} <= few_tops.keys():
        return ''
    losses = [final_loss(runs, method, full) for method in ('ekd', 'alone', 'ekd_light')]
    light, *light_subnets = (with_error(list(tops['ekd_light'][depth].values())) for depth in (full, *subnets))
    few_losses = [final_loss(few_runs, method, full) for method in ('few_ekd', f'few_alone_{full}')]
    few_alone = {depth: few_tops.get(f'few_alone_{depth}', {}).get(depth, {}) for depth in few_tops['few_ekd']}
    few_gains = gains_by_depth({'ekd': few_tops['few_ekd'], 'alone': few_alone})
    return (
        f'The full-net differs on its training images already: in the last epoch its cross-entropy on them is '
        f'{losses[0]:.3f} by EKD and {losses[1]:.3f} alone. With sub-nets so light that they hardly train the weights '
        f'(`ekd_light`, seeds: {count_seeds(tops["ekd_light"])}) it is {losses[2]:.3f}, the full-net has {light} '
        f'and the sub-nets {", ".join(light_subnets)}. A lack of capacity after this schedule would look so; it is not '
        f'proved. With 5,000 images and 60 epochs the cross-entropy is {few_losses[0]:.3f} by EKD (sub-nets of weight '
        f'1) and {few_losses[1]:.3f} alone, and EKD against training alone has {list_gains(few_gains)} (seeds: '
        f'{count_seeds(few_gains)}, see the choice of options).\n'
    )
