"""What the loss does to gradients, and with which criterion, targets and precision it is computed."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.loss_loops import (
    BATCH,
    CLASSES,
    DEPTHS,
    FORMS,
    SHAPES,
    TARGET,
    as_leaves,
    binary_loop,
    convert,
    cross_entropy_loop,
    log_softmax_loop,
    loss_loop,
    make_outputs,
    smoothed_loop,
)
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from timm_ddnn import EKDLoss, SubNetOutput, attention_map, attention_transfer, kl_divergence

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
    loss = EKDLoss(temperature=2.0, alpha=5.0, beta=5.0, attention=form, stages=None)(outputs, TARGET)
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


# Precision

@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_outputs_of_low_precision_are_computed_in_float32(form, dtype):
    outputs = convert(make_outputs(dtype=torch.float32), dtype)
    outputs[20].features[0].mul_(200)  # squares beyond the range of float16
    outputs[8].features[0].mul_(200)
    outputs = as_leaves(outputs)
    loss_fn = EKDLoss(temperature=2.0, attention=form, stages=None)
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
