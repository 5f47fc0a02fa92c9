"""What nets share, and that it survives what users do with models: copies, conversions, compilers."""
import copy
import io
import pickle
from collections import Counter

import pytest
import timm
import torch
from helpers.models import create, images, logits_by_depth, some_at_once
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from timm_ddnn.models import shared_weights
from timm_ddnn.models.shared_weights import SubNetModule
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.modules import find_norms


def assert_shared(model):
    """Every module and tensor is registered once, and a sub-net has for itself the statistics of its norms alone."""
    full = model.blocks(model.depths[0])
    for depth in model.depths[1:]:
        for (path, name), block in zip(model._nodes(depth), model.path(depth), strict=True):
            same = path == full[:len(path)]
            original = model.get_submodule(name)
            assert (block is original) == same == ((path, name) in model._nodes(model.depths[0]))
            assert same or block.original is original
    for named in (model.named_modules, model.named_parameters, model.named_buffers):
        assert len(list(named(remove_duplicate=False))) == len(list(named()))
    assert not [name for name, _ in model.named_parameters() if name.startswith('subnets.')]
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values() if t.numel() and t.device.type != 'meta'}) in (0, len(state))


@pytest.mark.parametrize('name', some_at_once('ddnn_resnet18', 'ddnn_resnet50', 'ddnn_resnet152', 'ddnn_resnet20'))
def test_state_dict_is_the_stock_one_and_the_sub_nets_own_statistics(name):
    model = timm.create_model(name, device='meta')
    stock = model.extract(model.depths[0])
    extra = [k for k in model.state_dict() if k not in stock.state_dict()]
    assert list(model.state_dict())[:len(stock.state_dict())] == list(stock.state_dict())
    assert extra[0] == 'subnets.trained'
    assert all(k.rpartition('.')[2] in ('running_mean', 'running_var', 'num_batches_tracked') for k in extra[1:])
    assert_shared(model)
    assert [p.shape for p in model.parameters()] == [p.shape for p in stock.parameters()]


def test_private_affine_keeps_scale_and_shift_per_path():
    model = create('ddnn_resnet20', private=['affine'])
    x = images(model)
    own = {n for n, _ in model.named_parameters() if n.startswith('subnets.')}
    assert own and all(n.endswith(('weight', 'bias')) for n in own)
    before = logits_by_depth(model, x)
    with torch.no_grad():
        model.layer2[0].bn1.weight.mul_(2)  # at other depths this block has norms of its own
    after = logits_by_depth(model, x)
    assert not torch.equal(before[20], after[20])
    assert torch.equal(before[14], after[14]) and torch.equal(before[8], after[8])
    other = timm.create_model('ddnn_resnet20', private=['affine']).eval()
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert all(torch.equal(a, after[d]) for d, a in logits_by_depth(other, x).items())
    assert torch.equal(model.extract(14)(x), after[14])


def test_private_affine_is_not_lost_in_a_model_that_shares_it():
    """Catches weights that load without a word and give other sub-nets."""
    private, shared = create('ddnn_resnet20', private=['affine']), timm.create_model('ddnn_resnet20')
    message = r"the first being 'subnets.14.layer2.0.bn1.weight': create it with the `private` of the weights"
    for strict in (True, False):
        with pytest.raises(InputError, match=message):
            shared.load_state_dict(private.state_dict(), strict=strict)


def test_weights_that_share_what_is_private_here_compute_the_same():
    """Catches private parts that stay random, and weights of which some are lost that pass for such."""
    shared, x = create('ddnn_resnet20'), torch.randn(2, 3, 32, 32)
    for private in (['affine'], ['classifier', 'conv'], ['affine', 'classifier', 'conv']):
        model = timm.create_model('ddnn_resnet20', private=private).eval()
        model.load_state_dict(shared.state_dict())
        assert all(torch.equal(z, logits_by_depth(shared, x)[d]) for d, z in logits_by_depth(model, x).items())
        state_dict = model.state_dict()
        name = [name for name in state_dict if name.startswith('subnets.14.') and name.endswith('.weight')][-1]
        del state_dict[name]
        for strict in (True, False):
            with pytest.raises(InputError, match=f'damaged or foreign weights: 1 of .*{name}'):
                model.load_state_dict(state_dict, strict=strict)


def test_hooks_of_a_private_module_run_at_every_depth():
    """Catches hooks that see the full-net alone, though what is shared has them at every depth."""
    model, seen = create('ddnn_resnet20', private=['classifier', 'conv']), []
    for module in (model.fc, model.layer2[0].conv1, model.layer2[0].bn1):
        module.register_forward_hook(lambda module, args, out: seen.append(type(module)))
        module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    x = images(model)
    for depth in model.depths:
        assert torch.equal(model(x, depth=depth), model.extract(depth)(x))
    assert Counter(seen) == dict.fromkeys([torch.nn.Linear, torch.nn.Conv2d, torch.nn.BatchNorm2d], 6)


def count_blocks(model, x, depth):
    """Number of executions of every block object in one forward."""
    blocks = {id(block): block for d in model.depths for block in model.path(d)}.values()
    counts = Counter()
    handles = [block.register_forward_hook(lambda m, *_: counts.update([m])) for block in blocks]
    with torch.no_grad():
        model(x, depth=depth)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize(('name', 'expected'), [
    # stage 1 is shared by all nets; behind it each net runs its own path
    ('ddnn_resnet50', 3 + (4 + 6 + 3) + 3 * 2 + 3 * 1),
    ('ddnn_resnet20', 3 + 2 * 3 + 2 * 2 + 2 * 1),
    # 101 and 50 part from 152 in stage 2 and from each other in stage 3: layer2[:4] of all three, layer3[:6] of two
    ('ddnn_resnet152', 3 + (8 + 36 + 3) + (23 + 3) + 3),
    ('ddnn_resnet101', 3 + 4 + (23 + 3) + 3 + (2 + 2 + 2)),
])
def test_blocks_shared_by_several_depths_run_once(name, expected):
    model = timm.create_model(name, device='meta').eval()
    x = torch.empty(1, 3, 64, 64, device='meta')
    counts = count_blocks(model, x, 'all')
    assert set(counts.values()) == {1}
    assert sum(counts.values()) == expected
    for depth in model.depths:
        alone = count_blocks(model, x, depth)
        assert set(alone.values()) == {1} and sum(alone.values()) == sum(model.blocks(depth))
        assert set(alone) <= set(counts)


def test_late_cut_shares_the_prefix_and_needs_no_statistics_of_its_own():
    model = create('ddnn_resnet50', subnets=((3, 4, 6, 1), (3, 4, 3, 3)), channels=(8, 16, 32, 64))
    assert model.depths == (50, 44, 41)
    counts = count_blocks(model, images(model), 'all')
    assert sum(counts.values()) == 16 + 3
    own = [k for k in model.state_dict() if k.startswith('subnets.')]
    assert {k.split('.')[1] for k in own} == {'trained', '41'}
    assert {k.split('.')[2] for k in own[1:]} == {'layer4'}


def test_statistics_follow_the_path():
    """In training each distinct path keeps its own statistics and every shared norm is updated once per forward."""
    model = create('ddnn_resnet152', num_classes=2, channels=(8, 16, 32, 64))
    paths = {d: dict(zip(model._nodes(d), model.path(d), strict=True)) for d in model.depths}
    common = [[block for node, block in paths[d].items() if node in paths[e]] for d, e in ((101, 50), (50, 101))]
    assert len(common[0]) == 3 + 4 + 6 and all(a is b for a, b in zip(*common, strict=True))
    assert [block in model.layer2 for block in common[0]] == [False] * 3 + [True] * 4 + [False] * 6
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items() if k.endswith('num_batches_tracked')}
    with torch.no_grad():
        model(images(model, size=32), depth='all')
    after = model.state_dict()
    assert all(after[k] == n + 1 for k, n in before.items())
    with torch.no_grad():
        model(images(model, size=32), depth=50)
    moved = {k for k, v in model.state_dict().items() if k.endswith('num_batches_tracked') and v == before[k] + 2}
    assert 'layer2.3.bn1.num_batches_tracked' in moved and 'layer2.4.bn1.num_batches_tracked' not in moved
    assert 'subnets.101.layer3.5.bn1.num_batches_tracked' in moved
    assert 'subnets.101.layer3.6.bn1.num_batches_tracked' not in moved


def test_training_one_depth_equals_training_the_plain_net():
    """One step of sub-net 14: gradients and statistics are those of the plain net with the same weights."""
    model = create('ddnn_resnet20').train()
    plain = model.extract(14)
    x = images(model, batch=8)
    model(x, depth=14).square().mean().backward()
    plain(x).square().mean().backward()
    state = model.extract_state_dict(model.state_dict(), 14)
    assert all(torch.equal(state[k], v) for k, v in plain.state_dict().items())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert grads and all(torch.equal(grads[n], p.grad) for n, p in plain.named_parameters())


@pytest.mark.parametrize('copied', ['deepcopy', 'pickle', 'torch.save', 'channels_last', 'double', 'ema'])
def test_sharing_and_logits_survive(small, copied):
    x = images(small)
    expected = logits_by_depth(small, x)
    if copied == 'deepcopy':
        other = copy.deepcopy(small)
    elif copied == 'pickle':
        other = pickle.loads(pickle.dumps(small))
    elif copied == 'torch.save':
        buffer = io.BytesIO()
        torch.save(small, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    elif copied == 'channels_last':
        other = copy.deepcopy(small).to(memory_format=torch.channels_last)
        assert other.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    elif copied == 'double':
        other = copy.deepcopy(small).double().float()
    else:
        other = ModelEmaV3(small, decay=0.5).module
    assert_shared(other)
    assert other.depths == small.depths
    assert all(torch.allclose(a, expected[d], atol=1e-5) for d, a in logits_by_depth(other, x).items())
    with torch.no_grad():
        other.layer1[0].conv1.weight.zero_()
    assert not any(torch.allclose(a, expected[d]) for d, a in logits_by_depth(other, x).items())
    assert all(torch.equal(a, expected[d]) for d, a in logits_by_depth(small, x).items()), 'the original changed'


def test_ema_averages_every_tensor_once(small):
    """Fails if the state dict named a shared tensor twice: it would be averaged twice."""
    ema = ModelEmaV3(small, decay=0.5)
    before = {k: v.clone() for k, v in ema.module.state_dict().items()}
    with torch.no_grad():
        for value in small.state_dict().values():
            if value.is_floating_point():
                value.add_(1)
    ema.update(small)
    for key, value in ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[key] + 0.5)
    assert_shared(ema.module)


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_sharing_survives_sync_batchnorm_conversion(convert):
    """Fails if a shared norm became two, of which only one is updated: its statistics would stay behind."""
    model = create('ddnn_resnet152', channels=(8, 16, 32, 64))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = logits_by_depth(model, images(model, batch=1))
    converted = convert(model)
    norms = [norm.original if isinstance(norm, SubNetModule) else norm for norm in find_norms(converted)]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    converted = copy.deepcopy(converted).double().float()  # parts what only a common buffer holds together
    assert_shared(converted)
    assert list(converted.state_dict()) == list(state)
    logits = logits_by_depth(converted, images(model, batch=1))
    assert all(torch.allclose(logits[d], expected[d], rtol=1e-4) for d in expected)


def test_meta_device_to_empty_and_assign():
    """Leaving the meta device makes new parameters: sub-nets must use the same new ones, whatever they have run."""
    source = create('ddnn_resnet20')
    x = images(source)
    expected = logits_by_depth(source, x)
    for assign in (False, True):
        model = timm.create_model('ddnn_resnet20', device='meta').eval()
        assert model.trained_depths == ()
        logits_by_depth(model, x.to('meta'))
        if not assign:
            model.to_empty(device='cpu')
        model.load_state_dict(source.state_dict(), assign=assign)
        assert_shared(model)
        assert all(torch.equal(a, expected[d]) for d, a in logits_by_depth(model, x).items())


def test_stock_weights_assigned_do_not_tie_statistics():
    """With assign=True a copied statistic could be the very tensor of the full-net's, and move with it."""
    stock = create('cifar_resnet20')
    model = timm.create_model('ddnn_resnet20')
    model.load_state_dict(stock.state_dict(), assign=True)
    assert_shared(model)


@pytest.mark.parametrize('name', ['ddnn_resnet20', 'ddnn_resnet18'])
def test_gradient_checkpointing_at_every_depth(name):
    """Same logits and gradients as without. (Running statistics see a batch twice, in stock timm as well.)"""
    plain, checkpointed = create(name).train(), create(name).train()
    checkpointed.set_grad_checkpointing()
    x = images(plain, batch=4, size=32)
    grads = []
    for model in (plain, checkpointed):
        outputs = model(x, depth='all')
        sum(o.logits.square().mean() for o in outputs.values()).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))
    plain.eval(), checkpointed.eval()
    for depth in plain.depths:
        features = checkpointed(x, depth=(depth,))[depth].features
        assert features[-1].shape[1] == plain.num_features
    calls = []
    original = torch.utils.checkpoint.checkpoint
    try:
        torch.utils.checkpoint.checkpoint = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
        checkpointed(x, depth='all')
    finally:
        torch.utils.checkpoint.checkpoint = original
    assert len(calls) == sum(count_blocks(plain, x, 'all').values())


def test_compile_gives_one_graph_per_depth_and_one_for_all(small):
    """Counts graphs with a backend that only counts; fullgraph=True fails on any graph break."""
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(small, backend=counting, fullgraph=True)
    x = images(small)
    expected = logits_by_depth(small, x)
    with torch.no_grad():
        for _ in range(2):
            for depth in small.depths:
                assert torch.equal(compiled(x, depth=depth), expected[depth])
        assert len(graphs) == len(small.depths)
        for _ in range(2):
            outputs = compiled(x, depth='all')
        assert all(torch.equal(outputs[d].logits, expected[d]) for d in small.depths)
        assert len(graphs) == len(small.depths) + 1
    small.train()
    outputs = compiled(x, depth='all')
    sum(o.logits.mean() for o in outputs.values()).backward()
    assert all(p.grad is not None for p in small.parameters())
    assert len(graphs) == len(small.depths) + 2, 'training takes one graph more'
    assert small.trained_depths == small.depths


@pytest.mark.slow
def test_compiled_by_inductor_agrees(small):
    torch._dynamo.reset()
    compiled = torch.compile(small)
    x = images(small)
    with torch.no_grad():
        outputs = compiled(x, depth='all')
        for depth, expected in logits_by_depth(small, x).items():
            torch.testing.assert_close(outputs[depth].logits, expected, rtol=1e-4, atol=1e-4)


class _ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return self.factor * super().forward(x)


@pytest.mark.skipif(shared_weights._BY_NAMES, reason='this torch.compile reads attributes by the names noted before')
def test_compile_takes_what_a_converted_norm_has():
    """Catches attributes that are noted when the model is made: SyncBatchNorm and its like bring others."""
    model = create('ddnn_resnet20', layers=(2, 2, 2), subnets=((1, 1, 1),), channels=(4, 8, 16)).eval()
    norm = _ScaledNorm(8).eval()
    norm.load_state_dict(model.layer2[0].bn1.state_dict())
    norm.factor = 2.0
    model.layer2[0].bn1 = norm
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend='eager')(x, depth=8), model(x, depth=8))


def test_export_at_a_fixed_depth_and_at_all(small):
    x = images(small)
    expected = logits_by_depth(small, x)
    with torch.no_grad():
        for depth, strict in ((20, False), (8, False), ('all', False), ('all', True)):
            program = torch.export.export(small, (x,), kwargs={'depth': depth}, strict=strict)
            out = program.module()(x, depth=depth)
            if depth == 'all':
                assert all(torch.allclose(out[d].logits, expected[d], atol=1e-5) for d in small.depths)
            else:
                assert torch.allclose(out, expected[depth], atol=1e-5)


def test_layer_decay_and_optimizer_see_every_parameter_once(small):
    optimizer = create_optimizer_v2(small, 'sgd', lr=0.1, layer_decay=0.8)
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    assert len({id(p) for p in parameters}) == len(parameters) == len(list(small.parameters()))
