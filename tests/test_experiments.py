"""The experiment runner does each run once and keeps it, and the texts hold the figures that the runs have."""
import importlib
import json
import statistics

import numpy as np
import pytest
from image_files import CLASS_NAMES, write_parquet
from training import ROOT

from timm_ddnn import report
from timm_ddnn.model_card import CITATION


@pytest.fixture
def module(monkeypatch, tmp_path):
    """Import a module of benchmarks/ whose files go to a temporary folder."""
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')

    def load(name):
        module = importlib.import_module(name)
        for place in {'RESULTS', 'WORK', 'WEIGHTS'} & vars(module).keys():
            monkeypatch.setattr(module, place, tmp_path / place.lower())
        return module

    return load


def make_runs(matrix):
    options = {
        '--model': 'ddnn_resnet20', '--epochs': '1', '--img-size': '16', '-b': '32',
        '--model-kwargs': 'channels=8,16,32 layers=2,2,2', **matrix.CE_ONLY,
    }
    alone = options | {'--subnets': ''}
    shallow = alone | {'--model-kwargs': 'channels=8,16,32 layers=1,1,1'}
    return {run.name: run for run in (
        matrix.Run('some/alone-14-0', 'digits', 0, alone),
        matrix.Run('some/kd-8-0', 'digits', 0, shallow | {'--alpha': '1'}, teacher='some/alone-14-0'),
        matrix.Run('some/ekd-0', 'digits', 0, options | {'--subnets': '1,1,1'}),
    )}


def test_runs_are_done_once_and_make_a_tag(module, monkeypatch, tmp_path, capfd):
    """Catches a run that is repeated or lost, a teacher that does not teach, a tag without its accuracy."""
    experiments = module('experiments')
    write_parquet(tmp_path / 'data/digits/train.parquet', list(range(96)))
    write_parquet(tmp_path / 'data/digits/validation.parquet', list(range(96, 128)))
    runs = make_runs(module('matrix'))
    monkeypatch.setattr(experiments, 'all_runs', lambda: runs)
    command = ['experiments.py', str(tmp_path / 'data'), '--only']

    monkeypatch.setattr('sys.argv', [*command, 'some/kd-8-0'])
    with pytest.raises(SystemExit, match='not done: some/kd-8-0'):
        experiments.main()
    assert 'some/kd-8-0 waits for some/alone-14-0' in capfd.readouterr().out

    monkeypatch.setattr('sys.argv', [*command, 'some/*'])
    experiments.main()
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / 'results/some').glob('*.json')}
    assert sorted(results) == ['alone-14-0', 'ekd-0', 'kd-8-0']
    assert [row['depth'] for row in results['ekd-0']['depths']] == [14, 8]
    assert results['ekd-0']['history'][0]['train_ce_8'] > 0
    assert results['kd-8-0']['history'][0]['train_kl_8'] > 0  # the teacher's, since there is no sub-net
    assert results['kd-8-0']['teacher'] == 'some/alone-14-0'
    assert str(tmp_path) not in json.dumps(results)

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}
    experiments.main()
    assert 'begins' not in capfd.readouterr().out.split('some/ekd-0: ')[-1]
    assert before == {path: path.stat().st_mtime_ns for path in before}

    make_tag = module('make_tag')
    monkeypatch.setattr(make_tag, 'all_runs', lambda: runs)
    monkeypatch.setattr('sys.argv', ['make_tag.py', str(tmp_path / 'data'), 'some'])
    weights = tmp_path / 'work/some/ekd-0/model.safetensors'
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit, match='2'):
        make_tag.main()
    assert 'model.safetensors must have the SHA-256 ' in capfd.readouterr().err
    assert not (tmp_path / 'weights').exists()
    weights.write_bytes(content)
    make_tag.main()
    config = json.loads((tmp_path / 'weights/ddnn_resnet20.ekd_digits/config.json').read_text())
    measured = json.loads((tmp_path / 'results/weights/ddnn_resnet20.ekd_digits/evaluation.json').read_text())
    assert config['label_names'] == CLASS_NAMES
    assert [row['top1'] for row in config['depths']] == [row['top1'] for row in measured['depths']]
    assert measured['run'] == 'some/ekd-0' and measured['images'] == 32

    # Options that change make another run of the same name, which may not teach either
    runs['some/alone-14-0'].options['--lr'] = '0.02'
    kept = tmp_path / 'results/some/kd-8-0.json'
    content = kept.read_bytes()
    kept.unlink()
    monkeypatch.setattr('sys.argv', [*command, 'some/kd-8-0'])
    with pytest.raises(SystemExit, match='2'):
        experiments.main()
    assert "alone-14-0.json is of another run of this name, it must have {'--lr': '0.02'}" in capfd.readouterr().err
    kept.write_bytes(content)
    del runs['some/alone-14-0'].options['--lr']

    runs['some/ekd-0'].options['--lr'] = '0.01'
    monkeypatch.setattr('sys.argv', [*command, 'some/*'])
    for kept in ('results/some/ekd-0.json', 'work/some/ekd-0/run.json'):
        with pytest.raises(SystemExit, match='2'):
            experiments.main()
        assert f"{kept} is of another run of this name, it must have {{'--lr': '0.01'}}" in capfd.readouterr().err
        (tmp_path / kept).unlink()


def test_results_are_of_the_runs_that_the_runner_has(module):
    """Catches an option that was changed without the runs that it changes."""
    experiments = module('experiments')
    runs = module('matrix').all_runs()
    for path in (ROOT / 'results').glob('*/*-*.json'):
        experiments.check(runs[f'{path.parent.name}/{path.stem}'], path)


def write_results(folder, tops):
    """Write results of made-up runs: {(method, seed): {depth: top-1}}."""
    template = json.loads(next((ROOT / 'results').glob('*/*.json')).read_text())
    folder.mkdir(parents=True)
    for (name, seed), by_depth in tops.items():
        rows = [dict(depth=d, macs=d * 1_000_000, top1=top1, top5=100.0) for d, top1 in by_depth.items()]
        (folder / f'{name}-{seed}.json').write_text(json.dumps(template | {'depths': rows}))


def test_differences_are_of_the_same_seed_and_have_their_standard_error(module, tmp_path):
    """Catches differences of other seeds, and the deviation of runs in the place of the error of their mean."""
    results = module('results')
    module('comparison')  # which reads the runs
    alone, ekd = [80.0, 81.0, 83.0], [81.0, 81.5, 85.0]
    write_results(tmp_path / 'results/some', {
        **{('alone-8', seed): {8: top1} for seed, top1 in enumerate(alone)},
        **{('ekd', seed): {8: top1} for seed, top1 in enumerate(ekd)},
        ('joint', 0): {8: 80.5},
    })
    results.write_results()
    text = (tmp_path / 'results/README.md').read_text()
    gains = np.subtract(ekd, alone)
    error = statistics.stdev(gains) / 3 ** 0.5
    assert f'| {np.mean(gains):+.2f} ± {error:.2f} | +0.50 | 3 |' in text
    assert '| joint | 80.50 | +0.50 |  | 1 |' in text
    assert (tmp_path / 'results/some.png').stat().st_size > 10_000


def test_texts_are_those_of_the_results(monkeypatch):
    """Catches a text that was edited by hand, or is older than a run."""
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    results = importlib.import_module('results')
    written = {}
    for module in (results, report):
        monkeypatch.setattr(module, 'write_text', lambda path, text: written.update({path: text}))
    monkeypatch.setattr(results, 'save_figure', lambda *_: None)
    monkeypatch.setattr('sys.argv', ['results.py'])
    results.main()
    assert written.keys() == {ROOT / 'results/README.md', ROOT / 'MODEL_CARD.md', ROOT / 'README.md'}
    for path, text in written.items():
        assert path.read_text() == text, f'run python benchmarks/results.py: {path.name} is old'
    assert CITATION in written[ROOT / 'MODEL_CARD.md']
