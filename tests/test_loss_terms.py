"""The terms of the loss, each recomputed in plain loops over Python floats; their sum is in `test_loss.py`."""
import math

import pytest
import torch
from helpers.loss_loops import (
    BATCH,
    DEPTHS,
    FORMS,
    TARGET,
    as_leaves,
    attention_loop,
    kl_loop,
    log_softmax_loop,
    make_outputs,
    transfer_loop,
)

from timm_ddnn import EKDLoss, attention_map, attention_transfer, kl_divergence

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
    loss = EKDLoss(attention=form, stages=None)(outputs, TARGET)
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
