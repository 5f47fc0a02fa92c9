"""The CSV files are those of the runs, and the pages of people say what stands in them."""
import csv
import json
import re
from statistics import mean, stdev

import pytest
from helpers.training import ROOT


def read_csv(path):
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.fixture
def some_runs(modules, tmp_path):
    """Made-up runs of an experiment: {(name, seed): {depth: top-1}}."""
    template = json.loads((ROOT / 'results/cifar10_resnet20/ekd-0.json').read_text(encoding='utf-8'))

    def write(tops):
        folder = tmp_path / 'results/some'
        folder.mkdir(parents=True, exist_ok=True)
        for (name, seed), by_depth in tops.items():
            rows = [
                dict(depth=depth, top1=top1, top5=100.0, macs=depth * 1_000_000, parameters=depth * 10_000)
                for depth, top1 in by_depth.items()]
            (folder / f'{name}-{seed}.json').write_text(json.dumps(template | {'depths': rows}))
        return modules.results
    return write


def test_gains_are_of_the_same_seed_and_have_the_error_of_their_mean(some_runs, tmp_path):
    """Catches differences of means over different seeds, a deviation in the place of an error, and another rival."""
    results = some_runs({
        **{('alone-8', seed): {8: top1} for seed, top1 in enumerate((80.0, 81.0, 83.0, 90.0))},
        **{('ekd', seed): {20: 85.0, 8: top1} for seed, top1 in enumerate((81.0, 81.5, 85.0))},
        ('kd-8', 1): {8: 83.0}, ('few_alone_8', 0): {8: 70.0}, ('few_ekd', 0): {8: 71.5},
        ('few_44_alone_32', 0): {32: 76.0}, ('few_44_ekd', 0): {32: 75.0, 8: 72.0},
        ('alone_late_14', 0): {14: 69.0}, ('ekd_late', 0): {14: 70.0, 8: 80.25},
    })
    results.main()
    found = {(row['method'], row['depth']): row for row in read_csv(tmp_path / 'results/summary.csv')}
    gains = [1.0, 0.5, 2.0]
    row = found['ekd', '8']
    assert (row['seeds'], row['against'], row['top1']) == ('0 1 2', 'alone', '82.50')
    assert row['gain'] == f'{mean(gains):+.2f}' and row['gain_standard_error'] == f'{stdev(gains) / 3 ** 0.5:.2f}'
    assert row['standard_error'] == f'{stdev((81.0, 81.5, 85.0)) / 3 ** 0.5:.2f}'
    assert found['ekd', '20']['gain'] == ''  # no net of that depth was trained alone
    expected = {
        ('kd', '8'): ('alone', '+2.00'), ('few_ekd', '8'): ('few_alone', '+1.50'),
        ('few_44_ekd', '32'): ('few_44_alone', '-1.00'), ('few_44_ekd', '8'): ('few_alone', '+2.00'),
        ('ekd_late', '14'): ('alone_late', '+1.00'), ('ekd_late', '8'): ('alone', '+0.25'),
    }
    assert {key: (found[key]['against'], found[key]['gain']) for key in expected} == expected
    assert all(found[key]['gain_standard_error'] == '' for key in expected)  # of one seed
    assert (tmp_path / 'results/some.png').stat().st_size > 10_000


def test_the_verdict_is_that_of_the_protocol(modules):
    """Catches another margin or side, pairs of other seeds, and p-values that Holm's correction is not over all of."""
    gains = {20: (0.1, -0.3, 0.0, -0.1, 0.2), 8: (0.5, 0.9, 0.7, 0.4, 1.0)}
    rows = [
        {'experiment': 'promise_cifar10_2500', 'method': method, 'depth': depth, 'seed': seed,
         'top1': 60.0 + seed + gains[depth][seed] * (method == 'ekd')}
        for depth in gains for seed in range(5) for method in ('alone', 'ekd', 'joint')]
    assert modules.results.verdict_rows([row for row in rows if row['seed'] < 4]) == []  # not all were run
    full, sub = modules.results.verdict_rows([*rows, rows[0] | {'experiment': 'other'}])
    assert (full['depth'], full['margin'], full['gain'], sub['depth'], sub['margin'], sub['gain']) == (
        20, -0.2, '-0.02', 8, 0.0, '+0.70')
    # t = 0.18 / (0.1924 / sqrt(5)) = 2.092 and 0.7 / (0.2550 / sqrt(5)) = 6.139 with 4 degrees of freedom
    assert (full['holds'], sub['holds'], full['fails']) == ('0.0523', '0.0018', '0.9477')
    assert (full['holds_by_holm'], sub['holds_by_holm']) == ('0.0523', '0.0036')


def test_seeds_of_a_method_had_the_same_arguments():
    """Catches a mean over runs of which some had other defaults."""
    first, compared = {}, 0
    for path in sorted(ROOT.glob('results/*/*-*.json')):
        name, seed = path.stem.rpartition('-')[::2]
        arguments = json.loads(path.read_text(encoding='utf-8'))['arguments']
        assert str(arguments.pop('seed')) == seed
        expected = first.setdefault((path.parent.name, name), arguments)
        compared += expected is not arguments
        for key in expected.keys() & arguments.keys():  # later versions have more
            assert expected[key] == arguments[key], f'{path}: {key}'
    assert compared > 50


def test_files_are_those_of_the_runs(modules, tmp_path, monkeypatch):
    """Catches CSV files and a model card that were edited by hand, or are older than a run."""
    results, model_card = modules.results, modules.model_card
    monkeypatch.setattr(results, 'RESULTS', ROOT / 'results')
    rows = list(results.run_rows(results.load_experiments()))
    for name, make in ('runs.csv', list), ('summary.csv', results.summary_rows), ('verdict.csv', results.verdict_rows):
        results.write_csv(tmp_path / name, make(rows))
        assert (tmp_path / name).read_bytes() == (ROOT / 'results' / name).read_bytes(), 'run benchmarks/results.py'
    for place in {'RESULTS': ROOT / 'results', 'ROOT': tmp_path, 'WEIGHTS': ROOT / 'timm_ddnn/models/tags'}.items():
        monkeypatch.setattr(model_card, *place)
    model_card.main()
    card = (tmp_path / 'MODEL_CARD.md').read_text(encoding='utf-8')
    assert card == (ROOT / 'MODEL_CARD.md').read_text(encoding='utf-8'), 'run benchmarks/model_card.py'


@pytest.mark.parametrize(('page', 'heading', 'experiments', 'count'), [
    ('README.md', 'What to expect', ['promise_cifar10_2500'], 6),
    ('results/README.md', 'At equal cost', ['promise_cifar10_2500'], 6),
    ('results/README.md', 'What was found', ['cifar10_resnet20'], 12),
    ('results/README.md', 'What failed', ['cifar10_resnet20', 'cifar10_resnet56', 'tiny_imagenet_resnet34',
                                          'tiny_imagenet_resnet50'], 70),
])
def test_numbers_in_tables_are_in_the_summary(page, heading, experiments, count):
    """Catches a slip of the pen: a cell `84.65 ± 0.09` or `-0.96 ± 0.23` that no row of summary.csv has."""
    known = set()
    for row in read_csv(ROOT / 'results/summary.csv'):
        if row['experiment'] in experiments:
            for value, error in ('top1', 'standard_error'), ('gain', 'gain_standard_error'):
                known.add(f'{row[value]} ± {row[error]}' if row[error] else row[value])
    text = (ROOT / page).read_text(encoding='utf-8')
    section = re.search(rf'^## {heading}.*?(?=^## )', text, re.DOTALL | re.MULTILINE)[0]
    cells = [cell.strip() for line in section.splitlines() if line.startswith('|') for cell in line.split('|')[1:-1]]
    numbers = [cell for cell in cells if re.fullmatch(r'[-+]?\d+\.\d\d( ± \d\.\d\d)?', cell)]
    assert len(numbers) >= count and not set(numbers) - known
