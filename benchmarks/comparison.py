"""What the runs in results/ have reached, by method, depth and seed, and how methods compare."""
import json
import math
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from matrix import EKD, EMA_TEACHER, KD, KD_DEEP, SUBNET_WEIGHTS, all_runs
from matrix import METHODS as RIVALS
from scipy.stats import ttest_1samp

from timm_ddnn.hub.model_card import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'results'
TOLERANCE = 0.2  # points that the full-net may lose
LEVEL = 0.05  # probability of a verdict that is wrong
MIDDLE, SHALLOW = SUBNET_WEIGHTS['ekd']
METHODS = {
    'alone': 'each depth trained alone, as a stock net',
    'alone_late': 'the depths of `ekd_late` trained alone',
    'kd': 'each depth trained alone, taught by the full-net that was trained alone: KL divergence of weight '
    f'{KD["--alpha"]}, temperature {KD["--temperature"]}',
    'kd_shared': 'all depths in shared weights, each taught as by `kd`, the full-net too (`--teacher`)',
    'kd_shared_weighted': f'as `kd_shared`, but the shallowest sub-net with weight {SHALLOW}, others {MIDDLE}',
    'kd_deep': f'each depth trained alone, taught as by `kd`, but by a deeper net, `{KD_DEEP["--teacher"]}`',
    'kd_shared_deep': 'as `kd_shared_weighted`, but taught by the net of `kd_deep`',
    'kd_shared_deep_private': 'as `kd_shared_deep`, but with scale and shift of its own for every path',
    'joint': 'all depths in shared weights, the cross-entropy of each with weight 1',
    'joint_weighted': 'as `ekd`, without KL divergence and attention',
    'kl': 'as `ekd`, without attention',
    'attention': 'as `ekd`, without KL divergence',
    'ekd': 'embedded knowledge distillation: all depths in shared weights, cross-entropy of each, KL divergence (alpha '
    f'{EKD["--alpha"]}) and attention (beta {EKD["--beta"]}) from the full-net; the shallowest sub-net has weight '
    f'{SHALLOW}, others {MIDDLE}',
    'ekd_equal': 'as `ekd`, but all sub-nets with weight 1, so that against `joint` it shows what distillation adds',
    'ekd_private': 'as `ekd`, but with scale and shift of its own for every path',
    'ekd_full_first': 'as `ekd_equal`, but in the first half of the updates the full-net trains alone '
    '(`--full-net-updates`)',
    'ekd_ema_teacher': 'as `ekd_equal`, but an average of the weights (`--ema-teacher`), of decay '
    f'{EMA_TEACHER["--model-ema-decay"]}, teaches all depths, the full-net too: KL divergence of weight '
    f'{EMA_TEACHER["--alpha"]}, temperature {EMA_TEACHER["--temperature"]}',
    'ekd_late': 'as `ekd`, but cut in the late stages, blocks '
    f'{" and ".join(RIVALS["ekd_late"]["--subnets"].split())}, and held against `alone_late`',
    'ekd_light': 'as `ekd`, but with weights {1} and {0}'.format(*SUBNET_WEIGHTS['ekd_light']),
    'kl_only': 'shared weights, sub-nets of weight 1 that learn by KL divergence alone, alpha '
    f'{RIVALS["kl_only"]["--alpha"]}, temperature {RIVALS["kl_only"]["--temperature"]}',
    'truncation': 'the full-net trained alone, cut to a depth, statistics estimated again',
}
PROMISE = (
    'The promise of EKD is that every sub-net is better than the same net trained alone and that the full-net loses '
    f'nothing, for which {TOLERANCE} points are allowed here. It is tested depth by depth over seeds, at least three, '
    f'by one-sided t-tests with an error of {100 * LEVEL:g} % each.\n')
# Those that train all depths by distillation, and are held against the promise
WAYS = [name for name in METHODS if name.startswith(('ekd', 'kd_shared'))]
# The nets trained alone that a method is compared with, the first that has the depth, where they are not `alone`
ALONE = {'ekd_late': ('alone_late', 'alone')}


def join_depths(name):
    """'few_alone_14' -> 'few_alone': nets that are trained alone are one method, at several depths."""
    return re.sub(r'(alone|alone_ema|alone_late|kd|kd_deep)[-_]\d+$', r'\1', name)


def split_name(stem):
    """'alone-20-1' -> 'alone', 1."""
    name, _, seed = stem.rpartition('-')
    return join_depths(name), int(seed)


def load_runs(experiment):
    """-> {method or variant: {depth: {seed: top-1}}}, and the runs themselves by name."""
    tops, runs = defaultdict(lambda: defaultdict(dict)), {}
    for path in sorted((RESULTS / experiment).glob('*.json')):
        run = runs[path.stem] = json.loads(path.read_text())
        name, seed = split_name(path.stem)
        for row in run['depths']:
            tops[name][row['depth']][seed] = row['top1']
    return {name: dict(by_depth) for name, by_depth in tops.items()}, runs


def select(runs, method):
    """-> A method's runs among those of an experiment, by name."""
    return {name: run for name, run in runs.items() if split_name(name)[0] == method}


def rank_runs(runs, method):
    """-> Names of a method's runs among those of an experiment, the one of the highest mean top-1 over depths first."""
    return sorted(sorted(select(runs, method)), key=lambda name: -mean(row['top1'] for row in runs[name]['depths']))


def standard_error(values):
    """Standard error of the mean; None of fewer than three values, whose spread says next to nothing of it."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 2 else None


def with_error(values, sign=False):
    text = f'{mean(values):+.2f}' if sign else f'{mean(values):.2f}'
    error = standard_error(values)
    return text if error is None else f'{text} ± {error:.2f}'


@cache
def list_planned():
    """-> {('alone', 20), ...}: the methods of the matrix that train a depth by itself, and the depth."""
    names = (name.partition('/')[2].rpartition('-')[0] for name in all_runs())
    return {(join_depths(name), int(name[len(join_depths(name)) + 1:])) for name in names if join_depths(name) != name}


def difference(tops, method, others, depth):
    """Differences at a depth to the first other method that has it or is to have it, in the order of the seeds."""
    mine = tops.get(method, {}).get(depth, {})
    for other in others:
        theirs = tops.get(other, {}).get(depth, {})
        if theirs or (other, depth) in list_planned():
            return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    return []


def count_seeds(count):
    return f'{count} seed{"s"[:count > 1]}'


def name_seeds(by_depth):
    """{20: {0: 72.6, 1: 72.5}, 8: {0: 69.1}} -> '20: 0, 1; 8: 0', and '0, 1' if those of all depths are the same."""
    seeds = {depth: ', '.join(map(str, sorted(by_seed))) for depth, by_seed in by_depth.items()}
    if len({*seeds.values()}) == 1:
        return next(iter(seeds.values()))
    return '; '.join(f'{depth}: {text}' for depth, text in sorted(seeds.items(), reverse=True))


def comparison(tops):
    """Table of the methods, top-1 per depth, and the differences to training alone and to joint training."""
    depths = sorted({depth for method in tops.values() for depth in method}, reverse=True)
    against = [other for other in ('alone', 'joint') if other in tops and len(tops) > 1]
    rows = []
    for method in METHODS:
        if method not in tops:
            continue
        cells, gains = [], {other: [] for other in against}
        for depth in depths:
            values = list(tops[method].get(depth, {}).values())
            cells.append(with_error(values) if values else '')
            for other in gains:
                others = ALONE.get(method, (other,)) if other == 'alone' else (other,)
                gain = difference(tops, method, others, depth) if method != other else []
                gains[other].append(with_error(gain, sign=True) if gain else '')
        rows.append([method, *cells, *(cell for other in against for cell in gains[other]), name_seeds(tops[method])])
    versus = [f'{depth} against {other}' for other in against for depth in depths]
    head = ['method', *map(str, depths), *versus, 'seeds']
    return markdown_table(head, rows)


def gains_by_depth(tops, method='ekd', others=('alone',)):
    gains = {depth: difference(tops, method, others, depth) for depth in sorted(tops.get(method, ()), reverse=True)}
    return {depth: values for depth, values in gains.items() if values}


def distillation_gains(tops, runs, method):
    """What a way of EKD gains by depth on the same training without distillation; nothing if there is none.

    Args:
        tops: What `load_runs` gives for an experiment, as `runs`.
        runs: See `tops`.
        method: Name of the method or variant.
    """
    rival = re.sub('kd_shared|ekd', 'joint', method.removesuffix('_equal').replace('_deep', ''))
    names = method, rival, f'{rival}_weighted'
    mine, *theirs = ({run['options'].get('--weights') for run in select(runs, name).values()} for name in names)
    alike = [name for name, weights in zip(names[1:], theirs, strict=True) if name != method and weights == mine]
    return gains_by_depth(tops, method, alike)


def list_gains(gains):
    return ', '.join(f'{with_error(values, sign=True)} ({depth})' for depth, values in gains.items())


def enumerate_all(values):
    """[20, 14, 8] -> '20, 14 and 8'"""
    *most, last = map(str, values)
    return f'{", ".join(most)} and {last}' if most else last


def judge(tops, method='ekd', others=('alone',)):
    """Say depth by depth whether the promise holds, and by how much: 'fails at depth 20: -0.96 ± 0.23 (20)'."""
    gains = gains_by_depth(tops, method, others)
    return f'{outcome(gains, tops[method])}: {list_gains(gains)}' if gains else ''


def decide(gains, depths):
    """Decide depth by depth whether the promise holds: {'holds': [8], 'fails': [20], ...}.

    Args:
        gains: What `gains_by_depth` gives.
        depths: All depths of the model.
    """
    outcomes = {'holds': [], 'fails': [], 'is undecided': [], 'is not tested': []}
    for depth in sorted(depths, reverse=True):
        least = -TOLERANCE if depth == max(depths) else 0
        values = gains.get(depth, ())
        if len(values) < 3:
            outcomes['is not tested'].append(depth)
        elif ttest_1samp(values, least, alternative='greater').pvalue < LEVEL:
            outcomes['holds'].append(depth)
        elif ttest_1samp(values, least, alternative='less').pvalue < LEVEL:
            outcomes['fails'].append(depth)
        else:
            outcomes['is undecided'].append(depth)
    return {text: found for text, found in outcomes.items() if found}


def outcome(gains, depths):
    """Say what `decide` finds: 'holds at depth 8, fails at depth 20'."""
    found = decide(gains, depths)
    return ', '.join(f'{text} at depth{"s"[:len(at) > 1]} {enumerate_all(at)}' for text, at in found.items())


def judge_variants(tops):
    """-> (method, what `judge` says) of the other ways to train all depths by distillation that have several seeds."""
    full = max(tops['ekd'])
    ways = [name for name in WAYS if name != 'ekd']
    names = [name for name in ways if len(tops.get(name, {}).get(full, ())) > 2]
    judged = {name: judge(tops, name, ALONE.get(name, ('alone',))) for name in names}
    return [(name, text) for name, text in judged.items() if text]


def final_losses(runs, depth):
    """-> {method: {seed: ...}}, cross-entropy of a depth on its training images as augmented, in the last epoch."""
    losses = defaultdict(dict)
    for stem, run in runs.items():
        method, seed = split_name(stem)
        if run['history'] and f'train_ce_{depth}' in run['history'][-1]:
            losses[method][seed] = run['history'][-1][f'train_ce_{depth}']
    return losses


def explanation(tops, runs):
    """Say what the full-net has learned of its training images by EKD, and how much more or less by other methods.

    Args:
        tops: What `load_runs` gives for an experiment, as `runs`.
        runs: See `tops`.
    """
    losses = final_losses(runs, max(tops['ekd']))
    mine = losses['ekd']
    if not mine:
        return ''
    gains, lower, higher = [], [], []
    for method in ('alone', *(name for name in WAYS if name != 'ekd')):
        if values := [losses[method][seed] - mine[seed] for seed in sorted(mine.keys() & losses[method].keys())]:
            error = '' if standard_error(values) is None else f' ± {standard_error(values):.3f}'
            gains.append(f'{mean(values):+.3f}{error} by `{method}`')
            for names, side in (lower, 'less'), (higher, 'greater'):
                if len(values) > 2 and ttest_1samp(values, 0, alternative=side).pvalue < LEVEL:
                    names.append(f'`{method}`')
    text = (
        f'The cross-entropy of the full-net on its training images, in the last epoch, is {mean(mine.values()):.3f} by '
        f'`ekd` (seed{"s"[:len(mine) > 1]} {", ".join(map(str, sorted(mine)))})'
    )
    text += f'; against that, with the same seeds, {", ".join(gains)}.' if gains else '.'
    for names, word in (lower, 'more'), (higher, 'less'):
        if names:
            text += f' So by {enumerate_all(names)} it has learned {word} of them than by `ekd`.'
    if '`alone`' in lower:
        text += ' That is a sign that by `ekd`, at this schedule, the depths compete for the shared weights'
        text += f', less so by {enumerate_all(lower[1:])}.' if lower[1:] else '.'
    return text + '\n'


def against_taught(tops):
    """Say what shared weights gain on nets that a teacher taught one by one; nothing where there are none."""
    texts = []
    for method, other in ('ekd', 'kd'), ('kd_shared', 'kd'), ('kd_shared_deep', 'kd_deep'):
        if gains := gains_by_depth(tops, method, [other]):
            seeds = max(map(len, gains.values()))
            texts.append(f'`{method}` has {list_gains(gains)} against `{other}` ({count_seeds(seeds)})')
    return '; '.join(texts)


def method_table(names):
    """Say what the methods are, and those by which they are explained."""
    names, added = set(), set(names)
    while added:
        names |= added
        mentioned = {other for name in added for other in re.findall(r'`(\w+)`', METHODS.get(name, ''))}
        added = mentioned & METHODS.keys() - names
    return markdown_table(['method', ''], [[f'`{name}`', text] for name, text in METHODS.items() if name in names])


def common_options(runs, method):
    """Options that all runs of a method have but the seed, with their values. ALONE is the run of the same seed."""
    mine = list(select(runs, method).values())
    first, *others = (run['options'].items() for run in mine)
    options = dict(item for item in first if item[0] != '--seed' and all(item in other for other in others))
    return options | ({'--beta': '0', '--teacher': 'ALONE'} if any(run['teacher'] for run in mine) else {})


def join_options(options):
    """{'--alpha': '1', '--sample': None} -> '--alpha 1 --sample'"""
    return ' '.join(flag if value is None else f'{flag} {value}'.strip() for flag, value in options.items())


def name_machine(run):
    hardware = run['hardware']
    return ', '.join(hardware['gpus']) or f'a machine with {hardware["cpu_cores"]} cores of {hardware["cpu"]}'
