"""The choice of a depth from a profile."""
import copy
import json
import math
import random

import pytest

from timm_ddnn.deploy.choose import NoDepthError, percentile_90, profile_rows, read_accuracies, select_depth
from timm_ddnn.deploy.profile import compare_machines
from timm_ddnn.utils.environment import describe_machine
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.main import main

COSTS = {50: 20.0, 26: 12.0, 14: 7.0}


def measurement(depth, median, memory, **setting):
    setting = {'runtime': 'eager', 'batch_size': 1, 'threads': 1, **setting}
    return {'depth': depth, **setting, 'median_ms': median, 'p90_ms': 1.5 * median, 'runs': 20, 'compile_s': None,
            'memory_mb': memory}


@pytest.fixture
def profile():
    return {
        'architecture': 'ddnn_resnet50',
        'depths': [
            {'depth': 50, 'macs': 4_000_000_000, 'top1': 80.0},
            {'depth': 26, 'macs': 2_300_000_000, 'top1': 75.0},
            {'depth': 14, 'macs': 1_400_000_000, 'top1': 70.0},
        ],
        'measurements': [
            *(measurement(d, c, 2 * d) for d, c in COSTS.items()),
            *(measurement(d, 4 * c, 3 * d, batch_size=8, threads=2) for d, c in COSTS.items()),
            *(measurement(d, c / 2, d, runtime='onnxruntime') for d, c in COSTS.items()),
        ],
        **describe_machine(),
    }


@pytest.fixture
def choose(profile, tmp_path, capsys):
    """Run the command on the profile; -> exit status, output, lines of errors."""
    def run(*args, content=None):
        path = tmp_path / 'profile.json'
        path.write_text(json.dumps(profile) if content is None else content)
        status = 0
        try:
            main(['choose', '--profile', str(path), *map(str, args)])
        except SystemExit as e:
            status = e.code
        captured = capsys.readouterr()
        return status, captured.out, [line for line in captured.err.splitlines() if line.startswith(('err', 'WARN'))]
    return run


# Choice

def test_percentile():
    """Catches another rank: 90 % of the values are not greater, and of no lesser value is that so."""
    generator = random.Random(0)
    for count in range(1, 60):
        values = [generator.random() for _ in range(count)]
        fitting = [v for v in values if sum(w <= v for w in values) >= 0.9 * count]
        assert percentile_90(values) == min(fitting)


def test_choice_is_the_best_of_those_that_fulfil_all(profile):
    """Catches limits that are left out, compared the wrong way or with another column, and another order of choice."""
    generator = random.Random(1)
    outcomes, ties = set(), 0
    for _ in range(500):
        content = copy.deepcopy(profile)
        known = generator.random() < 0.7
        for row in content['depths']:
            row['top1'] = generator.choice([70.0, 75.0, 75.0, 80.0]) if known else None
        limits = {
            'latency_ms': generator.choice([None, generator.uniform(5, 40)]),
            'macs': generator.choice([None, generator.uniform(1e9, 5e9)]),
            'memory_mb': generator.choice([None, generator.uniform(20, 120)]),
            'min_top1': generator.choice([None, generator.uniform(60, 85)]) if known else None,
        }
        if all(limit is None for limit in limits.values()):
            continue
        fitting, costs_of = [], {row['depth']: row for row in content['depths']}
        for measured in content['measurements']:
            costs = costs_of[measured['depth']]
            values = (measured['p90_ms'], costs['macs'], measured['memory_mb'])
            most = (limits['latency_ms'], limits['macs'], limits['memory_mb'])
            ok = all(limit is None or value <= limit for value, limit in zip(values, most, strict=True))
            if ok and (limits['min_top1'] is None or costs['top1'] >= limits['min_top1']):
                per_image = measured['median_ms'] / measured['batch_size']
                fitting.append((costs['top1'], per_image, measured['depth'], measured['runtime']))
        alone = [name for name, limit in limits.items() if limit is not None] == ['min_top1']
        if not fitting:
            with pytest.raises(NoDepthError):
                select_depth(content, **limits)
        else:
            if alone:
                best = fitting
            elif known:
                best = [row for row in fitting if row[0] == max(top1 for top1, *_ in fitting)]
            else:
                best = [row for row in fitting if row[2] == max(depth for *_, depth, _ in fitting)]
            top1, _, depth, runtime = min(best, key=lambda row: row[1])
            choice = select_depth(content, **limits)
            assert (choice.depth, choice.row['runtime']) == (depth, runtime)
            equal = {row[2] for row in fitting if known and row[0] == top1} - {depth}
            assert choice.ties == sorted(equal, reverse=True)
            ties += bool(equal)
        outcomes.add((alone, known, len({depth for *_, depth, _ in fitting})))
    assert len(outcomes) >= 9 and ties > 20


def test_choice_shows_what_it_was_made_from(profile):
    """Catches a row that is left out, a limit that it is beyond and that is not named, and a reason of another rule."""
    choice = select_depth(profile, latency_ms=25, memory_mb=50, runtime='eager', batch_size=1)
    assert (choice.depth, choice.reason, choice.ties) == (14, 'highest top-1, 70.00 %', [])
    assert choice.row['memory_mb'] == 28 and choice.row['macs'] == 1_400_000_000
    assert [(row['depth'], row['beyond']) for row in choice.rows] == [
        (50, ['latency_ms', 'memory_mb']), (26, ['memory_mb']), (14, [])]
    assert choice.row is choice.rows[2]
    assert select_depth(profile, min_top1=60).reason == 'least latency per image'
    for row in profile['depths']:
        del row['top1']
    assert select_depth(profile, macs=1e10).reason == 'most layers, no accuracy is known'
    with pytest.raises(InputError, match='min_top1 needs a profile or an evaluation with top1'):
        select_depth(profile, min_top1=60)


def test_nearest_depth_is_named(profile):
    """Catches a nearest depth by the sum of what is exceeded, or by latency alone."""
    eager = dict(runtime='eager', batch_size=1)
    with pytest.raises(NoDepthError, match=r'nearest is depth 14 \(eager\): p90_ms 10\.5') as error:
        select_depth(profile, latency_ms=1, **eager)
    assert error.value.nearest['depth'] == 14
    with pytest.raises(NoDepthError) as error:
        select_depth(profile, latency_ms=15, min_top1=79, **eager)  # 50: 100 % too slow, 26: 20 and 5 % off, 14: 11 %
    assert error.value.nearest['depth'] == 14
    with pytest.raises(NoDepthError) as error:
        select_depth(profile, latency_ms=17.5, min_top1=79, **eager)
    assert error.value.nearest['depth'] == 26
    with pytest.raises(NoDepthError) as error:
        select_depth(profile, latency_ms=0, **eager)
    assert error.value.nearest['depth'] == 14


def test_setting_is_that_asked_for(profile):
    """Catches measurements of another batch size, number of threads or runtime."""
    assert [row['median_ms'] for row in profile_rows(profile)] == [20, 80, 10, 12, 48, 6, 7, 28, 3.5]
    assert [row['median_ms'] for row in profile_rows(profile, runtime='eager', threads=1)] == [20, 12, 7]
    assert [row['median_ms'] for row in profile_rows(profile, runtime='onnxruntime')] == [10, 6, 3.5]
    assert [row['memory_mb'] for row in profile_rows(profile, batch_size=8, threads=2)] == [150, 78, 42]
    assert select_depth(profile, latency_ms=20, runtime='eager').depth == 26
    assert select_depth(profile, latency_ms=20).row['runtime'] == 'onnxruntime'
    with pytest.raises(ValueError, match='batch_size must be one that was measured, 1, 8, got 4'):
        profile_rows(profile, batch_size=4)
    with pytest.raises(ValueError, match='no depth was measured with'):
        profile_rows(profile, batch_size=8, threads=1)


def test_accuracies_take_the_place_of_those_in_the_profile(profile, caplog):
    """Catches an evaluation without effect, or one that lacks a depth, and a depth that is dropped unsaid."""
    accuracies = {50: 60.0, 26: 61.0, 14: 50.0}
    assert select_depth(profile, macs=1e10).depth == 50
    profile['depths'][0]['top1'] = None
    assert select_depth(profile, macs=1e10).depth == 26  # the best that is known
    assert 'the accuracy of depths [50] is not known' in caplog.text
    assert select_depth(profile, macs=1e10, accuracies=accuracies).depth == 26
    with pytest.raises(ValueError, match=r'\[14\] are not in \[50, 26\]'):
        select_depth(profile, macs=1e10, accuracies={50: 1, 26: 1})


@pytest.mark.parametrize('limits, message', [
    ({}, 'a limit is expected'), ({'latency_ms': -1}, 'latency_ms must be a number .* got -1'),
    ({'macs': math.nan}, 'got nan'), ({'memory_mb': '5'}, "got '5'"),
])
def test_wrong_limits_are_refused(profile, limits, message):
    """Catches a limit that every depth or none fulfils by accident."""
    with pytest.raises(ValueError, match=message) as error:
        select_depth(profile, **limits)
    assert not isinstance(error.value, NoDepthError)


# Command

def test_command_prints_the_table_and_the_choice(choose, monkeypatch):
    """Catches a command that does not run as documented, a table that does not fit, or JSON that is not."""
    monkeypatch.setenv('COLUMNS', '80')
    status, out, errors = choose('--latency-ms', 20, '--runtime', 'eager')
    assert (status, errors) == (0, [])
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split() for line in out.splitlines()]
    assert ['*', '26', 'eager', '1', '1', '18.00', '52.0', '2.30', 'G', '75.00'] in rows
    assert ['50', 'eager', '1', '1', '30.00', '100.0', '4.00', 'G', '80.00', 'latency'] in rows
    assert out.splitlines()[-1] == 'depth 26 (eager, batch of 1, threads 1): highest top-1, 75.00 %'
    status, out, _ = choose('--latency-ms', 20, '--json')
    result = json.loads(out)
    assert result['depth'] == result['row']['depth'] == 50 and result['row']['p90_ms'] == 15
    assert result['reason'] == 'highest top-1, 80.00 %' and len(result['rows']) == 9


def test_command_names_ties(choose, profile):
    """Catches a depth that passes for the better one where another is as accurate."""
    profile['depths'][0]['top1'] = 75.0
    _, out, _ = choose('--macs', 1e10)
    assert out.splitlines()[-1] == 'as accurate and slower: depth 50'


def test_evaluation_file(choose, tmp_path):
    """Catches another key than 'depths', an evaluation without effect, and one without accuracies that is taken."""
    path = tmp_path / 'evaluation.json'
    rows = [{'depth': d, 'top1': t} for d, t in ((50, 60.0), (26, 65.0), (14, 50.0))]
    path.write_text(json.dumps({'architecture': 'ddnn_resnet50', 'depths': rows}))
    status, out, errors = choose('--macs', 1e10, '--evaluation', path)
    assert status == 0 and '\ndepth 26 (' in out
    assert read_accuracies(path, 'ddnn_resnet50') == {50: 60.0, 26: 65.0, 14: 50.0}
    path.write_text(json.dumps({'depths': [{'depth': 50}]}))
    status, out, errors = choose('--macs', 1e10, '--evaluation', path)
    assert status == 2 and not out and 'depths[0] in' in errors[0] and "an object with 'top1'" in errors[0]


def test_accuracies_of_something_else_are_named(tmp_path, caplog):
    """Catches an evaluation of another model, or of other images, that nobody is told of."""
    path = tmp_path / 'evaluation.json'
    content = {
        'architecture': 'ddnn_resnet101', 'model': 'mine', 'input_size': [3, 64, 64],
        'depths': [{'depth': 50, 'top1': 60}],
    }
    path.write_text(json.dumps(content))
    read_accuracies(path, 'ddnn_resnet101', (3, 64, 64), 'mine')
    assert not caplog.text
    read_accuracies(path, 'ddnn_resnet101', (3, 64, 64), 'yours')
    assert "accuracy for model 'mine', the costs are for 'yours'" in caplog.text
    caplog.clear()
    read_accuracies(path, 'ddnn_resnet50', (3, 64, 64))
    assert 'ddnn_resnet101' in caplog.text and 'ddnn_resnet50' in caplog.text and '64' not in caplog.text
    read_accuracies(path, 'ddnn_resnet101', (3, 32, 32))
    assert 'input_size [3, 64, 64], the costs are for [3, 32, 32]' in caplog.text


def test_status_3_where_no_depth_fulfils(choose):
    """Catches a script that goes on with a depth which is not what was asked for."""
    status, out, errors = choose('--latency-ms', 1, '--runtime', 'eager', '--json')
    assert (status, out) == (3, '')
    assert errors == ['error: no depth is within latency_ms 1; the nearest is depth 14 (eager): p90_ms 10.5']


@pytest.mark.parametrize('args, content, message', [
    ([], None, 'a limit must be given by --latency-ms, --macs, --memory-mb or --min-top1, got none'),
    (['--latency-ms', 'x'], None, "must be a number of at least 0, got 'x'"),
    (['--latency-ms', '1', '--batch-size', '3'], None, 'batch_size must be one that was measured, 1, 8, got 3'),
    (['--latency-ms', '1', '--evaluation', '/nowhere'], None, "or a training run wrote, got '/nowhere'"),
    (['--latency-ms', '1', '--profile', '/nowhere'], None, "`timm-ddnn profile` wrote, got '/nowhere'"),
    (['--latency-ms', '1'], 'PNG', 'profile.json must be JSON'),
    (['--latency-ms', '1'], '[1]', 'profile.json must be an object, got [1]'),
    (['--latency-ms', '1'], '{}', "profile.json must be an object with 'depths'"),
])
def test_wrong_input_is_one_line(choose, args, content, message):
    """Catches a traceback, another exit status, or a message that does not name what is wrong."""
    status, out, errors = choose(*args, content=content)
    assert (status, out, len(errors)) == (2, '', 1)
    assert message in errors[0]


DAMAGES = [None, 'x' * 10 ** 6, -1, math.nan, 10 ** 400, [], {}, True]


def test_damaged_profiles_are_one_line(profile, choose):
    """Catches a traceback, or a choice, for a file of which any part is of another kind or missing."""
    text = json.dumps(profile)
    refused = 0
    for part in ('depths', 'measurements'):
        for key in (*profile[part][0], None):
            for damage in (*DAMAGES, 'missing'):
                content = json.loads(text)
                place = content if key is None else content[part][1]
                place[part if key is None else key] = damage
                if damage == 'missing':
                    del place[part if key is None else key]
                status, out, errors = choose('--latency-ms', '20', content=json.dumps(content))
                assert (status in (0, 2, 3)) and len(errors) <= 1 and all(len(line) < 3000 for line in errors)
                assert status == 0 or not out
                refused += status == 2
    assert refused > 80
    few = json.dumps(profile | {'measurements': [row for row in profile['measurements'] if row['depth'] != 14]})
    for content in ('[' * 10 ** 5, '1' * 10 ** 5, text[:-100], few, text.replace('"depth": 26', '"depth": 27', 1)):
        status, out, errors = choose('--latency-ms', '20', content=content)
        assert (status, out, len(errors)) == (2, '', 1)


def test_a_number_that_nobody_reads_is_passed_on(profile, choose):
    """Catches a traceback from writing as JSON what is no JSON."""
    content = json.dumps(profile).replace('"depth"', '"other": NaN, "depth"')
    status, out, _ = choose('--latency-ms', '20', '--json', content=content)
    assert status == 0 and json.loads(out)['row']['other'] == 'NaN'


def test_profile_of_another_machine(profile, caplog, choose):
    """Catches a profile of other hardware or another version that passes for one of this machine, and false alarms."""
    assert compare_machines(profile) == []
    profile['versions']['torch'] = '1.0'
    profile['versions']['python'] = '2.7'  # not what runs the nets
    profile['hardware']['cpu'] = 'Z80'
    differences = compare_machines(profile)
    assert len(differences) == 2
    assert "cpu 'Z80' there" in differences[0] and "torch '1.0' there" in differences[1]
    assert choose('--latency-ms', 20)[0] == 0
    assert 'Z80' in caplog.text
    del profile['hardware']
    assert "cpu 'unknown' there" in compare_machines(profile)[0]
