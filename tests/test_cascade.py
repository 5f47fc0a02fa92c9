"""Cascades: what runs, what it costs, where images end, and which threshold is chosen."""
import itertools
import random

import pytest
import torch
from helpers.models import create, images

from timm_ddnn.cascade import Cascade, confidence
from timm_ddnn.evaluation import speed as speed_module
from timm_ddnn.evaluation.speed import measure_speed
from timm_ddnn.evaluation.thresholds import UnreachableError, choose_threshold, exit_steps, trace_thresholds

# The path of depth 16 leaves that of 12 later than that of 14
SKIPPING = dict(subnets=((1, 3, 3), (2, 2, 2), (1, 3, 1)))
NARROW = dict(channels=(8, 16, 32, 64))
CASES = {
    'equal cuts': ('ddnn_resnet20', {}, (8, 14, 20)),
    'without the full-net': ('ddnn_resnet20', {}, (8, 14)),
    'another source than the one before': ('ddnn_resnet20', SKIPPING, (12, 14, 16, 20)),
    'bottlenecks': ('ddnn_resnet50', NARROW, (14, 26, 50)),
    'long shared path': ('ddnn_resnet50', dict(NARROW, subnets=((3, 4, 6, 1), (3, 4, 2, 1))), (32, 44, 50)),
}


@torch.no_grad()
def spread_logits(model, depths, x):
    """Let the classifier see what differs between images, and not what differs between depths."""
    pooled = [model.forward_head(model.forward_features(x, depth=depth), pre_logits=True) for depth in depths]
    basis, _ = torch.linalg.qr(torch.stack([features.mean(0) for features in pooled], dim=1))
    model.fc.weight -= model.fc.weight @ basis @ basis.T
    model.fc.weight *= 1.5 / torch.cat(pooled).matmul(model.fc.weight.T).std()
    model.fc.bias.zero_()


@pytest.fixture(params=list(CASES), scope='module')
def case(request):
    name, kwargs, depths = CASES[request.param]
    model = create(name, num_classes=10, **kwargs)
    model, x = model.double(), images(model, batch=40, size=32).double()  # else rounding hides small faults
    spread_logits(model, depths, x)
    return model, depths, x


def alone(model, depths, x):
    with torch.no_grad():
        return torch.stack([model(x, depth=depth) for depth in depths])


def threshold_for(logits):
    """A threshold that lets some images end at every step, as far as can be from all confidences."""
    values = confidence(logits).flatten().unique()
    middles, gaps = (values[1:] + values[:-1]) / 2, values[1:] - values[:-1]
    for i in gaps.argsort(descending=True):
        if len(exit_steps(confidence(logits), float(middles[i])).unique()) == len(logits):
            assert gaps[i] > 1e-3
            return float(middles[i])
    raise AssertionError('no threshold divides these images')


def test_logits_and_routes_are_those_of_the_depths(case):
    """Catches maps taken at the wrong place or of the wrong images, and images that go on, or end, wrongly."""
    model, depths, x = case
    logits = alone(model, depths, x)
    assert not torch.allclose(logits[0], logits[-1], atol=1e-2)
    threshold = threshold_for(logits)
    got, steps = Cascade(model, depths, threshold)(x)
    assert set(steps.tolist()) == set(range(len(depths)))
    for n, image in enumerate(x):
        for depth in depths:
            with torch.no_grad():
                own = model(image[None], depth=depth)[0]
            if max(own.exp() / own.exp().sum()) > threshold:
                break
        assert depths[steps[n]] == depth
        torch.testing.assert_close(got[n], own, rtol=1e-9, atol=1e-9)
    assert got.requires_grad is False


def test_at_the_ends_of_the_range_all_images_take_one_route(small):
    """Catches a comparison that keeps a sure image from the last net at 1, or lets one go on at 0."""
    x = images(small, batch=6)
    with torch.no_grad():
        small.fc.weight.mul_(1e4)
    logits = alone(small, (8, 20), x)
    assert (confidence(logits[0]) == 1).any()
    for threshold, step in ((0, 0), (1, 1)):
        got, steps = Cascade(small, (8, 20), threshold)(x)
        assert steps.tolist() == [step] * 6
        torch.testing.assert_close(got, logits[step], rtol=1e-4, atol=1)


def convolution_macs(module, output):
    if isinstance(module, torch.nn.Linear):
        return output.shape[0] * module.in_features * module.out_features
    kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
    return output.numel() * kernel


def test_macs_are_those_that_ran(case):
    """Catches costs that are not those of the layers that ran: a stem or a block counted twice, or left out."""
    model, depths, x = case
    threshold = threshold_for(alone(model, depths, x))
    ran = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda module, _, output: ran.append(convolution_macs(module, output)))
    cascade = Cascade(model, depths, threshold)
    _, steps = cascade(x)
    total = sum(ran)
    costs = cascade.count_macs(x.shape[1:])
    until = list(itertools.accumulate(cost.macs for cost in costs))
    assert total == sum(until[step] for step in steps.tolist())
    for cost in costs:
        ran.clear()
        with torch.no_grad():
            model(x[:1], depth=cost.depth)
        assert cost.macs + cost.reused == sum(ran)


def test_no_block_runs_twice(case):
    """Catches shared blocks that run again for a deeper net, and blocks that no net of the cascade has."""
    model, depths, x = case
    paths = {depth: model.path(depth) for depth in depths}
    ran = []
    for module in {id(b): b for path in paths.values() for b in path}.values():
        module.register_forward_hook(lambda block, inputs, _: ran.extend([id(block)] * len(inputs[0])))
    model.conv1.register_forward_hook(lambda conv, inputs, _: ran.extend([id(conv)] * len(inputs[0])))
    Cascade(model, depths, 1.0)(x)
    expected = {id(b) for path in paths.values() for b in path} | {id(model.conv1)}
    assert sorted(ran) == sorted(list(expected) * len(x))


def test_what_equal_cuts_share():
    """Catches a wrong account of what is reused; the numbers are counted by hand."""
    stem, block = 32 * 32 * 3 * 9 * 16, 2 * 32 * 32 * 16 * 9 * 16
    first, second, third = Cascade(create('ddnn_resnet20'), (8, 14, 20), 0.5).count_macs((3, 32, 32))
    assert (first.source, first.shared_blocks, first.reused) == (None, 0, 0)
    assert (second.source, second.shared_blocks, second.reused) == (8, 1, stem + block)
    assert (third.source, third.shared_blocks, third.reused) == (14, 2, stem + 2 * block)


def test_the_source_is_the_net_that_shares_most():
    """Catches a net that starts from the one before though an earlier one shares more with it."""
    costs = Cascade(create('ddnn_resnet20', **SKIPPING), (12, 14, 16, 20), 0.5).count_macs((3, 32, 32))
    assert [(cost.source, cost.shared_blocks) for cost in costs] == [(None, 0), (12, 1), (12, 5), (14, 2)]


def test_counting_leaves_the_model_as_it_is(small):
    """Catches statistics or a mode that a count changes."""
    small.train()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    Cascade(small, (8, 20), 0.5).count_macs((3, 32, 32))
    assert small.training
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize('depths', [(20,), (20, 8), (8, 8), (8, 50), ()])
def test_depths_that_are_no_cascade_are_refused(small, depths):
    """Catches cascades of one net, of nets that there are not, or that begin with the deepest."""
    with pytest.raises(ValueError, match=r'two or more of the depths \(8, 14, 20\), the shallowest first, got'):
        Cascade(small, depths, 0.5)


def test_an_image_without_confidence_goes_to_the_last_net(small):
    """Catches NaN for a sure answer, which the shallowest net would give."""
    x = images(small, batch=3)
    x[1] = torch.nan
    for threshold in (0.0, 0.5):
        _, steps = Cascade(small, (8, 14, 20), threshold)(x)
        assert steps[1] == 2
    logits = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [0.0, 0.0]])
    assert confidence(logits).tolist() == [0.0, 0.0, 0.5]


def test_what_cannot_run_is_refused(small):
    """Catches a threshold that is no probability, and batch-norm statistics that a cascade would change."""
    with pytest.raises(ValueError, match=r'from 0 to 1, got 1\.5'):
        Cascade(small, (8, 20), 1.5)
    with pytest.raises(ValueError, match='eval mode'):
        Cascade(small.train(), (8, 20), 0.5)(images(small))


# Thresholds

MACS = [10, 7, 25, 3]


def outcomes(steps, seed, count=40):
    """Confidences with many ties, and hits of nets that are no better for being later."""
    rng = random.Random(seed)
    confidences = [[rng.randint(10, 20) / 20 for _ in range(count)] for _ in range(steps)]
    correct = [[rng.random() < 0.5 + 0.1 * i for _ in range(count)] for i in range(steps)]
    return torch.tensor(confidences), torch.tensor(correct)


def simulate(confidences, correct, threshold):
    """Correct images and total MACs of a cascade, image by image."""
    hits = total = 0
    for own, right in zip(confidences.T.tolist(), correct.T.tolist(), strict=True):
        for i, value in enumerate(own):
            total += MACS[i]
            if value > threshold or i + 1 == len(own):
                hits += right[i]
                break
    return hits, total


def candidates(confidences):
    return sorted({0.0, *confidences[:-1].flatten().tolist()})


@pytest.mark.parametrize('steps', [2, 3, 4])
def test_all_thresholds_are_traced(steps):
    """Catches images that are moved by the wrong threshold, and thresholds that are missed."""
    for seed in range(5):
        confidences, correct = outcomes(steps, seed)
        curve = trace_thresholds(confidences, correct, MACS[:steps])
        totals = [total for _, total in (simulate(confidences, correct, t) for t in candidates(confidences))]
        assert curve.macs.tolist() == pytest.approx([total / 40 for total in sorted(set(totals))])
        for threshold, top1, macs in zip(*(values.tolist() for values in curve), strict=True):
            hits, total = simulate(confidences, correct, threshold)
            assert (top1, macs) == pytest.approx((hits / 0.4, total / 40))
            ends = exit_steps(confidences, threshold)
            assert sum(correct[step, n].item() for n, step in enumerate(ends.tolist())) == hits


@pytest.mark.parametrize('steps', [2, 3, 4])
@pytest.mark.parametrize('seed', range(5))
def test_choice_is_the_best_of_all(steps, seed):
    """Catches a choice that is not the cheapest for its accuracy, or not the most accurate for its cost."""
    confidences, correct = outcomes(steps, seed)
    points = [simulate(confidences, correct, t) for t in candidates(confidences)]
    for target in (None, 40.0, 55.0, max(hits for hits, _ in points) / 0.4):
        least = int(correct[-1].sum()) if target is None else target * 0.4 - 1e-9
        total, hits = min((total, -hits) for hits, total in points if hits >= least)
        choice = choose_threshold(confidences, correct, MACS[:steps], target_top1=target)
        assert (choice.top1, choice.macs) == pytest.approx((-hits / 0.4, total / 40))
        assert simulate(confidences, correct, choice.threshold) == (-hits, total)
    for budget in (10, 12.5, 14, 18.3, 100):
        hits, total = max((hits, -total) for hits, total in points if total <= budget * 40)
        choice = choose_threshold(confidences, correct, MACS[:steps], budget_macs=budget)
        assert (choice.top1, choice.macs) == pytest.approx((hits / 0.4, -total / 40))
        assert simulate(confidences, correct, choice.threshold) == (hits, -total)


def test_what_no_threshold_fulfils_is_said():
    """Catches a silent choice that misses what was asked for."""
    confidences, correct = outcomes(3, 0)
    correct[:, 0] = False
    with pytest.raises(UnreachableError, match=r'top-1 accuracy of 100 %: on the images to choose by, the best has \d'):
        choose_threshold(confidences, correct, MACS[:3], target_top1=100)
    with pytest.raises(UnreachableError, match='mean MACs of 9: the first net alone takes 10'):
        choose_threshold(confidences, correct, MACS[:3], budget_macs=9)
    with pytest.raises(ValueError, match='one of target_top1 and budget_macs'):
        choose_threshold(confidences, correct, MACS[:3], target_top1=50, budget_macs=20)


# Speed

def test_speed_is_images_per_second_after_the_first_round(small, monkeypatch):
    """Catches a warm-up that counts, images counted wrongly, and times taken of another net."""
    clock, classified = [0.0], []

    def classify(module, inputs, output):
        classified.append(len(inputs[0]))
        clock[0] += 100 if len(classified) <= 8 else 0.5  # the first round: two nets and a cascade of both, two batches

    small.fc.register_forward_hook(classify)
    monkeypatch.setattr(speed_module.time, 'perf_counter', lambda: clock[0])
    batches = [images(small, batch=4), images(small, batch=2)]
    speed = measure_speed(Cascade(small, (8, 20), 1.0), batches, rounds=3)
    assert speed['images'] == 6
    assert speed['ends'] == [0, 100]
    assert speed['depths'] == [{'depth': depth, 'median': 6.0, 'low': 6.0, 'high': 6.0} for depth in (8, 20)]
    assert speed['cascade'] == {'median': 3.0, 'low': 3.0, 'high': 3.0}
    assert len(classified) == 4 * 8 + 4  # four rounds, and once more to see where images end
