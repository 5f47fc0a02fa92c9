"""The sum of the terms and its options, recomputed in plain loops; what the task makes of it is in `test_task.py`."""
import math
import reprlib

import pytest
import torch
from helpers.loss_loops import (
    BATCH,
    CLASSES,
    DEPTHS,
    FORMS,
    TARGET,
    as_leaves,
    cross_entropy_loop,
    kl_loop,
    loss_loop,
    make_outputs,
    transfer_loop,
)

from timm_ddnn import EKDLoss, SubNetOutput

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
    terms = EKDLoss(temperature=3.0, weights={8: 7.0}, stages=None).terms(outputs, TARGET)
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
    loss_fn = EKDLoss(temperature=3.0, alpha=0.5, beta=0.25, attention=form, weights={8: 7.0}, stages=None)
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
        EKDLoss(weights={14: 0}, stages=None)(outputs, TARGET),
        [outputs[14].logits, outputs[8].logits, *outputs[14].features])
    assert [bool(g.any()) for g in grads] == [False, True, False, False, False]


def test_loss_refuses_maps_of_another_resolution():
    outputs = make_outputs()
    outputs[8].features[1] = torch.randn(BATCH, 3, 2, 3)
    with pytest.raises(ValueError, match=r'\(3, 3, 2, 3\)'):
        EKDLoss(stages=None)(outputs, TARGET)


# Options

@pytest.mark.parametrize(('options', 'allowed', 'given'), [
    *((dict(temperature=t), 'temperature must be a number from 0.01 to 100', reprlib.repr(t))
      for t in (0, 0.0, -1.0, 1e-300, 101, math.nan, math.inf, None, '4', True)),
    *((dict(alpha=w), 'alpha must be a number from 0 to 1e+06', repr(w)) for w in (-0.1, 1e7, math.nan, math.inf, '1')),
    *((dict(beta=w), 'beta must be a number from 0 to 1e+06', repr(w)) for w in (-0.1, math.nan, math.inf, None)),
    *((dict(weights={14: 1.0, 8: w}), 'weight of depth 8 must be a number from 0 to 1e+06', repr(w))
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


@pytest.mark.parametrize('outputs', [
    torch.randn(BATCH, CLASSES), {}, [make_outputs()[20]], {'20': make_outputs()[20]},
    {20: torch.randn(BATCH, CLASSES)},
])
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
