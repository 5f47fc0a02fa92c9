"""The task in training: EMA, compilation, DDP and checkpoints around it."""
import copy

import pytest
import torch
from helpers.models import images, logits_by_depth
from helpers.tiny_task import DEPTHS, OPTIONS, TARGET, TERMS, assert_same_state, make_task, step, tiny
from torch import nn

from timm_ddnn.utils.errors import InputError


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def x(model):
    return images(model, batch=len(TARGET), size=8)


# EMA

@pytest.mark.parametrize('private', [[], ['affine', 'classifier', 'conv']])
def test_ema_averages_and_keeps_sharing(x, private):
    model = tiny(private=private)
    task = make_task(model)
    task.setup_ema(decay=0.75)
    before = copy.deepcopy(model.state_dict())
    step(task, x)
    task.update_ema()
    after, ema = model.state_dict(), task.get_trainable_module(ema=True).module

    assert not {id(t) for t in ema.state_dict(keep_vars=True).values()} & {id(t) for t in model.parameters()}
    expected = {k: 0.75 * v + 0.25 * after[k] if v.is_floating_point() else after[k] for k, v in before.items()}
    assert_same_state(ema.state_dict(), expected, lambda a, b: torch.allclose(a, b, rtol=1e-5, atol=1e-7))
    assert not torch.equal(before['conv1.weight'], after['conv1.weight'])
    assert ema.trained_depths == DEPTHS

    loaded = tiny(seed=1, private=private).eval()
    loaded.load_state_dict(ema.state_dict())
    for d, logits in logits_by_depth(ema, x).items():
        assert torch.equal(logits, loaded(x, depth=d))


# Compilation

@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
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


@pytest.mark.parametrize('attention', ['energy', pytest.param('standardized', marks=pytest.mark.slow)])
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
    with pytest.raises(InputError, match=r'layer1\.0\.conv1\.weight'):
        make_task(tiny(seed=1)).load_checkpoint_state(state, strict=False)
