"""Tools that replace modules or parameters by walking the module tree: every depth follows, or one line refuses.

Each test says which fault it catches.
"""
import copy

import pytest
import timm
import torch
from helpers.models import create, images, logits_by_depth
from timm.layers import convert_splitbn_model, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.layers.norm_act import FrozenBatchNorm2d
from timm.layers.split_batchnorm import SplitBatchNorm2d
from timm.utils import ModelEmaV3, freeze, reparameterize_model, unfreeze
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune

from timm_ddnn.models.shared_weights import SubNetModule
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.modules import find_norms

pytestmark = pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated:DeprecationWarning')


class Doubled(nn.Module):
    """A parametrization, and a module around another."""

    def __init__(self, module=None):
        super().__init__()
        self.module = module
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.factor * (x if self.module is None else self.module(x))


def replace(module, kind, make):
    """Put something in the place of every module of a kind, as adapters do."""
    for name, child in module.named_children():
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            replace(child, kind, make)
    return module


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def norms(model):
    """The full-net's norms: those whose scale and shift the sub-nets use."""
    return [m for m in find_norms(model) if not isinstance(m, SubNetModule)]


def each(modules, change):
    for module in modules:
        change(module)


def double_norms(model):
    each(norms(model), lambda m: parametrize.register_parametrization(m, 'weight', Doubled()))
    return model


def prune_everything(model):
    each([*convolutions(model), *norms(model)], lambda m: prune.l1_unstructured(m, 'weight', amount=0.3))
    return model


def rebuild_stages(model):
    """Put the blocks into new stages, and then change what these hold."""
    for name in ('layer1', 'layer2', 'layer3'):
        setattr(model, name, nn.Sequential(*getattr(model, name)))
    return replace(model, nn.Conv2d, Doubled)


CONVERSIONS = {  # whether logits stay what they were
    'split': (convert_splitbn_model, True),
    'frozen': (freeze_batch_norm_2d, True),
    'frozen and unfrozen': (lambda model: unfreeze_batch_norm_2d(freeze_batch_norm_2d(model)), True),
    'frozen by name': (lambda model: freeze(model) or model, True),
    'frozen and unfrozen by name': (lambda model: freeze(model) or unfreeze(model) or model, True),
    'one stage frozen': (lambda model: freeze(model, ['layer2']) or model, True),
    'reparameterized': (reparameterize_model, True),
    'pruned': (prune_everything, False),
    'parametrized': (double_norms, False),
    'stages rebuilt': (rebuild_stages, False),
    'adapted': (lambda model: replace(model, nn.Conv2d, Doubled), False),
    'weights replaced': (lambda model: each(norms(model), lambda m: setattr(
        m, 'weight', nn.Parameter(m.weight.detach() * 2))) or model, False),
    'averaged': (lambda model: ModelEmaV3(model).module, True),
}


def assert_depths_share(model, x):
    """Every depth runs what its plain net runs, and the depths differ."""
    model.eval()
    logits = logits_by_depth(model, x)
    with torch.no_grad():
        for depth, mine in logits.items():
            torch.testing.assert_close(model.extract(depth).eval()(x), mine, rtol=0, atol=0)
    assert len({tuple(z.flatten().tolist()) for z in logits.values()}) == len(logits)
    return logits


@pytest.mark.parametrize(('kind', 'private'), [
    *((kind, []) for kind in CONVERSIONS),
    *((kind, private) for private in (['affine'], ['affine', 'classifier', 'conv']) for kind in (
        'split', 'frozen', 'frozen and unfrozen', 'pruned', 'parametrized', 'adapted')),
])
def test_every_depth_follows(kind, private):
    """Catches depths whose scale and shift come apart, in silence, and norms or adapters that are found twice."""
    convert, same = CONVERSIONS[kind]
    model = create('ddnn_resnet20', private=private, channels=(4, 8, 16))
    x = images(model, batch=4)
    expected = logits_by_depth(model, x)
    model = convert(model)
    if (private and kind in ('pruned', 'parametrized')) or ('conv' in private and kind == 'adapted'):
        with pytest.raises(InputError, match=r'in the place of .* has no weight, which differs by'):
            model(x, depth=14)
        return
    before = assert_depths_share(model, x)
    assert same == all(torch.allclose(before[d], expected[d], atol=1e-5) for d in expected)

    trained = [p for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in trained}) == len(trained)
    if not trained:
        return
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model.train()
    for depth in ('all', (20,), (14,), (8,)):  # one depth by itself must not see what another has left behind
        optimizer.zero_grad()
        sum(output.logits.square().mean() for output in model(x, depth=depth).values()).backward()
        optimizer.step()
    after = assert_depths_share(model, x)
    assert not any(torch.allclose(after[d], before[d]) for d in before)
    assert_depths_share(copy.deepcopy(model), x)

    again = convert(timm.create_model('ddnn_resnet20', private=private, channels=(4, 8, 16)))
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(z, after[d]) for d, z in logits_by_depth(again.eval(), x).items())


@pytest.mark.parametrize(('convert', 'kind', 'count'), [
    (convert_splitbn_model, SplitBatchNorm2d, 19),
    (freeze_batch_norm_2d, FrozenBatchNorm2d, 19),
    (lambda model: replace(model, nn.Conv2d, Doubled), Doubled, 19),
])
def test_what_is_shared_is_found_once(convert, kind, count):
    """Catches a module that is converted once per path, and so nested in itself."""
    model = convert(create('ddnn_resnet20'))
    found = [m for m in model.modules() if isinstance(m, kind)]
    assert len(found) == count
    assert not [m for outer in found for m in outer.modules() if isinstance(m, kind) and m is not outer]


@pytest.mark.parametrize('private', [[], ['affine', 'classifier', 'conv']])
def test_frozen_norms_stay_as_they_are(private):
    """Catches statistics, scale or shift of a sub-net that move though norms were frozen."""
    model = freeze_batch_norm_2d(create('ddnn_resnet20', private=private))
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    sum(output.logits.mean() for output in model(images(model), depth='all').values()).backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all({'conv1', 'conv2', 'fc', 'trained'} & set(name.split('.')) for name in moved)


def test_weights_go_between_frozen_and_other_models():
    """Catches a model whose state dict loads no more because its norms count no batches."""
    model = create('ddnn_resnet20')
    frozen = freeze_batch_norm_2d(copy.deepcopy(model))
    x = images(model)
    expected = logits_by_depth(model, x)
    other, other_frozen = timm.create_model('ddnn_resnet20'), freeze_batch_norm_2d(timm.create_model('ddnn_resnet20'))
    other.load_state_dict(frozen.state_dict())
    other_frozen.load_state_dict(model.state_dict())
    for net in (other, other_frozen):
        assert all(torch.allclose(z, expected[d], atol=1e-5) for d, z in logits_by_depth(net.eval(), x).items())


def fuse(model):
    """Fold norms into convolutions, as is done before inference."""
    for block in [*model.layer1, *model.layer2, *model.layer3]:
        for conv, norm in (('conv1', 'bn1'), ('conv2', 'bn2')):
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())
    return model


def test_a_norm_that_is_folded_away_is_refused():
    """Catches sub-nets that run with the full-net's statistics."""
    model = create('ddnn_resnet20')
    x = images(model)
    expected = logits_by_depth(model, x)
    plain = fuse(model.extract(14))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), expected[14], rtol=1e-3, atol=1e-4)
        fuse(model)
        torch.testing.assert_close(model(x), expected[20], rtol=1e-3, atol=1e-4)
        for call in (lambda: model(x, depth=14), lambda: model(x, depth='all'), lambda: model.extract(8)):
            message = r'Identity in the place of .* has no running_mean, which differs .* extract\(depth\)'
            with pytest.raises(InputError, match=message):
                call()


def wrap_blocks(model):
    for stage in (model.layer1, model.layer2, model.layer3):
        each(range(len(stage)), lambda i, stage=stage: stage.__setitem__(i, Doubled(stage[i])))


@pytest.mark.parametrize(('convert', 'message'), [
    (wrap_blocks, 'Doubled in the place of layer2.0 has no bn1'),
    (lambda model: setattr(model, 'layer2', Doubled(model.layer2)), 'Doubled above layer2.0 has no 0'),
    (torch.func.replace_all_batch_norm_modules_, 'BatchNorm2d in the place of .* has no running_mean'),
    (lambda model: replace(model, nn.BatchNorm2d, lambda norm: nn.GroupNorm(1, norm.num_features)), 'GroupNorm in the'),
])
def test_what_would_run_without_the_statistics_of_a_depth_is_refused(convert, message):
    """Catches sub-nets that run with the full-net's statistics, or without what was put around its blocks."""
    model = create('ddnn_resnet20', channels=(4, 8, 16))
    convert(model)
    for call in (lambda: model(images(model), depth=14), lambda: model.extract(14)):
        with pytest.raises(InputError, match=message):
            call()


def test_tools_that_go_over_all_modules():
    """Catches a block that says that it has statistics, and a net that is not extracted because of its classifier."""
    model = create('ddnn_resnet20')
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    x = images(model)
    assert torch.equal(model.extract(14)(x), model(x, depth=14))
    each([m for m in model.modules() if hasattr(m, 'reset_running_stats')], lambda m: m.reset_running_stats())
    assert not any(norm.running_mean.any() for norm in find_norms(model))


@pytest.mark.parametrize('depth', [20, 14])
def test_quantization_of_a_traced_model(depth):
    """Catches a depth that cannot be traced for quantization, or loses its statistics there."""
    model = create('ddnn_resnet20', depth=depth)
    x = images(model, batch=8)
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping('x86'), (x,))
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(prepared(x), expected, rtol=1e-3, atol=1e-3)
        quantized = convert_fx(prepared)(x)
    assert (quantized - expected).norm() < 0.2 * expected.norm()
