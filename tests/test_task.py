"""The task in timm's training: what it returns, what it refuses, and EMA, compilation, DDP and checkpoints around it.

The maths of the loss is in `test_loss.py`.
"""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import create, images, logits_by_depth
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.resnet import BasicBlock
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import nn

from timm_ddnn import DynamicDepthCifarResNet, EKDLoss, EKDTask, SubNetOutput

DEPTHS = (12, 10, 8)
CLASSES = 5
TARGET = torch.tensor([1, 4, 0, 2, 1, 3])
TERMS = {'ce_12', 'ce_10', 'ce_8', 'kl_10', 'kl_8', 'attention_10', 'attention_8'}
OPTIONS = dict(temperature=3.0, alpha=0.7, beta=2.0, attention='standardized', stages=(0, -1), weights={8: 0.5})


def tiny(seed=0, **kwargs):
    layers = dict(layers=(2, 2, 1), subnets=((2, 1, 1), (1, 1, 1)))
    return create('ddnn_resnet20', seed, **{**layers, 'num_classes': CLASSES, **kwargs}).train()


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def x(model):
    return images(model, batch=len(TARGET), size=8)


def make_task(model, *args, **kwargs):
    return EKDTask(model, *args, verbose=False, **kwargs)


def step(task, x, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
    optimizer.zero_grad()
    result = task(x, TARGET)
    result['loss'].backward()
    optimizer.step()
    return result


def assert_same_state(state, expected, equal=torch.equal):
    assert list(state) == list(expected)
    for name, value in state.items():
        assert equal(value, expected[name]), name


def sharing(model):
    """Which registered names stand for one tensor."""
    first = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


# Result

def test_is_a_classification_task(model):
    task = make_task(model)
    assert isinstance(task, ClassificationTask)
    assert task.get_trainable_module() is model
    assert task.get_eval_model() is model


def test_the_full_net_trains_alone_on_demand(model, x):
    """Catches sub-nets that learn, or count as trained, in a step that is the full-net's."""
    task = make_task(model)
    task.depth = (12,)
    norms = [norm for norm in model.path_norms(8) if norm not in model.path_norms(12)]
    assert norms
    result = step(task, x)
    assert result.keys() == {'loss', 'ce_12', 'output'}
    assert result['loss'] == result['ce_12']
    assert model.trained_depths == (12,)
    assert not any(norm.num_batches_tracked for norm in norms)
    task.depth = 'all'
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


def test_another_net_teaches_on_demand(model, x):
    """Catches a teacher that is trained, saved, put into another mode, or not let go again."""
    task, teacher, images = make_task(model, **OPTIONS), tiny(seed=1).eval(), x
    names, plain = list(task.state_dict()), task(images, TARGET)
    task.set_teacher(teacher)
    result = task(images, TARGET)
    with torch.no_grad():
        expected = task.loss_fn(model(images, depth='all'), TARGET, teacher(images, depth='all')[12])
    torch.testing.assert_close(result['loss'].detach(), expected)
    assert result.keys() - plain.keys() == {'kl_12', 'attention_12'}
    result['loss'].backward()
    assert all(p.grad is None for p in teacher.parameters()) and all(p.grad is not None for p in model.parameters())
    assert list(task.state_dict()) == names and not any(m is teacher for m in task.modules())
    task.train()
    assert not teacher.training
    task.depth = model.depths[:1]
    assert task(images, TARGET).keys() == {'loss', 'output', 'ce_12', 'kl_12', 'attention_12'}
    task.depth = 'all'
    task.set_teacher(None)
    assert task(images, TARGET).keys() == plain.keys()


def test_any_net_teaches_without_attention(model, x):
    """Catches a teacher that is given images of the model's mean and std, not of its own."""
    teacher = timm.create_model('resnet18', num_classes=CLASSES).eval()
    assert teacher.pretrained_cfg['mean'] != tuple(model.pretrained_cfg['mean'])
    task = make_task(model, beta=0)
    task.set_teacher(teacher)
    result = task(x, TARGET)
    (mean, std), (own_mean, own_std) = (
        [torch.tensor(net.pretrained_cfg[name])[:, None, None] for name in ('mean', 'std')] for net in (model, teacher))
    with torch.no_grad():
        logits = teacher((x * std + mean - own_mean) / own_std)
        expected = task.loss_fn(model(x, depth='all'), TARGET, SubNetOutput(logits, []))
    torch.testing.assert_close(result['loss'].detach(), expected)
    assert {name for name in result if name.startswith('kl')} == {'kl_12', 'kl_10', 'kl_8'}


def test_a_teacher_without_the_classes_or_maps_of_the_model_is_refused(model, x):
    """Catches a teacher that is refused too late, in the first step, or leaves the task without the one before."""
    task, teacher = make_task(model), tiny(seed=1)
    task.set_teacher(teacher)
    expected = task(x, TARGET)
    other = create('ddnn_resnet18', num_classes=CLASSES)
    gray = tiny(in_chans=1)
    maps = r'for beta > 0, teacher must be .* the reductions \[1, 1, 2, 4\], got '
    for wrong, message in [
        (tiny(num_classes=3), 'teacher must have 5 classes, got 3'),
        (model.extract(8), maps + r'CifarResNet and beta=0\.1'),
        (other, maps + r'\[2, 4, 8, 16, 32\] and beta=0\.1'),
        (gray, 'teacher must take images of 3 channels, got 1'),
        (ModelEmaV3(model), 'teacher must be a model of timm, got ModelEmaV3'),
    ]:
        with pytest.raises(ValueError, match=message):
            task.set_teacher(wrong)
        assert torch.equal(task(x, TARGET)['kl_12'], expected['kl_12'])
    with pytest.raises(ValueError, match='a teacher needs alpha or beta to be > 0, got 0 for both'):
        make_task(model, alpha=0, beta=0).set_teacher(teacher)


@pytest.mark.parametrize('name', ['resnet18', 'ddnn_resnet18'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_teacher_of_lower_precision_and_of_gray_images(name, dtype):
    """Catches images that reach the teacher in another precision than that of its weights, or with three channels."""
    model = tiny(in_chans=1).to(dtype)
    teacher = timm.create_model(name, num_classes=CLASSES, in_chans=1).bfloat16()
    gray = images(model, batch=len(TARGET), size=8).to(dtype)
    task = make_task(model, beta=0)
    task.set_teacher(teacher)
    assert task._scale_shift
    assert torch.isfinite(task(gray, TARGET)['loss'])


def test_a_model_without_a_configuration_is_taught_by_its_average(x):
    """Catches a teacher that is refused because nothing is known of the images."""
    model = DynamicDepthCifarResNet(BasicBlock, (2, 2, 1), subnets=((1, 1, 1),), num_classes=CLASSES).train()
    task = make_task(model)
    task.set_teacher(ModelEmaV3(model).module)
    assert not task._scale_shift
    assert task(x, TARGET)['kl_12'] >= 0


def test_one_forward_runs_all_depths(model, x):
    calls = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    make_task(model)(x, TARGET)
    assert calls == [{'depth': 'all'}]


@pytest.mark.parametrize('shared_affine', [True, False])
def test_every_parameter_gets_a_gradient(x, shared_affine):
    model = tiny(shared_affine=shared_affine)
    make_task(model)(x, TARGET)['loss'].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize('shared_affine', [True, False])
def test_clipping_can_leave_out_the_classifier(shared_affine):
    model = tiny(shared_affine=shared_affine)
    task = make_task(model)
    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == everything
    without_head = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert without_head == everything - {id(model.fc.weight), id(model.fc.bias)}


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
    (dict(temperature=0), 'temperature .* > 0, got 0'),
    (dict(alpha=-1), 'alpha .* >= 0, got -1'),
    (dict(attention='softmax'), "'energy', 'standardized'.*'softmax'"),
    (dict(weights={8: -1}), 'depth 8 .* >= 0, got -1'),
    (dict(weights=[8]), r'weights must be a mapping .* got \[8\]'),
    (dict(weights={'8': 1.0, 14: 1.0}), 'weights must be a mapping .* got .*8'),
])
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        make_task(model, **options)


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


# EMA

@pytest.mark.parametrize('shared_affine', [True, False])
def test_ema_averages_and_keeps_sharing(x, shared_affine):
    model = tiny(shared_affine=shared_affine)
    task = make_task(model)
    task.setup_ema(decay=0.75)
    before = copy.deepcopy(model.state_dict())
    step(task, x)
    task.update_ema()
    after, ema = model.state_dict(), task.get_trainable_module(ema=True).module

    assert sharing(ema) == sharing(model)
    assert not {id(t) for t in ema.state_dict(keep_vars=True).values()} & {id(t) for t in model.parameters()}
    expected = {k: 0.75 * v + 0.25 * after[k] if v.is_floating_point() else after[k] for k, v in before.items()}
    assert_same_state(ema.state_dict(), expected, lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-7))
    assert not torch.equal(before['conv1.weight'], after['conv1.weight'])
    assert ema.trained_depths == DEPTHS

    loaded = tiny(seed=1, shared_affine=shared_affine).eval()
    loaded.load_state_dict(ema.state_dict())
    for d, logits in logits_by_depth(ema, x).items():
        assert torch.equal(logits, loaded(x, depth=d))


# Compilation

@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_task_trains_as_an_uncompiled_one(model, x, dynamo):
    expected_task = make_task(copy.deepcopy(model), **OPTIONS)
    task = make_task(model, **OPTIONS)
    task.compile(backend='eager', fullgraph=True)
    for _ in range(2):
        result, expected = step(task, x), step(expected_task, x)
        assert set(result) == set(expected)
        for name, value in result.items():
            assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert_same_state(
        task.get_checkpoint_state()['state_dict'],
        expected_task.get_checkpoint_state()['state_dict'],
        lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-6),
    )
    assert model.trained_depths == DEPTHS
    task.eval()
    with torch.no_grad():
        assert torch.allclose(task.get_eval_model()(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('attention', ['energy', 'standardized'])
def test_model_and_loss_compile_to_one_graph(model, x, attention, dynamo):
    task = make_task(model, temperature=2.0, attention=attention)
    compiled = torch.compile(task, backend='eager', fullgraph=True)
    for amp in (False, True):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=amp):
            result, expected = compiled(x, TARGET), task(x, TARGET)
        assert set(result) == {'loss', 'output'} | TERMS
        assert result['output'].dtype == (torch.bfloat16 if amp else torch.float32)
        for name, value in result.items():
            assert torch.allclose(value, expected[name], rtol=1e-2 if amp else 1e-5, atol=1e-5), name
    result['loss'].backward()
    assert all(p.grad is not None for p in model.parameters())


# Distributed

@pytest.fixture
def process_group(tmp_path, monkeypatch):
    monkeypatch.setenv('GLOO_SOCKET_IFNAME', 'lo')  # 127.0.0.1 and no other interface
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('options', [dict(), dict(static_graph=True), dict(find_unused_parameters=True)])
def test_distributed_steps_equal_ordinary_ones(model, x, options, process_group):
    expected_task = make_task(copy.deepcopy(model), **OPTIONS)
    task = make_task(model, **OPTIONS)
    assert task.prepare_distributed(**options) is task
    assert isinstance(task.get_trainable_module(), nn.parallel.DistributedDataParallel)
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    assert {id(p) for p in model.parameters()} - clipped == {id(p) for p in model.get_classifier().parameters()}
    for _ in range(3):  # from the second on, DDP complains of parameters that the one before left without a gradient
        result, expected = step(task, x), step(expected_task, x)
        assert result['loss'].item() == pytest.approx(expected['loss'].item(), rel=1e-5)
    assert_same_state(
        task.get_checkpoint_state()['state_dict'],
        expected_task.get_checkpoint_state()['state_dict'],
        lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-6),
    )
    assert model.trained_depths == DEPTHS


def test_distributed_gradients_accumulate(model, x, process_group):
    task = make_task(model)
    expected = {k: 2 * g for k, g in gradients(make_task(copy.deepcopy(model)), x).items()}
    task.prepare_distributed()
    with task.no_sync():
        task(x, TARGET)['loss'].backward()
    task(x, TARGET)['loss'].backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-6), name


def gradients(task, x):
    task(x, TARGET)['loss'].backward()
    return {name: parameter.grad for name, parameter in task.get_trainable_module().named_parameters()}


# Checkpoints

@pytest.mark.parametrize('ema', [False, True])
def test_checkpoint_round_trip(model, x, ema, tmp_path):
    task = make_task(model)
    task.setup_ema(decay=0.5)
    step(task, x)
    task.update_ema()
    state = task.get_checkpoint_state(ema=ema)
    assert list(state) == ['state_dict_ema' if ema else 'state_dict']
    torch.save(state, tmp_path / 'checkpoint.pt')
    state, = torch.load(tmp_path / 'checkpoint.pt', weights_only=True).values()

    other = make_task(tiny(seed=1))
    other.setup_ema()
    mine, theirs = (t.get_trainable_module(ema=True).module if ema else t.get_eval_model() for t in (task, other))
    mine.eval(), theirs.eval()
    assert not torch.equal(mine(x), theirs(x))
    other.load_checkpoint_state(state, ema=ema)
    assert_same_state(theirs.state_dict(), mine.state_dict())
    assert theirs.trained_depths == DEPTHS
    for d, logits in logits_by_depth(mine, x).items():
        assert torch.equal(logits, theirs(x, depth=d))

    mine.train(), theirs.train()
    if not ema:  # and training goes on as if nothing had happened
        assert torch.equal(step(task, x)['loss'], step(other, x)['loss'])
        assert_same_state(theirs.state_dict(), mine.state_dict())


def test_a_checkpoint_of_a_task_that_is_damaged_is_refused(model, x):
    task = make_task(model)
    state = dict(task.get_checkpoint_state()['state_dict'])
    del state['layer1.0.conv1.weight']
    with pytest.raises(RuntimeError, match=r'layer1\.0\.conv1\.weight'):
        make_task(tiny(seed=1)).load_checkpoint_state(state, strict=False)
