"""The experiment runner does each run once and keeps it, on the images and by the methods that are meant."""
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import datasets
import pyarrow.parquet as pq
import pytest
import timm
import torch
from helpers.image_files import CLASS_NAMES, png, write_parquet
from helpers.models import create
from helpers.small_models import make_model
from helpers.training import ROOT
from safetensors.torch import load_file
from timm.data import resolve_data_config

import timm_ddnn
from timm_ddnn.evaluation.predict import evaluate
from timm_ddnn.hub import save
from timm_ddnn.train.signals import EXIT_STOPPED
from timm_ddnn.utils import costs
from timm_ddnn.utils.errors import InputError


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


@pytest.mark.slow
def test_runs_are_done_once_and_make_a_tag(modules, monkeypatch, tmp_path, capfd):
    """Catches a run that is repeated or lost, a teacher that does not teach, a tag without its accuracy."""
    experiments = modules.experiments
    write_parquet(tmp_path / 'data/digits/train.parquet', list(range(96)))
    write_parquet(tmp_path / 'data/digits/validation.parquet', list(range(96, 128)))
    runs = make_runs(modules.matrix)
    monkeypatch.setattr(experiments, 'all_runs', lambda: runs)
    command = ['experiments.py', str(tmp_path / 'data'), '--only']

    monkeypatch.setattr('sys.argv', [*command, 'some/kd-8-0'])
    with pytest.raises(SystemExit, match='not done: some/kd-8-0'):
        experiments.main()
    assert 'some/kd-8-0 waits for some/alone-14-0' in capfd.readouterr().out

    monkeypatch.setattr('sys.argv', [*command, 'some/alone-14-0', '--time-limit', '1'])
    with pytest.raises(SystemExit, match=str(EXIT_STOPPED)):
        experiments.main()
    assert 'failed' not in capfd.readouterr().out
    assert not (tmp_path / 'results').exists()

    monkeypatch.setattr('sys.argv', [*command, 'some/*', '--jobs', '2'])
    monkeypatch.chdir(tmp_path)  # runs go on from another directory than the one they began in
    experiments.main()
    results = {path.stem: json.loads(path.read_text()) for path in (tmp_path / 'results/some').glob('*.json')}
    assert sorted(results) == ['alone-14-0', 'ekd-0', 'kd-8-0']
    assert [row['depth'] for row in results['ekd-0']['depths']] == [14, 8]
    assert results['ekd-0']['history'][0]['train_ce_8'] > 0
    assert results['kd-8-0']['history'][0]['train_kl_8'] > 0  # the teacher's, since there is no sub-net
    assert results['kd-8-0']['teacher'] == 'some/alone-14-0'
    assert str(tmp_path) not in json.dumps(results)
    # Three forwards of 96 images in three batches; the frozen teacher of kd-8 has one more, and its own training
    macs = {name: [row['macs'] for row in result['depths']] for name, result in results.items()}
    full, = macs['alone-14-0']
    assert results['alone-14-0']['training_macs'] == 3 * 96 * full
    assert results['alone-14-0']['teacher_training_macs'] == 0
    assert results['kd-8-0']['training_macs'] == 96 * (3 * macs['kd-8-0'][0] + full)
    assert results['kd-8-0']['teacher_training_macs'] == 3 * 96 * full
    assert 3 * 96 * max(macs['ekd-0']) < results['ekd-0']['training_macs'] < 3 * 96 * sum(macs['ekd-0'])
    assert all(2 ** 28 < result['peak_memory'] < 2 ** 33 for result in results.values())
    assert experiments.evaluate_test(tmp_path / 'work/some/ekd-0', tmp_path / 'data/digits', 'no') == {}
    write_parquet(tmp_path / 'tested/train.parquet', list(range(8)))
    write_parquet(tmp_path / 'tested/test.parquet', list(range(96, 128)))
    tested = experiments.evaluate_test(tmp_path / 'work/some/ekd-0', tmp_path / 'tested', 'no')
    assert tested == {key: results['ekd-0'][key] for key in ('validation_images', 'depths')}  # the same images

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*') if path.is_file()}
    capfd.readouterr()
    experiments.main()
    assert capfd.readouterr().out == ''
    assert before == {path: path.stat().st_mtime_ns for path in before}

    make_tag = modules.make_tag
    monkeypatch.setattr(make_tag, 'all_runs', lambda: runs)
    monkeypatch.setattr('sys.argv', ['make_tag.py', str(tmp_path / 'data'), 'some/ekd-0'])
    weights = tmp_path / 'work/some/ekd-0/model.safetensors'
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match='must have the SHA-256 '):
        make_tag.main()
    assert not (tmp_path / 'weights').exists()
    weights.write_bytes(content)
    make_tag.main()
    config = json.loads((tmp_path / 'weights/ddnn_resnet20.ekd/config.json').read_text())
    measured = json.loads((tmp_path / 'results/weights/ddnn_resnet20.ekd/evaluation.json').read_text())
    assert config['label_names'] == CLASS_NAMES
    assert [row['top1'] for row in config['depths']] == [row['top1'] for row in measured['depths']]
    assert measured['run'] == 'some/ekd-0' and measured['images'] == 32
    trained, tag = load_file(weights), load_file(tmp_path / 'weights/ddnn_resnet20.ekd/model.safetensors')
    assert all(torch.equal(trained[name], tag[name]) for name in trained)
    monkeypatch.setattr(make_tag, 'FLOAT16_FROM', 0)
    make_tag.main()
    folder = tmp_path / 'weights/ddnn_resnet20.ekd'
    tag = load_file(folder / 'model.safetensors')
    assert {(value.ndim > 1, value.dtype) for name, value in tag.items() if name.endswith('weight')} == {
        (True, torch.float16), (False, torch.float32)}
    again = timm.create_model(f'local-dir:{folder}', pretrained=True).state_dict()
    assert all(v.dtype != torch.float16 for v in again.values())
    assert all(torch.allclose(again[name], trained[name], atol=2e-3) for name in trained)

    monkeypatch.setattr('sys.argv', ['make_tag.py', str(tmp_path / 'data'), 'some/ekd-1'])
    with pytest.raises(ValueError, match=r"RUN must be a run whose result is in .*, got 'some/ekd-1'"):
        make_tag.main()

    # Weights that are not those of the kept result do not teach
    kept, weights = tmp_path / 'results/some/kd-8-0.json', tmp_path / 'work/some/alone-14-0/model.safetensors'
    result, content = kept.read_bytes(), weights.read_bytes()
    kept.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setattr('sys.argv', [*command, 'some/kd-8-0'])
    with pytest.raises(InputError, match=r'alone-14-0/model.safetensors must have the SHA-256 '):
        experiments.main()
    weights.write_bytes(content)
    kept.write_bytes(result)

    # Options that change make another run of the same name, which may not teach either
    runs['some/alone-14-0'].options['--lr'] = '0.02'
    kept = tmp_path / 'results/some/kd-8-0.json'
    content = kept.read_bytes()
    kept.unlink()
    monkeypatch.setattr('sys.argv', [*command, 'some/kd-8-0'])
    with pytest.raises(InputError, match=r"alone-14-0.json is of another run .* it must have {'--lr': '0.02'}"):
        experiments.main()
    kept.write_bytes(content)
    del runs['some/alone-14-0'].options['--lr']

    runs['some/ekd-0'].options['--lr'] = '0.01'
    monkeypatch.setattr('sys.argv', [*command, 'some/*'])
    for kept in ('results/some/ekd-0.json', 'work/some/ekd-0/run.json'):
        message = rf"{kept} is of another run of this name, it must have {{'--lr': '0.01'}}"
        with pytest.raises(InputError, match=message):
            experiments.main()
        (tmp_path / kept).unlink()


def test_a_net_is_taught_as_soon_as_its_teacher_is_done(modules, monkeypatch, tmp_path):
    """Catches a net that waits for runs which do not teach it, or does not wait for its teacher."""
    experiments = modules.experiments
    runs = make_runs(modules.matrix)
    ended, taught = [], threading.Event()

    def do(runner, run):
        if run.teacher:
            taught.set()
        else:
            assert run.name != 'some/ekd-0' or taught.wait(30)
            time.sleep(0.2)
        ended.append(run.name)

    monkeypatch.setattr(experiments, 'all_runs', lambda: runs)
    monkeypatch.setattr(experiments.Runner, 'do', do)
    monkeypatch.setattr('sys.argv', ['experiments.py', str(tmp_path), '--jobs', '3'])
    with pytest.raises(SystemExit, match='not done'):
        experiments.main()
    assert ended == ['some/alone-14-0', 'some/kd-8-0', 'some/ekd-0']


def test_training_holds_its_run_when_the_runner_is_gone(modules, monkeypatch, tmp_path):
    """Catches a second runner that trains into the folder of a run that still goes on."""
    experiments = modules.experiments
    monkeypatch.setattr(experiments, 'SCRIPT', tmp_path / 'sleep.py')
    experiments.SCRIPT.write_text('import time; time.sleep(60)')
    runner = experiments.Runner({}, tmp_path, threads=1)
    run = modules.matrix.Run('some/ekd-0', 'digits', 0, {})
    folder = tmp_path / 'run'
    with ThreadPoolExecutor() as pool:
        with experiments.locked(folder) as lock:
            mine = os.dup(lock)
            training = pool.submit(runner.train, run, folder, None, mine)
            while not runner.processes:
                assert not training.done(), training.exception()
                time.sleep(0.01)
        os.close(mine)  # as when the runner is killed: what it held is closed
        try:
            with experiments.locked(folder) as other:
                assert other is None
        finally:
            runner.stop()
        assert training.result() is None
    with experiments.locked(folder) as other:
        assert other is not None


def test_results_are_of_the_runs_that_the_runner_has(modules):
    """Catches an option that was changed without the runs that it changes."""
    experiments = modules.experiments
    runs = modules.matrix.all_runs()
    found = {f'{path.parent.name}/{path.stem}': path for path in (ROOT / 'results').glob('*/*-*.json')}
    # Of earlier versions, whose options are no more
    earlier = {
        name for name, path in found.items()
        if {'--full-net-updates', '--initial-checkpoint'} & json.loads(path.read_text())['options'].keys()}
    assert len(earlier) == 25
    for name in found.keys() - earlier - {'tuning/first_lr_0.1_wd_5e-4-0'}:
        experiments.check(runs[name], found[name])


@pytest.mark.slow
def test_a_net_is_cut_with_statistics_of_its_own(modules, monkeypatch, tmp_path):
    """Catches a cut net that keeps the statistics of the whole one, or whose calibration changes the full-net."""
    experiments = modules.experiments
    write_parquet(tmp_path / 'data/train.parquet', list(range(128)))
    write_parquet(tmp_path / 'data/validation.parquet', list(range(64)))
    teacher = create('ddnn_resnet20', subnets=(), num_classes=10)
    (tmp_path / 'teacher').mkdir()
    save.save_model(
        teacher, tmp_path / 'teacher', data_config=resolve_data_config(model=teacher), class_names=CLASS_NAMES,
        rows=costs.count_costs(teacher, (3, 32, 32)))
    models = []

    def keep_model(accelerator, model, loader):
        models.append(model)
        return evaluate(accelerator, model, loader)

    monkeypatch.setattr(experiments, 'evaluate', keep_model)
    run = modules.matrix.Run('some/truncation-0', 'digits', 0, {'--model': 'ddnn_resnet20'}, 'some/alone-20-0', True)
    summary, history = experiments.truncate(run, tmp_path / 'teacher', tmp_path / 'data')
    assert [row['depth'] for row in summary['depths']] == [20, 14, 8] and history == []
    assert summary['validation_images'] == 64
    cut, = models
    whole, nets = teacher.state_dict(), {depth: cut.extract(depth).state_dict() for depth in cut.depths}
    differ = {
        depth: {name for name, tensor in net.items() if not torch.equal(tensor, whole[name])}
        for depth, net in nets.items()
    }
    assert not differ[20]
    for depth in (14, 8):
        assert {name.rsplit('.', 1)[1] for name in differ[depth]} == {
            'running_mean', 'running_var', 'num_batches_tracked'}
        assert 'bn1.running_mean' not in differ[depth]  # before the nets part


@pytest.mark.parametrize('name', ['cifar10', 'cifar10_10k', 'cifar10_2500'])
def test_judged_images_are_seen_in_the_end_alone(modules, tmp_path, name):
    """Catches a judged image that is evaluated after every epoch, or chosen by, and one that is trained on."""
    for split, first, count in ('train', 0, 50_000), ('validation', 50_000, 5_000):
        write_parquet(
            tmp_path / f'cifar10/{split}.parquet', [], labels=list(range(first, first + count)),
            files=[png(0)] * count, target=datasets.Value('int64'))
    tuning, judged = (
        {path.stem: set(pq.read_table(path)['label'].to_pylist()) for path in folder.glob('*.parquet')}
        for folder in (modules.experiments.data_folder(f'{name}_{kind}', tmp_path) for kind in ('tuning', 'judged')))
    assert judged['test'] == set(range(50_000, 55_000))
    assert tuning['train'] == judged['train'] and tuning['validation'] == judged['validation'] < tuning['test']
    assert not tuning['train'] & tuning['test'] and max(tuning['train'] | tuning['test']) < 50_000
    assert len(tuning['validation']) == 500


def test_the_images_that_options_are_chosen_on_are_apart(modules, tmp_path):
    """Catches an image that is trained on and tested on as well."""
    experiments = modules.experiments
    write_parquet(
        tmp_path / 'cifar10/train.parquet', [], labels=list(range(50_000)), files=[png(0)] * 50_000,
        target=datasets.Value('int64'))
    write_parquet(tmp_path / 'cifar10/validation.parquet', list(range(8)), target=datasets.Value('int64'))
    folder = experiments.data_folder('cifar10_part', tmp_path)
    rows = {path.stem: pq.read_table(path)['label'].to_pylist() for path in folder.glob('*.parquet')}
    assert {name: len(set(labels)) for name, labels in rows.items()} == {
        'train': 15_000, 'few': 5_000, 'validation': 5_000, 'test': 30_000}
    assert set(rows['few']) < set(rows['train'])
    assert len({*rows['train'], *rows['validation'], *rows['test']}) == 50_000
    assert experiments.data_folder('tiny_imagenet', tmp_path) == tmp_path / 'tiny_imagenet'


def test_an_average_of_the_weights_teaches(modules, monkeypatch):
    """Catches a teacher that is the net in training, one that stays as it began, and one that is trained itself."""
    monkeypatch.setattr('sys.argv', ['train_method.py', '--average-teacher', '0.25'])
    method = modules.train_method.parse_args()
    model = make_model().train()
    full, *subnets = model.depths
    task = modules.train_method.MethodTask(model, method=method, alpha=0.3, beta=0.1, verbose=False)
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    weight, values = model.get_classifier().weight, []
    for _ in range(3):  # the average begins as the net at the second update
        terms = task(images, target)
        values.append(weight.detach().clone())
        weight.data = torch.randn_like(weight)
    teacher = task.average.module
    torch.testing.assert_close(teacher.get_classifier().weight, 0.25 * values[1] + 0.75 * values[2])
    weight.data = values[2]
    with torch.no_grad():
        outputs = model(images, depth='all')
        taught = task.loss_fn.terms({**outputs, full: teacher(images, depth=(full,))[full]}, target)
        alone = task.loss_fn.terms(outputs, target)
    for depth in subnets:
        assert terms[f'kl_{depth}'] == pytest.approx(taught[f'kl_{depth}'].item(), rel=1e-4)
        assert terms[f'kl_{depth}'] != pytest.approx(alone[f'kl_{depth}'].item(), rel=1e-2)
    assert terms[f'ce_{full}'] == pytest.approx(alone[f'ce_{full}'].item(), rel=1e-4)
    loss = taught['loss'] - taught[f'ce_{full}'] + alone[f'ce_{full}']
    assert terms['loss'].item() == pytest.approx(loss.item(), rel=1e-4)
    terms['loss'].backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_there_is_one_teacher(modules, monkeypatch, capsys):
    """Catches two teachers, of which one is passed over in silence."""
    for option in '--teacher=some', '--ema-teacher', '--frozen-teacher', '--full-net-epochs=1':
        monkeypatch.setattr('sys.argv', ['train_method.py', '--average-teacher', '0.9', option])
        with pytest.raises(SystemExit, match='2'):
            modules.train_method.parse_args()
        message = '--average-teacher must be without a teacher or --full-net-epochs, got 0.9'
        assert message in capsys.readouterr().err


def test_without_options_of_its_own_a_method_is_that_of_the_library(modules, monkeypatch):
    """Catches a term that is left out, or taken twice, with and without another teacher."""
    monkeypatch.setattr('sys.argv', ['train_method.py'])
    method = modules.train_method.parse_args()
    model, options = make_model().train(), dict(alpha=0.5, beta=2.0, temperature=4.0, verbose=False)
    mine = modules.train_method.MethodTask(model, method=method, **options)
    expected = timm_ddnn.EKDTask(model, **options)
    images, target = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for teacher in (None, make_model()):
        mine.set_teacher(teacher)
        expected.set_teacher(teacher)
        terms = mine(images, target)
        assert terms.keys() == expected(images, target).keys()
        for name, value in expected(images, target).items():
            torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)
