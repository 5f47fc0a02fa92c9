"""The loss and its terms, each recomputed in plain loops over Python floats.

What the task makes of the loss is in `test_task.py`.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from timm_ddnn import EKDLoss, SubNetOutput, attention_map, attention_transfer, kl_divergence

FORMS = ('energy', 'standardized')
DEPTHS = (20, 14, 8)
SHAPES = ((2, 4, 3), (3, 3, 2), (4, 2, 2))  # C, H, W of the stages; not square, for flattening to matter
BATCH, CLASSES = 3, 5
TARGET = torch.tensor([1, 4, 0])


def make_outputs(depths=DEPTHS, dtype=torch.float64, requires_grad=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        values = torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)
        return values.to(dtype).requires_grad_(requires_grad)

    return {d: SubNetOutput(2 * draw(CLASSES), [draw(*shape) for shape in SHAPES]) for d in depths}


def convert(outputs, dtype):
    return {d: SubNetOutput(o.logits.to(dtype), [f.to(dtype) for f in o.features]) for d, o in outputs.items()}


def as_leaves(outputs):
    return {
        d: SubNetOutput(o.logits.detach().requires_grad_(), [f.detach().requires_grad_() for f in o.features])
        for d, o in outputs.items()
    }


# The formulas of the documentation in plain loops. They take nested lists, tensors only to convert them.

def log_softmax_loop(row, temperature=1.0):
    scaled = [z / temperature for z in row]
    log_sum = max(scaled) + math.log(sum(math.exp(z - max(scaled)) for z in scaled))
    return [z - log_sum for z in scaled]


def kl_loop(logits, teacher_logits, temperature):
    total = 0.0
    for row, teacher_row in zip(logits.tolist(), teacher_logits.tolist(), strict=True):
        student, teacher = log_softmax_loop(row, temperature), log_softmax_loop(teacher_row, temperature)
        for s, t in zip(student, teacher, strict=True):
            total += math.exp(t) * (t - s)
    return temperature ** 2 * total / len(logits)


def attention_loop(sample, form):
    channels, height, width = len(sample), len(sample[0]), len(sample[0][0])
    pixels = []
    for h in range(height):
        for w in range(width):
            values = [sample[c][h][w] for c in range(channels)]
            pixels.append(sum(v * v for v in values) / channels if form == 'energy' else sum(values))
    if form == 'energy':
        norm = math.sqrt(sum(p * p for p in pixels))
        return [p / norm for p in pixels]
    mean = sum(pixels) / len(pixels)
    variance = sum((p - mean) ** 2 for p in pixels) / len(pixels)
    return [(p - mean) / math.sqrt(variance + 1e-6) for p in pixels]


def transfer_loop(feature, teacher_feature, form):
    total = 0.0
    for sample, teacher_sample in zip(feature.tolist(), teacher_feature.tolist(), strict=True):
        student, teacher = attention_loop(sample, form), attention_loop(teacher_sample, form)
        squares = sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True))
        total += squares if form == 'energy' else squares / len(student)
    return total / len(feature)


def cross_entropy_loop(logits, target):
    """For class indices or soft targets."""
    total = 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        log_probs = log_softmax_loop(row)
        soft = y if isinstance(y, list) else [float(c == y) for c in range(len(row))]
        total -= sum(p * q for p, q in zip(soft, log_probs, strict=True))
    return total / len(logits)


def smoothed_loop(logits, target, smoothing=0.1):
    total = 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        log_probs = log_softmax_loop(row)
        total -= (1 - smoothing) * log_probs[y] + smoothing * sum(log_probs) / len(row)
    return total / len(logits)


def binary_loop(logits, target):
    total = 0.0
    for row, soft in zip(logits.tolist(), target.tolist(), strict=True):
        for z, p in zip(row, soft, strict=True):
            total += p * math.log1p(math.exp(-z)) + (1 - p) * math.log1p(math.exp(z))
    return total / (len(logits) * len(logits[0]))


def loss_loop(
        outputs,
        target,
        temperature=1.0,
        alpha=0.3,
        beta=0.1,
        attention='energy',
        stages=(0, 1, 2),
        weights=None,
        cross_entropy=cross_entropy_loop,
):
    full = 20
    loss = cross_entropy(outputs[full].logits, target)
    for d, output in outputs.items():
        if d == full:
            continue
        part = cross_entropy(output.logits, target)
        part += alpha * kl_loop(output.logits, outputs[full].logits, temperature)
        for s in stages:
            part += beta * transfer_loop(output.features[s], outputs[full].features[s], attention)
        loss += (weights or {}).get(d, 1.0) * part
    return loss


# KL divergence

@pytest.mark.parametrize('temperature', [0.5, 1, 4.0])
@pytest.mark.parametrize('classes', [2, 7, 100])
def test_kl_divergence_in_loops(classes, temperature):
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, 4, classes, dtype=torch.float64, generator=generator) * 3
    expected = kl_loop(student, teacher, temperature)
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_kl_divergence_of_known_posteriors():
    # 'batchmean': neither the number of classes nor the size of the batch divides once more
    even, skewed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert kl_divergence(skewed, even).item() == pytest.approx(0.510826, abs=1e-6)
    assert kl_divergence(even, skewed).item() == pytest.approx(0.368064, abs=1e-6)
    assert kl_divergence(skewed.repeat(3, 1), even.repeat(3, 1)).item() == pytest.approx(0.510826, abs=1e-6)
    many = [math.log(p) for p in (0.5, 0.5, 1e-30, 1e-30, 1e-30, 1e-30)]
    few = [math.log(p) for p in (0.9, 0.1, 1e-30, 1e-30, 1e-30, 1e-30)]
    assert kl_divergence(torch.tensor([few]), torch.tensor([many])).item() == pytest.approx(0.510826, abs=1e-6)


def test_kl_divergence_is_zero_between_equals():
    logits = torch.randn(4, 6, dtype=torch.float64)
    assert kl_divergence(logits, logits + 3.0, 2.0).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize('temperature', [1.0, 4.0, 50.0])
def test_kl_gradient_in_loops(temperature):
    outputs = make_outputs()
    student, teacher = outputs[8].logits.requires_grad_(), outputs[20].logits
    kl_divergence(student, teacher, temperature).backward()
    for grad, s, t in zip(student.grad.tolist(), student.tolist(), teacher.tolist(), strict=True):
        posteriors = zip(log_softmax_loop(s, temperature), log_softmax_loop(t, temperature), strict=True)
        expected = [temperature * (math.exp(p) - math.exp(q)) / BATCH for p, q in posteriors]
        assert grad == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    sizes = []
    for temperature in (20.0, 40.0, 400.0):
        outputs = make_outputs()
        student = outputs[8].logits.requires_grad_()
        kl_divergence(student, outputs[20].logits, temperature).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] > 1e-2
    assert sizes[1:] == pytest.approx([sizes[0]] * 2, rel=0.1)


# Attention

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('scale', [1.0, 1e-3])  # at 1e-3 the epsilon under the root is of the size of the variance
def test_attention_map_in_loops(form, scale):
    feature = scale * torch.randn(BATCH, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    attention = attention_map(feature, form)
    assert attention.shape == (BATCH, 6)
    for row, sample in zip(attention.tolist(), feature.tolist(), strict=True):
        assert row == pytest.approx(attention_loop(sample, form), rel=1e-10)


@pytest.mark.parametrize('form', FORMS)
def test_attention_transfer_in_loops(form):
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(BATCH, 4, 3, 5, dtype=torch.float64, generator=generator)
    teacher = torch.randn(BATCH, 7, 3, 5, dtype=torch.float64, generator=generator)  # the width may differ
    expected = transfer_loop(student, teacher, form)
    assert attention_transfer(student, teacher, form).item() == pytest.approx(expected, rel=1e-12)


def test_attention_transfer_reaches_its_bounds():
    left, right = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert attention_transfer(left, right, 'energy').item() == pytest.approx(2.0, rel=1e-5)
    assert attention_transfer(left, right, 'standardized').item() == pytest.approx(4.0, rel=1e-5)


def test_energy_ignores_scale_and_standardized_ignores_offset():
    feature = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert attention_transfer(feature, 5 * feature, 'energy').item() == pytest.approx(0.0, abs=1e-14)
    assert attention_transfer(feature, feature + 5, 'energy').item() > 1e-3
    assert attention_transfer(feature, feature + 5, 'standardized').item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize('function', [
    lambda feature, form: attention_map(feature, form),
    lambda feature, form: attention_transfer(feature, feature, form),
])
def test_unknown_attention_is_refused(function):
    with pytest.raises(ValueError, match=r"'energy', 'standardized'.*'softmax'"):
        function(torch.randn(1, 2, 2, 2), 'softmax')


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (2, 3, 5, 4), (2, 3, 2, 2), (1, 3, 4, 4)])
@pytest.mark.parametrize('form', FORMS)
def test_maps_of_another_batch_or_resolution_are_refused(shape, form):
    with pytest.raises(ValueError, match='same batch, height and width') as error:
        attention_transfer(torch.randn(shape), torch.randn(2, 3, 4, 4), form)
    assert str(shape) in str(error.value)
    assert '(2, 3, 4, 4)' in str(error.value)


def test_loss_refuses_maps_of_another_resolution():
    outputs = make_outputs()
    outputs[8].features[1] = torch.randn(BATCH, 3, 2, 3)
    with pytest.raises(ValueError, match=r'\(3, 3, 2, 3\)'):
        EKDLoss()(outputs, TARGET)


# Numerics where maps say nothing

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dead', ['student', 'teacher', 'both'])
def test_dead_maps_give_finite_loss_and_gradients(form, dead):
    live = torch.rand(BATCH, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    live[0] *= 10
    student = torch.zeros_like(live) if dead in ('student', 'both') else live.clone()
    teacher = torch.zeros_like(live) if dead in ('teacher', 'both') else live.clone()
    student.requires_grad_()
    distance = attention_transfer(student, teacher, form)
    assert distance.item() == pytest.approx(0.0 if dead == 'both' else 1.0, rel=1e-3)
    distance.backward()
    assert student.grad.isfinite().all()

    for dtype in (torch.float16, torch.bfloat16):
        low = student.detach().to(dtype).requires_grad_()
        attention_transfer(low, teacher.to(dtype), form).backward()
        assert low.grad.isfinite().all()

    outputs = as_leaves(make_outputs(dtype=torch.float32))
    for d in {'student': (8,), 'teacher': (20,), 'both': DEPTHS}[dead]:
        with torch.no_grad():
            outputs[d].features[1].zero_()
            outputs[d].features[2][1].zero_()  # one sample of the batch
    loss = EKDLoss(attention=form)(outputs, TARGET)
    assert loss.isfinite()
    loss.backward()
    assert all(f.grad.isfinite().all() for d in (14, 8) for f in outputs[d].features)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('value', [0.1, 3.0, -2.0, 1e4])
def test_constant_maps_give_finite_loss_and_gradients(form, value):
    student = torch.full((2, 64, 7, 7), value, requires_grad=True)
    teacher = torch.rand(2, 64, 7, 7, generator=torch.Generator().manual_seed(4))
    if form == 'standardized':
        assert attention_map(student, form).abs().max() < 1e-3
    distance = attention_transfer(student, teacher, form) + attention_transfer(student, torch.ones_like(student), form)
    assert distance.isfinite()
    distance.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize('form', FORMS)
def test_maps_of_one_pixel_teach_nothing(form):
    student = torch.rand(2, 3, 1, 1, requires_grad=True)
    distance = attention_transfer(student, torch.rand(2, 3, 1, 1), form)
    distance.backward()
    assert distance.item() == pytest.approx(0.0, abs=1e-10)
    assert student.grad.abs().max() < 1e-5


# The whole loss

@pytest.mark.parametrize('options', [
    dict(),
    dict(attention='standardized'),
    dict(temperature=3.0, alpha=0.7, beta=2.0),
    dict(temperature=2, alpha=1, beta=1, attention='standardized', weights={14: 0.25, 8: 3}),
    dict(weights={8: 0.5}),
    dict(weights={14: 0.0}),
    dict(alpha=0.0, beta=0.5),
    dict(alpha=0.5, beta=0.0),
    dict(alpha=0, beta=0, weights={8: 2.0}),
    dict(stages=(2,), attention='standardized', beta=1.0),
    dict(stages=[0, 2], beta=1.0),
])
def test_loss_in_loops(options):
    outputs = make_outputs()
    expected = loss_loop(outputs, TARGET, **options)
    assert EKDLoss(**options)(outputs, TARGET).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('depths', [(20, 8), (8, 14, 20), (8, 20), (20, 18, 16, 14, 12, 10, 8)])
def test_loss_in_loops_of_any_depths_in_any_order(depths):
    outputs = make_outputs(depths)
    expected = loss_loop(outputs, TARGET, temperature=2.0, weights={14: 0.5})
    assert EKDLoss(temperature=2.0, weights={14: 0.5})(outputs, TARGET).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(('negative', 'positive'), [((-1,), (2,)), ((-3, -1), (0, 2)), ((0, -2), (0, 1))])
def test_negative_stages_count_from_the_last(form, negative, positive):
    outputs = make_outputs()
    terms = EKDLoss(attention=form, stages=negative).terms(outputs, TARGET)
    for d in (14, 8):
        maps = [(outputs[d].features[s], outputs[20].features[s]) for s in positive]
        expected = sum(transfer_loop(student, teacher, form) for student, teacher in maps)
        assert terms[f'attention_{d}'].item() == pytest.approx(expected, rel=1e-12)


def test_a_stage_named_twice_counts_once():
    outputs = make_outputs()
    assert torch.equal(EKDLoss(stages=(2, -1, 2))(outputs, TARGET), EKDLoss(stages=(2,))(outputs, TARGET))


@pytest.mark.parametrize('stages', [(3,), (0, -4)])
def test_stages_that_the_model_has_not_are_refused(stages):
    with pytest.raises(ValueError, match='from -3 to 2') as error:
        EKDLoss(stages=stages)(make_outputs(), TARGET)
    assert str(stages) in str(error.value)


@pytest.mark.parametrize('options', [
    dict(),
    dict(temperature=4.0, alpha=0.9, beta=1.5, attention='standardized', weights={14: 0.5, 8: 2.0}),
    dict(alpha=0),
    dict(beta=0),
    dict(alpha=0, beta=0),
])
def test_loss_is_the_documented_sum_of_its_terms(options):
    loss_fn, outputs = EKDLoss(**options), make_outputs()
    terms = loss_fn.terms(outputs, TARGET)
    names = ['ce', 'kl', 'attention']
    names = [n for n in names if n == 'ce' or options.get({'kl': 'alpha', 'attention': 'beta'}[n], 1)]
    assert set(terms) == {'loss', 'ce_20', *(f'{n}_{d}' for n in names for d in (14, 8))}

    expected = terms['ce_20'].item()
    for d in (14, 8):
        part = terms[f'ce_{d}'].item()
        part += options.get('alpha', 0.3) * (terms[f'kl_{d}'].item() if f'kl_{d}' in terms else 0)
        part += options.get('beta', 0.1) * (terms[f'attention_{d}'].item() if f'attention_{d}' in terms else 0)
        expected += options.get('weights', {}).get(d, 1.0) * part
    assert terms['loss'].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(loss_fn(outputs, TARGET), terms['loss'])


def test_terms_in_loops():
    outputs = make_outputs()
    terms = EKDLoss(temperature=3.0, weights={8: 7.0}).terms(outputs, TARGET)
    assert all(term.ndim == 0 for term in terms.values())
    for d in DEPTHS:
        assert terms[f'ce_{d}'].item() == pytest.approx(cross_entropy_loop(outputs[d].logits, TARGET), rel=1e-12)
    for d in (14, 8):
        assert terms[f'kl_{d}'].item() == pytest.approx(
            kl_loop(outputs[d].logits, outputs[20].logits, 3.0), rel=1e-12)
        assert terms[f'attention_{d}'].item() == pytest.approx(
            sum(transfer_loop(outputs[d].features[s], outputs[20].features[s], 'energy') for s in range(3)), rel=1e-12)


@pytest.mark.parametrize('form', FORMS)
def test_another_teacher_teaches_all_depths_in_loops(form):
    outputs, teacher = as_leaves(make_outputs()), as_leaves(make_outputs(depths=(44,), seed=1))[44]
    loss_fn = EKDLoss(temperature=3.0, alpha=0.5, beta=0.25, attention=form, weights={8: 7.0})
    terms = loss_fn.terms(outputs, TARGET, teacher)
    assert set(terms) == {'loss', *(f'{name}_{d}' for name in ('ce', 'kl', 'attention') for d in DEPTHS)}
    loss = 0.0
    for d in DEPTHS:
        kl = kl_loop(outputs[d].logits, teacher.logits, 3.0)
        attention = sum(transfer_loop(outputs[d].features[s], teacher.features[s], form) for s in range(3))
        assert terms[f'kl_{d}'].item() == pytest.approx(kl, rel=1e-12)
        assert terms[f'attention_{d}'].item() == pytest.approx(attention, rel=1e-12)
        part = cross_entropy_loop(outputs[d].logits, TARGET) + 0.5 * kl + 0.25 * attention
        loss += part * (7.0 if d == 8 else 1.0)
    assert terms['loss'].item() == pytest.approx(loss, rel=1e-12)
    assert torch.equal(loss_fn(outputs, TARGET, teacher), terms['loss'])
    terms['loss'].backward()
    assert [t.grad for t in (teacher.logits, *teacher.features)] == [None] * 4
    assert all(t.grad.any() for output in outputs.values() for t in (output.logits, *output.features))


def test_a_teacher_of_other_classes_or_stages_is_refused():
    teacher = make_outputs()[20]
    with pytest.raises(ValueError, match='teacher must have maps of 3 stages, got 2'):
        EKDLoss()(make_outputs(), TARGET, teacher._replace(features=teacher.features[:2]))
    with pytest.raises(ValueError, match=r'teacher must have logits \(3, 5\), got \(3, 1\)'):
        EKDLoss()(make_outputs(), TARGET, teacher._replace(logits=teacher.logits[:, :1]))


def test_full_net_alone_gives_plain_cross_entropy():
    outputs = make_outputs((20,))
    terms = EKDLoss(alpha=9.0, beta=9.0).terms(outputs, TARGET)
    assert set(terms) == {'loss', 'ce_20'}
    assert terms['loss'].item() == pytest.approx(cross_entropy_loop(outputs[20].logits, TARGET), rel=1e-12)


def test_without_beta_the_maps_are_not_looked_at():
    outputs = {d: SubNetOutput(o.logits, [torch.full((1, 1, d, d), math.nan)]) for d, o in make_outputs().items()}
    assert EKDLoss(beta=0, stages=(7,))(outputs, TARGET).isfinite()


def test_weight_zero_takes_a_depth_out_of_the_gradient():
    outputs = make_outputs(requires_grad=True)
    grads = torch.autograd.grad(
        EKDLoss(weights={14: 0})(outputs, TARGET), [outputs[14].logits, outputs[8].logits, *outputs[14].features])
    assert [bool(g.any()) for g in grads] == [False, True, False, False, False]


# Gradients

@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_kl_divergence_gradcheck(temperature):
    outputs = make_outputs()
    teacher = outputs[20].logits
    assert torch.autograd.gradcheck(
        lambda z: kl_divergence(z, teacher, temperature), outputs[8].logits.requires_grad_())


@pytest.mark.parametrize('form', FORMS)
def test_attention_gradcheck(form):
    outputs = make_outputs()
    student, teacher = outputs[8].features[0].requires_grad_(), outputs[20].features[0]
    assert torch.autograd.gradcheck(lambda f: attention_map(f, form), student)
    assert torch.autograd.gradcheck(lambda f: attention_transfer(f, teacher, form), student)


@pytest.mark.parametrize('form', FORMS)
def test_loss_gradcheck(form):
    # The teacher is a constant here: that it gets no gradient from distillation is no true derivative.
    fixed = make_outputs()
    loss_fn = EKDLoss(temperature=2.0, alpha=0.7, beta=1.3, attention=form, weights={8: 0.5})

    def run(*tensors):
        tensors = list(tensors)
        outputs = {20: fixed[20]}
        for d in (14, 8):
            outputs[d] = SubNetOutput(tensors.pop(0), [tensors.pop(0) for _ in SHAPES])
        return loss_fn(outputs, TARGET)

    inputs = [t.requires_grad_() for d in (14, 8) for t in (fixed[d].logits, *fixed[d].features)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize('form', FORMS)
def test_full_net_gets_the_gradient_of_its_cross_entropy_alone(form):
    outputs = make_outputs(requires_grad=True)
    full = outputs[20]
    loss = EKDLoss(temperature=2.0, alpha=5.0, beta=5.0, attention=form)(outputs, TARGET)
    grad, *map_grads = torch.autograd.grad(loss, [full.logits, *full.features], allow_unused=True, retain_graph=True)
    assert map_grads == [None] * 3
    for row, z, y in zip(grad.tolist(), full.logits.tolist(), TARGET.tolist(), strict=True):
        expected = [(math.exp(p) - (c == y)) / BATCH for c, p in enumerate(log_softmax_loop(z))]
        assert row == pytest.approx(expected, rel=1e-10, abs=1e-14)

    students = [t for d in (14, 8) for t in (outputs[d].logits, *outputs[d].features)]
    assert all(g.any() for g in torch.autograd.grad(loss, students))


@pytest.mark.parametrize('name', ['kl_14', 'kl_8', 'attention_14', 'attention_8'])
@pytest.mark.parametrize('form', FORMS)
def test_distillation_terms_teach_only_the_student(name, form):
    outputs = make_outputs(requires_grad=True)
    term = EKDLoss(attention=form).terms(outputs, TARGET)[name]
    tensors = [(d, t) for d, o in outputs.items() for t in (o.logits, *o.features)]
    grads = torch.autograd.grad(term, [t for _, t in tensors], allow_unused=True)
    reached = {d for (d, _), g in zip(tensors, grads, strict=True) if g is not None and g.any()}
    assert reached == {int(name.rpartition('_')[2])}


@pytest.mark.parametrize('form', FORMS)
def test_pure_functions_detach_the_teacher(form):
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    logits, teacher_logits = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    (attention_transfer(student, teacher, form) + kl_divergence(logits, teacher_logits, 2.0)).backward()
    assert teacher.grad is None
    assert teacher_logits.grad is None
    assert student.grad.any()
    assert logits.grad.any()


# Criterion and targets

def soft_targets():
    return torch.rand(BATCH, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(dim=1)


@pytest.mark.parametrize(('criterion', 'target', 'cross_entropy'), [
    (None, TARGET, cross_entropy_loop),
    (None, soft_targets(), cross_entropy_loop),
    (F.cross_entropy, TARGET, cross_entropy_loop),
    (nn.CrossEntropyLoss(label_smoothing=0.1), TARGET, smoothed_loop),
    (LabelSmoothingCrossEntropy(0.1), TARGET, smoothed_loop),
    (SoftTargetCrossEntropy(), soft_targets(), cross_entropy_loop),
    (BinaryCrossEntropy(), soft_targets(), binary_loop),
    (BinaryCrossEntropy(smoothing=0), F.one_hot(TARGET, CLASSES).double(), binary_loop),
])
def test_criterion_is_applied_as_given(criterion, target, cross_entropy):
    outputs = make_outputs()
    terms = EKDLoss(criterion=criterion).terms(outputs, target)
    for d in DEPTHS:
        assert terms[f'ce_{d}'].item() == pytest.approx(cross_entropy(outputs[d].logits, target), rel=1e-10)
    expected = loss_loop(outputs, target, cross_entropy=cross_entropy)
    assert terms['loss'].item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize('options', [
    dict(mixup_alpha=1.0),
    dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    dict(mixup_alpha=1.0, cutmix_alpha=1.0, mode='elem'),
])
@pytest.mark.parametrize('criterion', [None, SoftTargetCrossEntropy()])
def test_targets_of_mixup(options, criterion):
    np.random.seed(0)
    index = torch.tensor([1, 4, 0, 2])
    _, target = Mixup(**options, label_smoothing=0.1, num_classes=CLASSES)(torch.rand(4, 3, 8, 8), index)
    assert target.shape == (4, CLASSES)
    assert ((target > 0.1).sum(dim=1) > 1).any()  # something was mixed
    outputs = {
        d: SubNetOutput(torch.cat([o.logits, o.logits[:1]]), [torch.cat([f, f[:1]]) for f in o.features])
        for d, o in make_outputs(dtype=torch.float32).items()
    }
    expected = loss_loop(outputs, target)
    assert EKDLoss(criterion=criterion)(outputs, target).item() == pytest.approx(expected, rel=1e-5)


def test_criterion_gets_every_depth_once_and_the_very_target():
    calls = []

    def criterion(logits, target):
        calls.append((logits, target))
        return logits.sum() * 0 + 2.0

    outputs = make_outputs()
    terms = EKDLoss(alpha=0, beta=0, weights={8: 0.5}, criterion=criterion).terms(outputs, TARGET)
    assert [z is outputs[d].logits for d, (z, _) in zip(DEPTHS, calls, strict=True)] == [True] * 3
    assert all(target is TARGET for _, target in calls)
    assert terms['loss'].item() == 2.0 + 2.0 + 0.5 * 2.0


@pytest.mark.parametrize('criterion', [nn.CrossEntropyLoss(reduction='none'), BinaryCrossEntropy(reduction='none')])
def test_criterion_without_reduction_is_refused(criterion):
    with pytest.raises(ValueError, match=r"must return a scalar.*reduction='mean'") as error:
        EKDLoss(criterion=criterion)(make_outputs(), soft_targets())
    assert type(criterion).__name__ in str(error.value)
    assert str((BATCH,) if isinstance(criterion, nn.CrossEntropyLoss) else (BATCH, CLASSES)) in str(error.value)


def test_criterion_is_a_part_of_the_module():
    criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    loss_fn = EKDLoss(criterion=criterion).to(torch.float64)
    assert criterion.weight.dtype == torch.float64
    assert loss_fn(make_outputs(), TARGET).dtype == torch.float64


# Options

@pytest.mark.parametrize(('options', 'allowed', 'given'), [
    *((dict(temperature=t), 'temperature must be a finite number > 0', repr(t))
      for t in (0, 0.0, -1.0, math.nan, math.inf, None, '4')),
    *((dict(alpha=w), 'alpha must be a finite number >= 0', repr(w)) for w in (-0.1, math.nan, math.inf, None, '1')),
    *((dict(beta=w), 'beta must be a finite number >= 0', repr(w)) for w in (-0.1, math.nan, math.inf, None, '1')),
    *((dict(weights={14: 1.0, 8: w}), 'weight of depth 8 must be a finite number >= 0', repr(w))
      for w in (-2, math.nan, -math.inf, None, '1')),
    *((dict(attention=a), "'energy', 'standardized'", repr(a)) for a in ('softmax', 'Energy', '', None)),
    *((dict(stages=s), 'stages must be one or more indices, or None for all', repr(s))
      for s in ((), [], 0, 2, 'all', ('layer4',), (0, 0.5), (True,))),
    *((dict(weights=w), 'weights must be a mapping from depths, integers', repr(w))
      for w in ([0.5, 1.0], {'14': 0.5}, {14.0: 0.5}, 2.0)),
])
def test_options_out_of_range_are_refused(options, allowed, given):
    with pytest.raises(ValueError) as error:
        EKDLoss(**options)
    assert allowed in str(error.value)
    assert given in str(error.value)


@pytest.mark.parametrize('outputs', [torch.randn(BATCH, CLASSES), {}, [make_outputs()[20]]])
def test_what_is_not_the_outputs_of_depths_is_refused(outputs):
    with pytest.raises(ValueError, match=rf"depth='all'.*got {type(outputs).__name__}"):
        EKDLoss()(outputs, TARGET)


def test_a_weight_for_the_full_net_is_refused():
    with pytest.raises(ValueError, match=r'sub-nets.*full-net 20.*\{20: 0.5\}'):
        EKDLoss(weights={20: 0.5})(make_outputs(), TARGET)


def test_options_are_shown():
    loss_fn = EKDLoss(temperature=4, alpha=0.5, beta=0.25, attention='standardized', stages=[-1], weights={8: 2})
    shown = repr(loss_fn)
    for part in ('temperature=4.0', 'alpha=0.5', 'beta=0.25', "'standardized'", 'stages=(-1,)', '{8: 2.0}', 'CrossE'):
        assert part in shown


# Precision

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_outputs_of_low_precision_are_computed_in_float32(form, dtype):
    outputs = convert(make_outputs(dtype=torch.float32), dtype)
    outputs[20].features[0].mul_(200)  # squares beyond the range of float16
    outputs[8].features[0].mul_(200)
    outputs = as_leaves(outputs)
    loss_fn = EKDLoss(temperature=2.0, attention=form)
    terms = loss_fn.terms(outputs, TARGET)
    expected = loss_fn.terms(convert(outputs, torch.float32), TARGET)
    for name, term in terms.items():
        assert term.dtype == torch.float32, name
        assert torch.equal(term, expected[name]), name
    terms['loss'].backward()
    for d in (14, 8):
        assert all(t.grad.dtype == dtype and t.grad.isfinite().all() and t.grad.any() for t in outputs[d].features)


def test_outputs_in_double_stay_in_double():
    assert {term.dtype for term in EKDLoss().terms(make_outputs(), TARGET).values()} == {torch.float64}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('output_dtype', [torch.bfloat16, torch.float32])
def test_autocast_does_not_reach_the_loss(form, output_dtype):
    outputs = convert(make_outputs(), output_dtype)
    mixing = torch.eye(CLASSES) + 0.1  # a criterion with a product, which autocast would compute in bfloat16
    seen = []

    def criterion(logits, target):
        mixed = logits @ mixing
        seen.append((logits.dtype, mixed.dtype))
        return F.cross_entropy(mixed, target)

    loss_fn = EKDLoss(temperature=2.0, attention=form, criterion=criterion)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
        terms = loss_fn.terms(outputs, TARGET)
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16  # on again
    assert set(seen) == {(torch.float32, torch.float32)}
    expected = loss_fn.terms(convert(outputs, torch.float32), TARGET)
    for name, term in terms.items():
        assert term.dtype == torch.float32, name
        assert torch.equal(term, expected[name]), name
