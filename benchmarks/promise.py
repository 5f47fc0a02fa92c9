"""The settings that are held against the promise of EKD: what they are, what they gain, and where it holds."""
from typing import NamedTuple

from comparison import (
    ALONE,
    LEVEL,
    WAYS,
    common_options,
    count_seeds,
    decide,
    distillation_gains,
    enumerate_all,
    gains_by_depth,
    join_options,
    list_gains,
    outcome,
    select,
)
from matrix import AGAINST, RECIPE

from timm_ddnn.hub.model_card import markdown_table

SHORT = {
    'cifar10': 'CIFAR-10 (JPEG)',
    'cifar10_part': 'the training split of CIFAR-10 (JPEG)',
    'tiny_imagenet': 'Tiny ImageNet',
}
# Options that all methods of an experiment have in common
SHARED = {'--model', '--train-split', '--epochs', '--img-size', '--torchcompile', *RECIPE}
# The variants of the ablations that are held against the promise
TESTED = [name for name, others in AGAINST.items() if 'kd' in name and 'alone' in others[0]]


def list_options(runs, method):
    """-> Options of a method in Markdown, less those that all methods have in common."""
    options = {flag: value for flag, value in common_options(runs, method).items() if flag not in SHARED}
    if options.get('--subnets') == '':  # a net of one depth
        options['--model-kwargs'] = 'layers=BLOCKS'
    return f'`{join_options(options)}`' if options else ''


def recipe_options(runs):
    """-> Options in Markdown that all methods of an experiment have in common."""
    options = common_options(runs, 'alone')
    return f'`{join_options({flag: value for flag, value in options.items() if flag in SHARED})}`'


def name_model(runs):
    return next(iter(runs.values()))['arguments']['model']


def name_data(runs):
    return SHORT[next(iter(runs.values()))['arguments']['dataset']].removeprefix('the training split of ')


class Setting(NamedTuple):
    """A way to train all depths at once that is held against the promise, and what it gains on training alone."""

    method: str
    runs: dict
    depths: list
    gains: dict
    added: dict  # what distillation adds
    seeds: int


def list_settings(experiments):
    """-> Settings of all experiments, those by which options were chosen last."""
    settings = []
    for experiment in sorted(experiments, key='ablations'.__eq__):
        tops, runs = experiments[experiment]
        if experiment == 'ablations':
            methods = {name: AGAINST[name] for name in TESTED}
        else:
            methods = {name: ALONE.get(name, ('alone',)) for name in WAYS}
        for method, others in methods.items():
            if gains := gains_by_depth(tops, method, others):
                added, seeds = distillation_gains(tops, runs, method), max(map(len, gains.values()))
                settings.append(Setting(method, select(runs, method), list(tops[method]), gains, added, seeds))
    return settings


def promise_table(experiments):
    """Table of what all depths at once gain on training alone, and whether the promise holds, by setting."""
    rows, settings = [], list_settings(experiments)
    for setting in settings:
        run = next(iter(setting.runs.values()))
        rows.append([
            f'`{setting.method}`',
            f'`{name_model(setting.runs)}`',
            f'{run["training_images"]:,} of {name_data(setting.runs)}',
            str(run['arguments']['epochs']),
            list_options(setting.runs, setting.method),
            list_gains(setting.gains),
            list_gains(setting.added),
            f'{outcome(setting.gains, setting.depths)} ({count_seeds(setting.seeds)})',
        ])
    head = [
        'method', 'model', 'training images', 'epochs', 'options', 'against alone', 'what distillation adds', 'promise']
    return markdown_table(head, rows) + (
        '\nWhat distillation adds is the difference to the same training without it, where that was done. ALONE is the '
        'full-net that was trained alone before with the same seed. A part of the training images is judged on 30,000 '
        'others of them. Options that a row leaves out are those of the experiment below; methods named `few_` have 6 '
        f'epochs of warm-up.\n\n{describe_search(settings)}'
    )


def describe_search(settings):
    """Say what it does to the tests that settings were searched for."""
    tests = sum(len(values) > 2 for setting in settings for values in setting.gains.values())
    text = (
        'Read it as a search: settings were tried one after another until the promise held in some, by the images that '
        f'judge them here, and with the first seeds among those tested. Of {tests} tests with an error of '
        f'{100 * LEVEL:g} % each, {tests * LEVEL:.1f} are expected to come out wrong'
    )
    if more := [f'`{setting.method}`' for setting in settings if setting.seeds > 3]:
        text += f'; {enumerate_all(more)} got seeds beyond three because a depth was undecided, which favours "holds"'
    return f'{text}.\n'


def promise_summary(experiments):
    """Short table of the settings that have three seeds or more, those first in which the promise holds."""
    settings, rows = list_settings(experiments), []
    for setting in settings:
        if setting.seeds > 2:
            decided = decide(setting.gains, setting.depths)
            images = next(iter(setting.runs.values()))['training_images']
            rows.append((('fails' in decided, -len(decided.get('holds', ()))), [
                outcome(setting.gains, setting.depths),
                f'`{setting.method}`',
                f'`{name_model(setting.runs)}`, {images:,} of {name_data(setting.runs)}, {count_seeds(setting.seeds)}',
                list_gains(setting.gains),
            ]))
    rows.sort(key=lambda row: row[0])
    head = ['promise', 'method', 'net, training images, seeds', 'against alone']
    table = markdown_table(head, [row for _, row in rows])
    return (
        'All settings that have three seeds or more; [results](results/README.md) says what the methods are, and has '
        f'their options and the settings of fewer seeds:\n\n{table}\n{describe_search(settings)}')
