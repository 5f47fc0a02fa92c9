"""What the benchmarks compare is the same work, and the figures that are published are those that were measured."""
import csv
import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
import timm
import torch
from helpers.models import create, images
from helpers.training import ROOT
from torch.utils.flop_counter import FlopCounterMode

from timm_ddnn import EKDTask
from timm_ddnn.deploy.export import export


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'benchmarks' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server():
    return load('server')


@pytest.fixture
def benchmark(monkeypatch):
    module = load('benchmark')
    monkeypatch.setattr(module, 'STEP_BATCH', {64: 2})
    monkeypatch.setattr(module, 'TRAINED', {'ddnn_resnet20': (32, 4)})
    monkeypatch.setattr(module, 'FAMILIES', [('convnext_atto', {'dims': (8, 16, 24, 32)}, 64)])
    return module


def count_flops(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_what_nets_share_is_computed_once_backward_too():
    """Catches a prefix that runs once forward and several times backward."""
    model = timm.create_model('ddnn_resnet50', device='meta').train()
    x = torch.empty(1, 3, 64, 64, device='meta')

    def backward(depths):
        sum(output.logits.sum() for output in model(x, depth=depths).values()).backward()

    with torch.no_grad():
        stem = count_flops(lambda: model.conv1(x))
        forward = count_flops(lambda: model(x, depth='all'))
        apart = sum(count_flops(lambda d=d: model(x, depth=d)) for d in model.depths)
    # As much again for the gradients of the weights, and for those of the inputs, of which the stem has none
    assert count_flops(lambda: backward('all')) == 3 * forward - stem
    assert sum(count_flops(lambda d=d: backward((d,))) for d in model.depths) == 3 * (apart - stem)
    assert forward < 0.9 * apart


@pytest.mark.parametrize('at_once', [False, True])
def test_steps_that_are_compared_give_the_same_gradients(at_once, benchmark, monkeypatch):
    """Catches a comparison with other work, and one forward for all depths that learns something else."""
    monkeypatch.setattr(benchmark, 'autocast', nullcontext)
    model = create('ddnn_resnet50', num_classes=10).train()
    task = EKDTask(model, verbose=False, alpha=0.7, beta=3.0)
    x, target = images(model, batch=4), torch.tensor([1, 7, 3, 3])
    gradients = []
    for step in (
        benchmark.ekd_step(task, x, target),
        benchmark.separate_steps(model, task.loss_fn, x, target, at_once),
    ):
        model.zero_grad()
        step()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert float(gradients[0].norm()) > 1
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_sections_from_the_command_line(benchmark, monkeypatch, tmp_path):
    """Catches a benchmark that does not run, and figures that are lost or doubled when some are measured again."""
    measured = [{'figure': 'some figure', 'case': 'one', 'ratio': 0.75, 'aim': None}]
    monkeypatch.setattr(benchmark, 'HERE', tmp_path)
    monkeypatch.setitem(benchmark.SECTIONS, 'loss', lambda args: measured)
    (tmp_path / 'README.md').write_text('before\n<!-- cpu -->\nold\n<!-- end of cpu -->\nafter\n')
    for sections in (['loss'], ['size', 'loss']):
        monkeypatch.setattr('sys.argv', ['benchmark.py', '--rounds', '3', '--only', *sections])
        benchmark.main()
    readme = (tmp_path / 'README.md').read_text(encoding='utf-8')
    assert readme.startswith('before\n<!-- cpu -->\nsize, loss: ') and readme.endswith('<!-- end of cpu -->\nafter\n')
    assert readme.count('| size of the saved model, against stock | ddnn_resnet50 | 1.00') == 1
    assert readme.count('| some figure | one | 0.750 |') == 1


def test_families_are_measured(benchmark):
    *latency, step = benchmark.SECTIONS['families'](Namespace(rounds=3))
    assert [row['case'].split(',')[0] for row in latency] == [f'convnext_atto depth {depth}' for depth in (12, 7, 5)]
    assert step['case'] == 'convnext_atto (12, 7, 5), 64 px, batch 2, eager'
    assert all(row['ratio'] > 0 and row['rounds'] == 3 for row in (*latency, step))


@pytest.mark.slow
def test_every_figure_is_measured(benchmark, monkeypatch):
    """Catches a section that fails on this device. The numbers mean nothing on so small batches, but for memory."""
    args = Namespace(rounds=3, compiled=False)
    for name in ('loss', 'step', 'training', 'ceilings', 'switching'):
        figures = [figure['ratio'] for figure in benchmark.SECTIONS[name](args)]
        assert figures and all(ratio > 0 for ratio in figures), name
    monkeypatch.setattr(benchmark, 'STEP_BATCH', {64: 32})
    figures = {figure['figure']: figure['ratio'] for figure in benchmark.SECTIONS['memory'](args)}
    assert 0.5 < figures['peak memory of the step, against held together'] < 0.95


def test_the_table_is_that_of_the_results(benchmark, server):
    """Catches a table that was edited by hand, or is of another run than the JSON beside it."""
    readme = (ROOT / 'benchmarks' / 'README.md').read_text(encoding='utf-8')
    results = sorted((ROOT / 'benchmarks' / 'results').glob('*.json'))
    assert results
    for path in results:
        table = (server if path.stem == 'server' else benchmark).table(json.loads(path.read_text(encoding='utf-8')))
        assert f'<!-- {path.stem} -->\n{table}<!-- end of {path.stem} -->' in readme


@pytest.mark.slow
def test_replay_of_a_load(server, tmp_path):
    """Catches servers that are not asked the same, latency that leaves the queue out, and a depth that stays."""
    model = create('ddnn_resnet20', layers=(6, 6, 6), subnets=((1, 1, 1),))
    row, *_ = export(model, 'all', tmp_path, format='onnx', images=images(model))
    command = [sys.executable, ROOT / 'benchmarks/server.py', row['file'], '--data', 'digits', '--seconds', '12']
    run = subprocess.run(
        [*command, '--high', '6', '--images', '32', '--output', tmp_path], capture_output=True, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / 'server.json').read_text(encoding='utf-8'))
    with open(tmp_path / 'server.csv', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    controller, full, shallow = result['servers'].values()
    assert len({found['requests'] for found in result['servers'].values()}) == 1
    assert (set(full['depths']), set(shallow['depths'])) == ({'38'}, {'8'})
    assert set(controller['depths']) == {'38', '8'}
    table = server.table(result)
    for name, found in result['servers'].items():
        late = [float(row['latency_ms']) > result['budget_ms'] for row in rows if row['server'] == name]
        assert found['late'] == pytest.approx(100 * sum(late) / len(late))
        assert f'| {name} | {found["late"]:.2f} | {found["top1"]:.2f} |' in table
    assert controller['late'] < full['late']
    assert (tmp_path / 'server.png').stat().st_size > 10_000
