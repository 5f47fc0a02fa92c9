"""The texts hold the figures that the runs have, and their verdicts are those of the figures."""
import importlib
import json
import statistics

import numpy as np
import pytest
from helpers.training import ROOT

from timm_ddnn.hub.model_card import CITATION
from timm_ddnn.utils import files


def write_results(folder, tops):
    """Write results of made-up runs: {(method, seed): {depth: top-1}}."""
    template = json.loads((ROOT / 'results/cifar10_resnet20/ekd-0.json').read_text())
    folder.mkdir(parents=True)
    for (name, seed), by_depth in tops.items():
        costs = {depth: {'macs': depth * 1_000_000, 'parameters': depth * 10_000} for depth in by_depth}
        rows = [dict(depth=depth, top1=top1, top5=100.0, **costs[depth]) for depth, top1 in by_depth.items()]
        teacher = 'few_alone_20' if name == 'few_kd_shared' else None
        (folder / f'{name}-{seed}.json').write_text(json.dumps(template | {'depths': rows, 'teacher': teacher}))


@pytest.mark.parametrize(('full', 'shallow', 'expected'), [
    ((0.0, 0.1, -0.1), (1.0, 1.1, 1.2), 'holds at depths 20 and 8: +0.00 ± 0.06 (20), +1.10 ± 0.06 (8)'),
    ((-0.9, -1.0, -1.1), (1.0, 1.1, 1.2),
     'holds at depth 8, fails at depth 20: -1.00 ± 0.06 (20), +1.10 ± 0.06 (8)'),
    ((-0.3, -0.2, -0.1), (-1.0, 0.0, 1.3), 'is undecided at depths 20 and 8: -0.20 ± 0.06 (20), +0.10 ± 0.67 (8)'),
    ((0.0, 0.1), (-1.0, -1.1), 'is not tested at depths 20 and 8: +0.05 (20), -1.05 (8)'),
    ((), (1.0, 1.1, 1.2), 'holds at depth 8, is not tested at depth 20: +1.10 ± 0.06 (8)'),
    ((), (), ''),
])
def test_the_promise_is_decided_by_the_error_of_the_mean(modules, full, shallow, expected):
    """Catches a verdict on chance, one that forgets what the full-net may lose, or another sign."""
    gains = {20: dict(enumerate(full)), 8: dict(enumerate(shallow))}
    alone = {depth: {seed: 80.0 + seed for seed in by_seed} for depth, by_seed in gains.items()}
    ekd = {depth: {seed: 80.0 + seed + gain for seed, gain in by_seed.items()} for depth, by_seed in gains.items()}
    ekd[20] = ekd[20] or {3: 85.0}
    assert modules.comparison.judge({'alone': alone, 'ekd': ekd}) == expected


def test_other_ways_of_ekd_are_judged_against_nets_of_their_blocks(modules):
    """Catches a verdict from one seed, and late cuts that are held against nets of other blocks."""
    seeds = range(3)
    tops = {
        'alone': {20: dict.fromkeys(seeds, 80.0), 14: dict.fromkeys(seeds, 79.0)},
        'alone_late': {14: dict.fromkeys(seeds, 70.0)},
        'ekd': {20: {0: 80.0}, 14: {0: 79.0}},
        'ekd_late': {20: {0: 80.0, 1: 80.1, 2: 80.2}, 14: {0: 75.0, 1: 75.1, 2: 75.2}},
        'ekd_private': {20: {0: 90.0}, 14: {0: 90.0}},
        'kd_shared': {20: {0: 80.0, 1: 80.1, 2: 80.2}},
        'kd_shared_deep': {20: {3: 80.0, 4: 80.1, 5: 80.2}},  # seeds that no net alone has
    }
    assert modules.comparison.judge_variants(tops) == [
        ('kd_shared', 'holds at depth 20: +0.10 ± 0.06 (20)'),
        ('ekd_late', 'holds at depths 20 and 14: +0.10 ± 0.06 (20), +5.10 ± 0.06 (14)')]
    del tops['alone_late']
    assert ('ekd_late', 'holds at depth 20, is not tested at depth 14: +0.10 ± 0.06 (20)') in (
        modules.comparison.judge_variants(tops))


def test_an_explanation_is_given_only_where_the_losses_are_so(modules):
    """Catches a conclusion from chance or from one seed, and losses of other seeds than those compared."""
    def explain(**losses):
        runs = {
            f'{name}-{seed}': {'history': [{'train_ce_20': 9.0}, {'train_ce_20': loss}]}
            for name, by_seed in losses.items() for seed, loss in enumerate(by_seed)
        }
        runs['alone-8-0'] = {'history': [{'train_ce_8': 5.0}]}
        runs['truncation-0'] = {'history': []}
        return modules.comparison.explanation({'ekd': {20: {0: 80.0}, 8: {0: 70.0}}}, runs)

    ekd, alone = (0.40, 0.42, 0.44), {'alone-20': (0.30, 0.31, 0.32)}
    others = {'kd_shared_deep': (0.39, 0.40, 0.43), 'ekd_ema_teacher': (0.48, 0.5, 0.49), 'ekd_light': (0.1,)}
    text = explain(ekd=ekd, **alone, **others)
    assert 'is 0.420 by `ekd` (seeds 0, 1, 2); against that, with the same seeds, -0.110 ± 0.006 by `alone`, ' in text
    assert '+0.070 ± 0.010 by `ekd_ema_teacher`, -0.300 by `ekd_light`.' in text
    assert 'So by `alone` and `kd_shared_deep` it has learned more of them than by `ekd`.' in text
    assert 'So by `ekd_ema_teacher` it has learned less of them than by `ekd`.' in text
    assert 'compete for the shared weights, less so by `kd_shared_deep`.' in text
    for text in explain(ekd=ekd[:2], **alone), explain(ekd=ekd, **{'alone-20': (0.43, 0.40, 0.44)}):
        assert text.endswith(' by `alone`.\n') and 'learned' not in text and 'compete' not in text
    assert explain(**alone) == ''


def test_weights_become_a_tag_by_their_mean_over_depths(modules, tmp_path, capsys):
    """Catches the weights of the best full-net, or of a method that is no EKD."""
    write_results(tmp_path / 'results/some', {
        ('ekd', 0): {20: 85.0, 8: 80.0}, ('ekd', 1): {20: 84.0, 8: 82.0}, ('ekd_light', 0): {20: 90.0, 8: 90.0},
    })
    _, runs = modules.comparison.load_runs('some')
    assert [f'some/{name}' for name in modules.comparison.rank_runs(runs, 'ekd')] == ['some/ekd-1', 'some/ekd-0']
    assert modules.comparison.rank_runs(runs, 'kd') == []
    make_tag = modules.make_tag
    with pytest.raises(SystemExit, match='2'):
        make_tag.best_run('other', 'ekd')
    assert 'experiment must be one with results of ekd in' in capsys.readouterr().err


def test_differences_are_of_the_same_seed_and_have_their_standard_error(modules, tmp_path):
    """Catches differences of other seeds, and the deviation of runs in the place of the error of their mean."""
    results = modules.results
    alone, ekd = [80.0, 81.0, 83.0], [81.0, 81.5, 85.0]
    write_results(tmp_path / 'results/some', {
        **{('alone-8', seed): {8: top1} for seed, top1 in enumerate(alone)},
        **{('ekd', seed): {8: top1} for seed, top1 in enumerate(ekd)},
        ('joint', 0): {8: 80.5}, ('kd-8', 1): {8: 83.0}, ('ekd_equal', 0): {8: 80.75},
    })
    results.write_results(results.load_experiments())
    text = (tmp_path / 'results/README.md').read_text()
    gains = np.subtract(ekd, alone)
    error = statistics.stdev(gains) / 3 ** 0.5
    assert f'| {np.mean(gains):+.2f} ± {error:.2f} | +0.50 | 0, 1, 2 |' in text
    assert '| joint | 80.50 | +0.50 |  | 0 |' in text
    assert f'The promise of `ekd` holds at depth 8: {np.mean(gains):+.2f} ± {error:.2f} (8).' in text
    assert 'taught one by one: `ekd` has -1.50 (8) against `kd` (1 seed).' in text
    assert 'There is no result of EKD' not in text
    table = results.promise_table(results.load_experiments())
    options = '--alpha 0.3 --beta 0.1 --attention energy --stages -1 --weights 14=0.25 8=0.75'
    setting = f'| `ekd` | `ddnn_resnet20` | 50,000 of CIFAR-10 (JPEG) | 15 | `{options}`'
    gain = f'{np.mean(gains):+.2f} ± {error:.2f} (8) | +0.50 (8)'
    assert f'{setting} | {gain} | holds at depth 8 (3 seeds) |' in table
    assert '| +0.75 (8) | +0.25 (8) | is not tested at depth 8 (1 seed) |' in table  # of `ekd_equal`
    assert (tmp_path / 'results/some.png').stat().st_size > 10_000

    for path in (tmp_path / 'results/some').glob('[ejk]*.json'):
        path.unlink()
    results.write_results(results.load_experiments())
    text = (tmp_path / 'results/README.md').read_text()
    assert '| method | 8 | seeds |' in text
    assert 'There is no result of EKD here yet, so nothing is said of its promise.' in text


def test_variants_are_compared_with_runs_of_their_seed(modules, tmp_path):
    """Catches the difference of two means over other seeds, and of two nets that only have the same depth."""
    write_results(tmp_path / 'results/ablations', {
        ('ekd', 0): {20: 70.0, 14: 69.0, 8: 68.0}, ('ekd', 1): {20: 60.0, 14: 59.0, 8: 58.0},
        ('kl', 0): {20: 70.5, 14: 69.5, 8: 68.5}, ('joint', 0): {20: 71.0, 14: 70.0, 8: 69.0},
        ('alone_20', 0): {20: 72.0}, ('alone_8', 0): {8: 67.0}, ('alone_late_14', 0): {14: 66.0},
        ('ekd_cut_late', 0): {20: 70.25, 14: 70.75, 10: 68.0}, ('ekd_sampled', 0): {20: 69.0},
        ('few_44_ekd', 0): {44: 75.0, 32: 74.5, 20: 74.0},
        ('few_44_alone_44', 0): {44: 74.0}, ('few_alone_20', 0): {20: 73.5},
        ('few_44_joint', 0): {44: 74.75, 20: 73.75}, ('few_alone_ema_20', 0): {20: 73.75},
        ('few_ekd_ema_teacher', 0): {20: 74.5}, ('few_joint', 0): {20: 74.25}, ('few_kd_shared', 0): {20: 76.0},
    })
    modules.results.write_results(modules.results.load_experiments())
    text = (tmp_path / 'results/README.md').read_text()
    assert '| `kl` | 70.50 | 69.50 | 68.50 | `joint` | -0.50 | -0.50 | -0.50 | 0 |' in text
    assert '| `joint` | 71.00 | 70.00 | 69.00 | `alone` | -1.00 |  | +2.00 | 0 |' in text
    assert '| `ekd` | 65.00 | 64.00 | 63.00 | `joint` | -1.00 | -1.00 | -1.00 | 0, 1 |' in text
    late = '| `ekd_cut_late` | 70.25 | 70.75 | 68.00 |  | `alone_late`, `alone` | -1.75 | +4.75 |  |  | 0 |'
    assert late in text
    assert 'lie up to 10.0 points apart' in text
    assert '`few_44_ekd` is not tested at depths 44, 32 and 20: +1.00 (44), +0.50 (20).' in text
    assert 'Distillation adds +0.25 (44), +0.25 (20) to the same training without it.' in text
    table = modules.results.promise_table(modules.results.load_experiments())
    assert '| +1.00 (44), +0.50 (20) | +0.25 (44), +0.25 (20) | is not tested at' in table
    assert '| +1.00 (20) |  | is not tested at depth 20 (1 seed) |' in table  # no average was trained without EKD
    assert '--teacher ALONE` | +2.50 (20) | +1.75 (20) | is not tested at depth 20 (1 seed) |' in table
    assert '| `few_alone_ema` | 73.75 ' in text
    runs = {'ekd_sampled-0': {'teacher': None, 'options': {'--seed': '0', '--sample': None, '--lr': '0.4'}}}
    table = modules.results.ablation_tables({'ekd_sampled': {20: {0: 69.0}}}, runs)[1]
    assert '| `ekd_sampled` | 69.00 | `ekd` |  | 0 | `--sample` |' in table


def test_a_deeper_teacher_is_described_and_compared_with_nets_that_it_taught_alone(modules, tmp_path):
    """Catches gains that are owed to a longer training of the teacher, or to the teacher alone, and do not say so."""
    results = modules.results
    write_results(tmp_path / 'results/cifar10_resnet20', {
        ('alone-20', 0): {20: 80.0}, ('alone-8', 0): {8: 70.0}, ('ekd', 0): {20: 79.5, 8: 70.5},
        ('kd-8', 0): {8: 71.0}, ('kd_deep-20', 0): {20: 82.0}, ('kd_shared_deep', 0): {20: 81.5, 8: 72.0},
    })
    write_results(tmp_path / 'results/cifar10_resnet56', {
        **{('alone-20', seed): {20: 84.0 + seed} for seed in range(3)},
        **{('ekd', seed): {56: 85.0 + seed} for seed in range(2)},
    })
    weights = tmp_path / 'results/weights/ddnn_resnet56.ekd_cifar10'
    weights.mkdir(parents=True)
    (weights / 'evaluation.json').write_text(json.dumps({'run': 'cifar10_resnet56/ekd-0'}))
    text = results.summary_table(
        {name: results.load_runs(name) for name in ('cifar10_resnet20', 'cifar10_resnet56')}, 'cifar10_resnet20')
    assert '| **shared weights, taught by a deeper net** | 81.50 (+1.50) | 72.00 (+2.00) | 0 |' in text
    assert '`ddnn_resnet56.ekd_cifar10`, trained on the same images for 15 epochs, number 2 of 2 seeds' in text
    assert 'A net that is trained alone for as many epochs as the teacher reaches 85.00 ± 0.58 (20).' in text
    assert '`kd_shared_deep` has -0.50 (20) against `kd_deep` (1 seed)' in text
    assert 'one file, here of 0.20 million parameters in the place of 0.28.' in text


def test_distillation_is_held_against_training_with_the_same_weights_of_sub_nets(modules):
    """Catches a gain that is owed to other weights of the sub-nets."""
    even = {'joint': 80.0, 'ekd_equal': 81.0}
    weighted = {'joint_weighted': 79.0, 'ekd': 81.0, 'kd_shared_deep': 82.0}
    tops = {name: {8: {0: top1}} for name, top1 in {**even, **weighted}.items()}
    runs = {f'{name}-0': {'options': {'--weights': '8=0.5'} if name in weighted else {}} for name in tops}
    gains = {name: modules.comparison.distillation_gains(tops, runs, name) for name in tops}
    assert gains == {
        'joint': {}, 'ekd_equal': {8: [1.0]}, 'joint_weighted': {}, 'ekd': {8: [2.0]}, 'kd_shared_deep': {8: [3.0]}}
    del runs['joint_weighted-0']
    assert modules.comparison.distillation_gains(tops, runs, 'ekd') == {}


def test_seeds_that_were_added_are_told(modules, tmp_path):
    """Catches a verdict that had more chances than others and looks like them."""
    write_results(tmp_path / 'results/some', {
        (method, seed): {8: 70.0 + seed + seed ** 2 * ('ekd' in method)}
        for method, seeds in {'alone-8': 4, 'ekd': 4, 'ekd_private': 3}.items() for seed in range(seeds)
    })
    experiments = modules.results.load_experiments()
    for text in modules.results.promise_table(experiments), modules.results.promise_summary(experiments):
        assert 'Of 2 tests with an error of 5 % each, 0.1 are expected to come out wrong; `ekd` got seeds ' in text
    (tmp_path / 'results/some/ekd-3.json').unlink()
    assert 'beyond three' not in modules.results.promise_table(modules.results.load_experiments())


def test_the_summary_has_what_was_put_to_the_test(modules, tmp_path):
    """Catches a setting of one seed, and one that fails, before those that hold."""
    gains = {
        'alone-8': (0, 0, 0), 'ekd': (-1.0, -1.1, -1.2), 'ekd_light': (-1, 0, 1), 'ekd_private': (1.0, 1.1, 1.2),
        'ekd_equal': (2.0,)}
    write_results(tmp_path / 'results/some', {
        (name, seed): {8: 70.0 + seed + gain} for name, by_seed in gains.items() for seed, gain in enumerate(by_seed)})
    lines = modules.results.promise_summary(modules.results.load_experiments()).splitlines()
    setting = '`ddnn_resnet20`, 50,000 of CIFAR-10 (JPEG), 3 seeds'
    assert [line for line in lines if line.startswith('| ')][1:] == [
        f'| holds at depth 8 | `ekd_private` | {setting} | +1.10 ± 0.06 (8) |',
        f'| is undecided at depth 8 | `ekd_light` | {setting} | +0.00 ± 0.58 (8) |',
        f'| fails at depth 8 | `ekd` | {setting} | -1.10 ± 0.06 (8) |',
    ]


def test_methods_are_explained_with_those_that_they_refer_to(modules):
    """Catches 'as kd_shared_deep' where no one says what that is."""
    table = modules.comparison.method_table(['kd_shared_deep_private'])
    explained = 'kd', 'kd_deep', 'kd_shared', 'kd_shared_weighted', 'kd_shared_deep', 'kd_shared_deep_private'
    assert all(f'| `{name}` |' in table for name in explained) and '`ekd`' not in table


def test_seeds_of_a_method_had_the_same_arguments():
    """Catches a mean over runs of which some had other defaults."""
    first, compared = {}, 0
    for path in sorted(ROOT.glob('results/*/*-*.json')):
        name, seed = path.stem.rpartition('-')[::2]
        arguments = json.loads(path.read_text())['arguments']
        assert str(arguments.pop('seed')) == seed
        expected = first.setdefault((path.parent.name, name), arguments)
        compared += expected is not arguments
        for key in expected.keys() & arguments.keys():  # later versions have more
            assert expected[key] == arguments[key], f'{path}: {key}'
    assert compared > 50


def test_texts_are_those_of_the_results(monkeypatch):
    """Catches a text that was edited by hand, or is older than a run."""
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    results, card = map(importlib.import_module, ('results', 'card'))
    written = {}
    for module in (results, card, files):
        monkeypatch.setattr(module, 'write_text', lambda path, text: written.update({path: text}))
    monkeypatch.setattr(results, 'save_figure', lambda *_: None)
    monkeypatch.setattr('sys.argv', ['results.py'])
    results.main()
    assert written.keys() == {ROOT / 'results/README.md', ROOT / 'MODEL_CARD.md', ROOT / 'README.md'}
    for path, text in written.items():
        assert path.read_text() == text, f'run python benchmarks/results.py: {path.name} is old'
    assert CITATION in written[ROOT / 'MODEL_CARD.md']
