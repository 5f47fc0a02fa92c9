"""Families of timm other than ResNet: what `make_dynamic` makes of a small net of each, at every depth."""
import copy
from functools import cache

import pytest
import timm
import torch

from timm_ddnn import EKDTask, make_dynamic
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.load import load_model
from timm_ddnn.utils.modules import find_norms

# Small nets: name, arguments that make them narrow, px
SMALL = {
    'convnext': ('convnext_atto', dict(depths=(2, 1, 3, 1), dims=(8, 16, 24, 32)), 64),
    'convnextv2': ('convnextv2_atto', dict(depths=(2, 1, 3, 1), dims=(8, 16, 24, 32)), 64),
    'vit': ('vit_tiny_patch16_224', dict(img_size=48, embed_dim=24, depth=6), 48),
    'vit_registers': (
        'vit_small_patch14_reg4_dinov2', dict(img_size=56, embed_dim=24, num_heads=3, depth=6, num_classes=10), 56),
    'vit_pooled': ('vit_base_patch16_gap_224', dict(img_size=32, embed_dim=24, num_heads=3, depth=6), 32),
    'deit3': ('deit3_small_patch16_224', dict(img_size=32, embed_dim=24, num_heads=3, depth=6), 32),
}
FAMILIES = list(SMALL)


def randomize(model):
    """Give norms, layer scales and statistics values with which blocks do something: depths then differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.2, 0.8, generator=generator)
    return model


@cache
def small_net(family):
    name, kwargs, _ = SMALL[family]
    torch.manual_seed(0)
    return randomize(timm.create_model(name, **{'num_classes': 10, **kwargs})).eval()


def small(family, subnets=None, **kwargs):
    """A dynamic model with weights of its own, and images for it."""
    model = randomize(make_dynamic(copy.deepcopy(small_net(family)), subnets, **kwargs)).eval()
    size = SMALL[family][2]
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('family', FAMILIES)
def test_every_depth_equals_the_plain_net_that_timm_rebuilds(family):
    """Fails if a depth runs other blocks or norms, its features are laid out wrongly, or its config builds another."""
    model, x = small(family)
    plain_cls = type(small_net(family))
    with torch.no_grad():
        together = model(x, depth='all')
        assert torch.equal(model(x), together[model.depths[0]].logits)
        for depth in model.depths:
            plain = model.extract(depth)
            assert type(plain) is plain_cls and not plain.training
            logits = model(x, depth=depth)
            assert torch.equal(logits, plain(x)) and logits.isfinite().all()
            assert torch.equal(logits, together[depth].logits)
            last, maps = plain.forward_intermediates(x)
            mine = model.forward_intermediates(x, depth=depth)
            assert torch.equal(mine[0], last) and all(map(torch.equal, mine[1], maps))
            assert torch.equal(together[depth].features[-1], maps[-1]), 'channels first, without class token'
            features = model.forward_features(x, depth=depth)
            assert torch.equal(features, plain.forward_features(x))
            assert torch.equal(model.forward_head(features, depth=depth), logits)
            again = timm.create_model(
                plain.pretrained_cfg['architecture'], num_classes=model.num_classes, **{
                    k: v for k, v in plain._model_args.items() if k != 'num_classes'}).eval()
            assert type(again) is plain_cls
            again.load_state_dict(model.extract_state_dict(model.state_dict(), depth))
            assert torch.equal(again(x), logits)
    assert len({tuple(output.logits.flatten().tolist()) for output in together.values()}) == len(model.depths)


@pytest.mark.parametrize('family', FAMILIES)
def test_weights_are_shared_and_prefixes_run_once(family):
    model, x = small(family)
    full = small_net(family)
    state = model.state_dict()
    assert list(state)[:len(full.state_dict())] == list(full.state_dict())
    own = [k for k in state if k not in full.state_dict()]
    assert own[0] == 'subnets.trained'
    assert all(k.rpartition('.')[2] in ('running_mean', 'running_var', 'num_batches_tracked') for k in own[1:])
    assert bool(own[1:]) == bool(find_norms(full))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in full.parameters())
    calls = []
    for block in {id(block): block for d in model.depths for block in model.path(d)}.values():
        block.register_forward_hook(lambda module, *_: calls.append(id(module)))
    with torch.no_grad():
        model(x, depth='all')
    starts = {}  # a block runs once for each path to it
    for depth in model.depths:
        blocks = model.blocks(depth)
        for stage, count in enumerate(blocks):
            for place in range(count):
                starts[blocks[:stage], stage, place] = depth
    assert len(calls) == len(starts)


@pytest.mark.parametrize('family', FAMILIES)
def test_training_lowers_the_loss_of_every_depth(family):
    model, x = small(family)
    task = EKDTask(model.train(), verbose=False)
    target = torch.tensor([3, 7])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(8):
        terms = task(x, target)
        optimizer.zero_grad()
        terms['loss'].backward()
        assert not [n for n, p in model.named_parameters() if p.grad is None]
        optimizer.step()
        seen.append({k: v.item() for k, v in terms.items() if k.startswith('ce_')})
    assert set(seen[0]) == {f'ce_{d}' for d in model.depths}
    assert all(seen[-1][name] < 0.9 * seen[0][name] for name in seen[0]), seen
    assert model.trained_depths == model.depths


@pytest.mark.parametrize('family', FAMILIES)
def test_saved_models_and_plain_nets_come_back(family, tmp_path):
    model, x = small(family)
    size = SMALL[family][2]
    for name, net in (('model', model), ('plain', model.extract(model.depths[-1]))):
        (tmp_path / name).mkdir()
        save_model(net, tmp_path / name, data_config=dict(input_size=(3, size, size)), class_names=[], rows=[])
    again, plain = load_model(str(tmp_path / 'model')), timm.create_model(f'local-dir:{tmp_path / "plain"}', True)
    with torch.no_grad():
        for depth, output in again(x, depth='all').items():
            assert torch.equal(output.logits, model(x, depth=depth))
        assert torch.equal(plain.eval()(x), model(x, depth=model.depths[-1]))
    assert type(again) is type(model) and again.blocks(again.depths[1]) == model.blocks(model.depths[1])
    extractor = timm.create_model(
        f'local-dir:{tmp_path / "model"}', True, features_only=True, depth=model.depths[1]).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(x, 1, depth=model.depths[1], intermediates_only=True)
        last = extractor(x)[-1]
    assert torch.equal(last if extractor.output_fmt == 'NCHW' else last.permute(0, 3, 1, 2), maps[0])


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_compilers_take_every_depth(family):
    """torch.compile makes one graph for each depth, and plain nets are exported and scripted as timm's."""
    model, x = small(family)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    with torch.no_grad():
        for depth in model.depths:
            assert torch.equal(compiled(x, depth=depth), model(x, depth=depth))
        shallow = model.depths[-1]
        assert torch.equal(compiled(x, depth='all')[shallow].logits, model(x, depth=shallow))
        program = torch.export.export(model.extract(shallow), (x,))
        assert torch.allclose(program.module()(x), model(x, depth=shallow), atol=1e-5)
        assert torch.equal(torch.jit.script(model.extract(shallow))(x), model(x, depth=shallow))
