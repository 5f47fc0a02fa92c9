"""The task: what a step returns and trains, and what it refuses. The maths of the loss is in `test_loss.py`."""
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.models import images
from helpers.tiny_task import CLASSES, DEPTHS, OPTIONS, TARGET, TERMS, make_task, step, tiny
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask
from torch import nn

from timm_ddnn import EKDLoss, EKDTask, SubNetOutput
from timm_ddnn.utils.errors import InputError


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def x(model):
    return images(model, batch=len(TARGET), size=8)


# Result

def test_is_a_classification_task(model):
    task = make_task(model)
    assert isinstance(task, ClassificationTask)
    assert task.get_trainable_module() is model
    assert task.get_eval_model() is model


def test_the_full_net_trains_alone_on_demand(model, x):
    """Catches sub-nets that learn, or count as trained, in a step that is the full-net's."""
    task = make_task(model)
    norms = [norm for norm in model.path_norms(8) if norm not in model.path_norms(12)]
    assert norms
    result = step(task, x, depth=(12,))
    assert result.keys() == {'loss', 'ce_12', 'output'}
    assert result['loss'] == result['ce_12']
    assert model.trained_depths == (12,)
    assert not any(norm.num_batches_tracked for norm in norms)
    assert step(task, x).keys() == TERMS | {'loss', 'output'}
    assert model.trained_depths == DEPTHS
    assert all(norm.num_batches_tracked for norm in norms)


@pytest.mark.parametrize(('options', 'missing'), [
    (dict(), set()),
    (dict(alpha=0), {'kl_10', 'kl_8'}),
    (dict(beta=0), {'attention_10', 'attention_8'}),
    (dict(alpha=0, beta=0), {'kl_10', 'kl_8', 'attention_10', 'attention_8'}),
])
def test_result_has_loss_output_and_terms(model, x, options, missing):
    result = make_task(model, **options)(x, TARGET)
    assert set(result) == {'loss', 'output'} | TERMS - missing
    assert all(result[name].ndim == 0 for name in result if name != 'output')
    assert result['output'].shape == (len(TARGET), CLASSES)


@pytest.mark.parametrize('depth', [None, 12, 8])
def test_output_is_the_logits_of_the_full_net(x, depth):
    model = tiny(depth=depth)
    task = make_task(model).eval()
    output = task(x, TARGET)['output']
    assert torch.equal(output, model(x, depth=12))
    assert torch.equal(output, model(x)) == (depth != 8)


def test_only_loss_and_output_carry_gradient(model, x):
    result = make_task(model)(x, TARGET)
    assert {name for name, value in result.items() if value.requires_grad} == {'loss', 'output'}


@pytest.mark.parametrize('options', [dict(), OPTIONS])
def test_loss_is_that_of_ekd_loss_with_the_options(model, x, options):
    result = make_task(model, **options)(x, TARGET)
    terms = EKDLoss(**options).terms(model(x, depth='all'), TARGET)
    assert set(result) == {*terms, 'output'}
    for name, term in terms.items():
        assert torch.equal(result[name], term), name
    expected = result['ce_12'].item()
    for d in (10, 8):
        part = result[f'ce_{d}'] + options.get('alpha', 0.3) * result[f'kl_{d}']
        part += options.get('beta', 0.1) * result[f'attention_{d}']
        expected += options.get('weights', {}).get(d, 1.0) * part.item()
    assert result['loss'].item() == pytest.approx(expected, rel=1e-6)
    assert all(result[name] > 1e-4 for name in TERMS), 'depths compute the same, the test shows nothing'


def test_one_forward_runs_all_depths(model, x):
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    make_task(model)(x, TARGET)
    assert calls == [{'depth': 'all'}]


@pytest.mark.parametrize('private', [[], ['affine', 'classifier', 'conv']])
def test_every_parameter_gets_a_gradient(x, private):
    model = tiny(private=private)
    make_task(model)(x, TARGET)['loss'].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize('private', [[], ['affine', 'classifier', 'conv']])
def test_clipping_can_leave_out_the_classifier(private):
    model = tiny(private=private)
    task = make_task(model)
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == everything
    without_head = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    head = {id(p) for name, p in model.named_parameters() if 'fc' in name.split('.')}
    assert without_head == everything - head and len(head) == (6 if private else 2)


def test_training_lowers_the_cross_entropy_of_every_depth(model, x):
    task = make_task(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    results = [step(task, x, optimizer) for _ in range(20)]
    for d in DEPTHS:
        assert results[-1][f'ce_{d}'] < 0.5 * results[0][f'ce_{d}'], d


def test_a_training_step_marks_all_depths_as_trained(model, x):
    task = make_task(model)
    assert model.trained_depths == ()
    with torch.no_grad():
        task(x, TARGET)
    task.eval()(x, TARGET)
    assert model.trained_depths == ()
    step(task.train(), x)
    assert model.trained_depths == DEPTHS


def test_a_model_without_sub_nets_is_trained_by_cross_entropy(x):
    model = tiny(subnets=())
    result = make_task(model)(x, TARGET)
    assert set(result) == {'loss', 'output', 'ce_12'}
    assert result['loss'].item() == pytest.approx(F.cross_entropy(model(x), TARGET).item(), rel=1e-6)


def test_autocast_reaches_the_model_and_not_the_loss(model, x):
    task = make_task(model, **OPTIONS)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        result = task(x, TARGET)
        outputs = model(x, depth='all')
    assert result['output'].dtype == torch.bfloat16
    assert {result[name].dtype for name in ('loss', *TERMS)} == {torch.float32}
    outputs = {d: SubNetOutput(o.logits.float(), [f.float() for f in o.features]) for d, o in outputs.items()}
    assert torch.equal(result['loss'], EKDLoss(**OPTIONS)(outputs, TARGET))
    result['loss'].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_task_follows_to_another_type(model, x):
    task = make_task(model, criterion_kwargs=dict(loss_type='bce', class_weight=[1.0, 2.0, 1.0, 1.0, 1.0]))
    result = task.to(torch.float64)(x.double(), F.one_hot(TARGET, CLASSES).double())
    assert task.dtype == torch.float64
    assert {value.dtype for value in result.values()} == {torch.float64}


def test_device_and_type_are_those_of_a_timm_task(model):
    criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))
    task = make_task(model, criterion, device=torch.device('meta'), dtype=torch.bfloat16)
    assert (task.device, task.dtype) == (torch.device('meta'), torch.bfloat16)
    assert criterion.weight.device.type == 'meta'


@pytest.mark.parametrize('verbose', [True, False])
def test_verbose_logs(model, verbose, caplog):
    with caplog.at_level('INFO'):
        EKDTask(model, verbose=verbose, temperature=7)
    assert ('EKDTask' in caplog.text) == verbose
    assert ('temperature=7.0' in caplog.text) == verbose


# Criterion

def test_criterion_is_cross_entropy_by_default(model, x):
    result = make_task(model)(x, TARGET)
    assert result['ce_12'].item() == pytest.approx(F.cross_entropy(result['output'], TARGET).item(), rel=1e-6)


@pytest.mark.parametrize(('criterion_kwargs', 'criterion'), [
    (dict(smoothing=0.1), LabelSmoothingCrossEntropy(0.1)),
    (dict(soft_targets=True), SoftTargetCrossEntropy()),
    (dict(loss_type='bce', smoothing=0.1), BinaryCrossEntropy(0.1)),
])
def test_criterion_given_or_created_by_timm(model, x, criterion_kwargs, criterion):
    target = F.one_hot(TARGET, CLASSES).float() if 'soft_targets' in criterion_kwargs else TARGET
    created, given = make_task(model, criterion_kwargs=criterion_kwargs), make_task(model, criterion)
    assert type(created.criterion) is type(criterion)
    assert given.criterion is criterion
    for task in (created, given):
        result = task(x, target)
        assert result['ce_12'].item() == pytest.approx(criterion(result['output'], target).item(), rel=1e-6)


def test_criterion_and_its_arguments_together_are_refused(model):
    with pytest.raises(ValueError, match='smoothing'):
        make_task(model, nn.CrossEntropyLoss(), criterion_kwargs=dict(smoothing=0.1))


def test_targets_of_mixup(model, x):
    np.random.seed(0)
    images_mixed, target = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, num_classes=CLASSES)(x.clone(), TARGET)
    assert not torch.equal(images_mixed, x)
    result = make_task(model, criterion_kwargs=dict(soft_targets=True))(images_mixed, target)
    log_probs = F.log_softmax(result['output'], dim=1).tolist()
    expected = -sum(p * q for ps, qs in zip(target.tolist(), log_probs, strict=True)
                    for p, q in zip(ps, qs, strict=True)) / len(target)
    assert result['ce_12'].item() == pytest.approx(expected, rel=1e-5)


# What is refused

@pytest.mark.parametrize('make', [
    lambda: timm.create_model('test_resnet'),
    lambda: nn.DataParallel(timm.create_model('test_resnet')),
    lambda: tiny().extract(8),
    lambda: nn.Linear(2, 2),
    lambda: timm.create_model('tiny_vit_5m_224', device='meta'),  # it has an attribute `depths`
])
def test_a_stock_model_is_refused(make):
    with pytest.raises(ValueError, match=r'dynamic-depth models.*got (ResNet|CifarResNet|Linear|TinyVit)'):
        make_task(make())


@pytest.mark.parametrize('weights', [{26: 1.0}, {10: 1.0, 14: 0.5}, {12: 1.0}])
def test_weights_for_what_is_no_sub_net_are_refused(model, weights):
    with pytest.raises(ValueError, match=r'\(10, 8\)') as error:
        make_task(model, weights=weights)
    assert str([d for d in weights if d != 10]) in str(error.value)


@pytest.mark.parametrize(('options', 'message'), [
    (dict(temperature=0), 'temperature .* from 0.01 to 100, got 0'),
    (dict(alpha=-1), r'alpha .* from 0 to 1e\+06, got -1'),
    (dict(attention='softmax'), "'energy', 'standardized'.*'softmax'"),
    (dict(weights={8: -1}), 'depth 8 .* from 0 to .*, got -1'),
    (dict(weights=[8]), r'weights must be a mapping .* got \[8\]'),
    (dict(weights={'8': 1.0, 14: 1.0}), 'weights must be a mapping .* got .*8'),
])
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(model, **options)


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(InputError, match='needs a classifier, num_classes of at least 1, got 0'):
        make_task(tiny(num_classes=0))


def test_an_unknown_option_is_refused(model):
    with pytest.raises(TypeError, match='gamma'):
        make_task(model, gamma=1)


def test_a_wrapped_model_is_trained_through_its_wrapper(x):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapper = Wrapper(tiny())
    assert set(make_task(wrapper)(x, TARGET)) == {'loss', 'output'} | TERMS
    assert wrapper.calls == 1
