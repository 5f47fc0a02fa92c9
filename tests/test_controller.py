"""The controller that moves the depth under load: in simulations, and with real latencies on a core that is loaded."""
import math
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from helpers.models import create

import timm_ddnn
from timm_ddnn.deploy.choose import percentile_90
from timm_ddnn.deploy.controller import DepthController
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.files import write_json

COSTS = {50: 20.0, 26: 12.0, 14: 7.0}


def simulate(controller, load, calls, costs=COSTS, noise=0.0, seed=0):
    """Latencies of the true costs under a load by call; -> the depth of every call."""
    generator = random.Random(seed)
    depths = []
    for i in range(calls):
        depth = controller.depth
        depths.append(depth)
        controller.record(costs[depth] * load(i) * math.exp(generator.gauss(0, noise)), depth)
    return depths


def switches(depths):
    return sum(a != b for a, b in pairwise(depths))


def test_a_queue_is_answered_in_time():
    """Catches a queue whose end is late, a prediction by another depth or load, and late calls that stay deep."""
    controller = DepthController({50: 40.0, 26: 25.0, 14: 10.0}, 100, headroom=0.8, window=10)
    assert [controller.choose([left]) for left in (50, 49, 31, 0, -5)] == [50, 26, 14, 14, 14]
    assert controller.choose([]) == 50
    assert [controller.choose([50, last]) for last in (100, 62.5, 60)] == [50, 26, 14]
    for _ in range(10):
        controller.record(20, 14)  # twice the cost, at a depth that is not the present one
    assert [controller.choose([left]) for left in (100, 99, 62)] == [50, 26, 14]
    for i in range(100):
        controller.record((10 if i % 20 else 1000) * 4, 50)  # the load is over but for single calls
    assert controller.choose([50]) == 50


def test_load_that_comes_and_goes():
    """Catches a controller that reacts late, not at all or to a wrong depth, and one that does not come back."""
    controller = DepthController(COSTS, 25, window=20, patience=50)
    depths = simulate(controller, lambda i: 2.5 if 500 <= i < 1000 else 1.0, 2000)
    assert set(depths[:500]) == {50}
    assert set(depths[503:1000]) == {14}  # the third call beyond the budget moves; 26 would take 30 ms
    assert set(depths[1000 + 2 * (20 + 50) + 20:]) == {50}
    assert switches(depths) == 3  # down at once, up one by one


def test_budget_is_kept_under_a_load_that_grows():
    """Catches more than a window's calls beyond the budget where some depth keeps it."""
    controller = DepthController(COSTS, 25, window=20, patience=50)
    load = [1.0 + i / 400 for i in range(1000)]  # at the end 14 takes 24.5 ms
    depths = simulate(controller, lambda i: load[i], 1000)
    late = [i for i, depth in enumerate(depths) if COSTS[depth] * load[i] > 25]
    assert 0 < len(late) <= 2 * 3
    assert depths[-1] == 14 and switches(depths) == 2


@pytest.mark.parametrize('load', [0.5, 0.9, 1.1, 1.24, 1.26, 1.5, 1.9, 2.0, 2.2, 3.0, 4.0])
def test_constant_load_does_not_flap(load):
    """Catches missing hysteresis: whatever the load, the depth comes to rest, also where noise passes the budget."""
    for seed in range(3):
        controller = DepthController(COSTS, 25)
        depths = simulate(controller, lambda _: load, 10000, noise=0.08, seed=seed)
        assert switches(depths[5000:]) <= 2
        assert switches(depths) <= 8


def test_wrong_costs_are_tried_ever_more_rarely():
    """Catches a controller that believes wrong ratios for ever: each move up that fails doubles the patience."""
    controller = DepthController({50: 12.0, 26: 11.0, 14: 10.0}, 25)
    depths = simulate(controller, lambda _: 1.5, 20000)  # 50 takes 30 ms
    beyond = sum(depth == 50 for depth in depths[200:])
    assert depths[-1] == 26
    assert 6 <= switches(depths) <= 33  # down past the one between, and up in two moves
    assert beyond <= 11 * 51


def test_patience_is_forgiven_after_a_success():
    """Catches a controller that, after loads that came soon again, never comes back in good time."""
    controller = DepthController(COSTS, 25, window=20, patience=50)
    calm, busy = (lambda _: 1.0), (lambda _: 1.5)
    simulate(controller, busy, 25)
    simulate(controller, calm, 75)  # up again
    assert controller.depth == 50
    simulate(controller, busy, 25)  # too soon
    assert set(simulate(controller, calm, 100)) == {26}
    assert simulate(controller, calm, 60)[-1] == 50
    simulate(controller, calm, 200)  # it lasts
    simulate(controller, busy, 25)
    assert simulate(controller, calm, 100)[-1] == 50


def test_equal_latencies_give_equal_depths():
    """Catches a clock or chance in the decision."""
    runs = [simulate(DepthController(COSTS, 25), lambda i: 1 + math.sin(i / 300), 5000, noise=0.1) for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def test_late_calls_of_another_depth_do_not_count():
    """Catches calls that began before a move and are taken for calls of the depth after it."""
    controller = DepthController(COSTS, 25, window=4, patience=10)
    for _ in range(4):
        controller.record(30.0, 50)
    assert controller.depth == 26 and controller.latency_ms is None
    for _ in range(20):
        assert controller.record(100.0, 50) == 26
    assert controller.latency_ms is None


def test_rolling_latency_passes_over_single_outliers():
    """Catches a mean or a maximum in the place of the 90th percentile."""
    controller = DepthController(COSTS, 25, window=20)
    for i in range(200):
        controller.record(1000.0 if i % 10 == 0 else 20.0)
    assert controller.depth == 50 and controller.latency_ms == 20.0


def test_measure_records_the_time_of_the_body():
    """Catches seconds for milliseconds, a call that failed and counts, and a depth that is not the present one."""
    controller = DepthController(COSTS, 1e9, window=1)
    with pytest.raises(KeyError), controller.measure():
        raise KeyError
    assert controller.latency_ms is None
    with controller.measure() as depth:
        assert depth == 50
        time.sleep(0.02)
    assert 20 <= controller.latency_ms < 2000


def test_a_depth_that_lasted_has_the_first_patience_again():
    """Catches failures of a depth that count for ever, because it was left upward after it had lasted."""
    controller = DepthController(COSTS, 25, window=1, patience=3)
    for _ in range(3):
        assert controller.record(60.0) == 14
        while controller.record(9.0) != 26:
            pass
    for _ in range(50):  # it lasts, and then the next one too
        assert controller.record(15.0) == 26
    while controller.record(9.0) != 50:
        pass
    for _ in range(50):
        controller.record(9.0)
    assert controller.record(1000.0) == 14
    assert [controller.record(latency) for latency in (9.0, 9.0, 9.0)] == [14, 14, 26]


def test_patience_is_for_calls_in_a_row():
    """Catches calls that are counted although the net would not have fitted in between."""
    controller = DepthController(COSTS, 25, window=1, patience=3)
    assert controller.record(30.0) == 26
    assert [controller.record(latency) for latency in (9, 9, 20, 9, 9, 9)] == [26] * 5 + [50]


def test_threads_share_a_controller():
    """Catches a missing lock: two threads that decide at once move the depth twice, or on half a window."""
    deciding, together = [], []

    class Watched(DepthController):
        def _decide(self):
            deciding.append(1)
            together.append(len(deciding))
            time.sleep(0.0002)
            super()._decide()
            deciding.pop()

    controller = Watched(COSTS, 25, window=5, patience=5)
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        for i in range(60):
            with controller.measure() as depth:
                assert depth in COSTS
            controller.record(COSTS[depth] * (2.0 if i // 20 % 2 else 0.5), depth)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(together) > 60 and set(together) == {1}


@pytest.mark.parametrize('kwargs, message', [
    ({'costs': {}}, 'costs'), ({'costs': {50: 0}}, 'cost of depth 50'), ({'costs': {50: math.nan}}, 'cost of depth 50'),
    ({'costs': (50, 26)}, 'costs must be a mapping'), ({'costs': {'50': 1}}, 'depth in costs'),
    ({'costs': {50: '1'}}, 'cost of depth 50'), ({'budget_ms': 0}, 'budget_ms'), ({'budget_ms': math.inf}, 'budget_ms'),
    ({'headroom': 1.1}, 'headroom'), ({'headroom': math.nan}, 'headroom'), ({'window': 0}, 'window'),
    ({'window': 1.5}, 'window'), ({'patience': 0}, 'patience'), ({'patience': math.nan}, 'patience'),
])
def test_wrong_arguments_are_refused(kwargs, message):
    """Catches a controller that is made and never moves."""
    with pytest.raises(InputError, match=message):
        DepthController(**{'costs': COSTS, 'budget_ms': 25, **kwargs})
    controller = DepthController(dict(sorted(COSTS.items())), 25)
    assert controller.depth == max(COSTS)
    for latency, depth in ((math.nan, None), (-1, None), (1, 18)):
        with pytest.raises(InputError, match='must be'):
            controller.record(latency, depth)


def test_the_example_runs(tmp_path, monkeypatch):
    """Catches an example in the docstring that is out of date."""
    model = create('ddnn_resnet20', channels=(4, 8, 16))
    setting = {'runtime': 'eager', 'batch_size': 1, 'threads': 1}
    (tmp_path / 'output/profile').mkdir(parents=True)
    write_json(tmp_path / 'output/profile/profile.json', {
        'depths': [{'depth': depth, 'macs': depth} for depth in model.depths],
        'measurements': [{'depth': d, **setting, 'median_ms': d, 'p90_ms': d} for d in model.depths],
    })
    monkeypatch.chdir(tmp_path)
    code = re.search(r'\n\n((?: {8}.*\n|\n)+)\n    The rolling', DepthController.__doc__)[1]
    names = {'timm_ddnn': timm_ddnn, 'model': model, 'images': torch.randn(3, 1, 3, 32, 32)}
    exec(textwrap.dedent(code), names)
    assert names['controller'].depths == (20, 14, 8) and names['logits'].shape == (1, 10)


def moves_under_real_load(model, images):
    """Run a model on one core, with other processes there and without; -> the depth with them, and after."""
    affinity, threads, others = os.sched_getaffinity(0), torch.get_num_threads(), []

    def end_others():
        for process in others:
            process.kill()
            process.wait()

    try:
        os.sched_setaffinity(0, {max(affinity)})
        torch.set_num_threads(1)
        costs = {}
        with torch.inference_mode():
            for depth in model.depths:
                latencies = []
                for _ in range(20):
                    start = time.perf_counter()
                    model(images, depth=depth)
                    latencies.append(1000 * (time.perf_counter() - start))
                costs[depth] = percentile_90(latencies)
            controller = DepthController(costs, 2.5 * costs[model.depths[0]], window=10, patience=10)

            def run_until(done, calls):
                for _ in range(calls):
                    if done(controller.depth):
                        break
                    with controller.measure() as depth:
                        model(images, depth=depth)
                return controller.depth

            others += [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(16)]
            loaded = run_until(lambda depth: depth < model.depths[0], 150)
            end_others()
            return loaded, run_until(lambda depth: depth == model.depths[0], 400)
    finally:
        torch.set_num_threads(threads)
        os.sched_setaffinity(0, affinity)
        end_others()


@pytest.mark.slow  # 16 busy processes disturb the timing of other tests
@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='pins processes to a core')
def test_a_model_gives_way_to_other_processes():
    """Catches a controller that real latencies on a loaded core do not move, or that does not come back.

    It judges directions alone. All processes share one core, and the budget is a multiple of what the model takes there
    just before; a further try is for a machine whose other work begins or ends at that moment.
    """
    model, images = create('ddnn_resnet20'), torch.randn(4, 3, 32, 32)
    for _ in range(3):
        loaded, free = moves_under_real_load(model, images)
        if loaded < free == 20:
            break
    assert loaded < free == 20
