"""Families of timm: what `make_dynamic` makes of a small net of each, at every depth, and of timm's names."""
import copy
from collections import Counter

import pytest
import timm
import torch
import torch._dynamo.testing
from helpers.families import SMALL, small, small_net
from helpers.loss_loops import FORMS, transfer_loop
from timm.layers import create_feature_extractor, get_graph_node_names

from timm_ddnn import EKDLoss, EKDTask, calibrate_bn, make_dynamic
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.load import load_model
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.modules import find_norms

MORE = 'convnextv2', 'vit_pooled', 'deit3', 'regnetz', 'mobilenetv3', 'bit', 'wide_resnet'  # in `make test-all`
FAMILIES = [pytest.param(family, marks=pytest.mark.slow) if family in MORE else family for family in SMALL]


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
        found = extractor(x)
        maps = model.forward_intermediates(x, len(found), depth=model.depths[1], intermediates_only=True)
    for mine, expected in zip(found, maps, strict=True):
        assert torch.equal(mine if extractor.output_fmt == 'NCHW' else mine.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('family', ['vit_registers', 'swin'])
def test_attention_of_tokens_is_that_of_plain_loops(family, form):
    """Catches class or register tokens in the map, rows for columns, and channels last that are read as first."""
    model, x = small(family)
    model, x = model.double(), x.double()
    outputs = model(x, depth='all')
    terms = EKDLoss(attention=form, stages=None).terms(outputs, torch.tensor([3, 7]))
    full, *subnets = model.depths
    maps = {}  # by depth and stage: nested lists [B][C][H][W]
    for depth in model.depths:
        net, seen = model.extract(depth), []
        stages = [net.blocks] if family != 'swin' else [layer.blocks for layer in net.layers]
        for stage in stages:
            stage.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.tolist()))
        net(x)
        for s, images in enumerate(seen):
            if family != 'swin':  # [B][N][C]: 4 rows of 4 tokens behind the class token and the registers
                images = [[image[5 + 4 * row:9 + 4 * row] for row in range(4)] for image in images]
            maps[depth, s] = [
                [[[pixel[c] for pixel in row] for row in image] for c in range(len(image[0][0]))] for image in images]
    for depth in subnets:
        expected = sum(
            transfer_loop(*(torch.tensor(maps[d, s], dtype=torch.float64) for d in (depth, full)), form)
            for s in range(len(stages)))
        assert terms[f'attention_{depth}'].item() == pytest.approx(expected, rel=1e-3)
        assert expected > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_torch_fx_traces_every_depth(family):
    """By what timm's own tests trace its models with, a forward and a backward."""
    model, x = small(family)
    for depth in model.depths:
        model.default_depth = depth
        traced = create_feature_extractor(model, get_graph_node_names(model)[1][-1:])
        logits, = traced(x).values()
        assert torch.equal(logits, model(x, depth=depth))
        logits.sum().backward()
        assert all(p.grad is not None for p in traced.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_compilers_take_every_depth(family):
    """torch.compile makes one graph for each depth, and plain nets are exported and scripted as timm's."""
    private = ['final_norm', 'classifier'] if family in ('convnext', 'vit_pooled') else []  # in the head
    model, x = small(family, private=private)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for depth in model.depths * 2:
            assert torch.equal(compiled(x, depth=depth), model(x, depth=depth))
        assert counter.frame_count == len(model.depths)
        shallow = model.depths[-1]
        assert torch.equal(compiled(x, depth='all')[shallow].logits, model(x, depth=shallow))
        program = torch.export.export(model.extract(shallow), (x,))
        assert torch.allclose(program.module()(x), model(x, depth=shallow), atol=1e-5)
        assert torch.equal(torch.jit.script(model.extract(shallow))(x), model(x, depth=shallow))


# Names of timm that are tried on the meta device, but for the largest of them
PATTERNS = (
    'convnext*', 'vit_*_patch*', 'deit*', 'swin_*', 'regnet*', 'efficientnet_b*', 'efficientnetv2*', 'tf_efficientnet*',
    'mobilenetv*', 'resnetv2*', 'resnet*', 'tinynet*', 'lcnet*', 'mixnet*', 'fbnet*', 'mnasnet*')
LARGE = 'large', 'huge', 'giant', 'gigantic', 'xlarge', 'so150m', 'so400m', '_l', '1280', '2560', '640', 'x4', 'x3'


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_names_of_timm_on_the_meta_device():
    """At least 200 names of at least 6 families: depths, equal shapes of maps and weights, and a plain net of timm."""
    made, refused = Counter(), {}
    for name in sorted({n for pattern in PATTERNS for n in timm.list_models(pattern)}):
        if any(part in name for part in LARGE):
            continue
        try:
            model = make_dynamic(name, device='meta').eval()
        except InputError as e:
            refused[name] = str(e)
            continue
        cfg = model.pretrained_cfg
        px = cfg['input_size'][-1] if cfg.get('fixed_input_size') else 64
        outputs = model(torch.empty(1, 3, px, px, device='meta'), depth='all')
        assert tuple(outputs) == model.depths and len(outputs) > 1
        maps = [[f.shape for f in output.features] for output in outputs.values()]
        assert all(m == maps[0] for m in maps)
        shallow = model.depths[-1]
        plain = model.extract(shallow)
        assert {k: v.shape for k, v in plain.state_dict().items()} == {
            k: v.shape for k, v in model.extract_state_dict(model.state_dict(), shallow).items()}
        made[type(model).__name__] += 1
    assert sum(made.values()) >= 200 and len(made) >= 6, made
    reasons = 'nets of several depths are made of', 'more than one block that may be left out', 'patch_drop_rate'
    assert all(any(reason in message for reason in reasons) for message in refused.values()), refused


def test_what_cannot_be_made_is_one_line_that_says_why():
    for name, message in (
            ('deit_tiny_distilled_patch16_224', 'made of .*VisionTransformer, not of VisionTransformerDistilled'),
            ('vgg11', 'not of VGG'), ('resnet10t', 'more than one block'), ('no_such_net', "got 'no_such_net'"),
            ('vit_tiny_patch16_224.none', 'with or without one of its tags')):
        with pytest.raises(InputError, match=message):
            make_dynamic(name, device='meta')
    with pytest.raises(InputError, match="DynamicDepthRegNet has no 'final_norm'"):
        make_dynamic('regnety_002', private=['final_norm'])
    net = timm.create_model('mobilenetv4_conv_small', device='meta')
    with pytest.raises(InputError, match=r'blocks\.1\.1 changes the shape .* at least 2 blocks, got 1'):
        make_dynamic(net, ((1, 1, 1, 1, 1),))
    with pytest.raises(InputError, match=r'arguments must be of .* where a net is given'):
        make_dynamic(net, num_classes=10)


def test_statistics_of_a_new_sub_net_are_calibrated_alone():
    """Tail and head norms, as those of MobileNetV4, are kept per depth too."""
    model, x = small('mobilenetv4')
    with torch.no_grad():
        before = {d: model(x, depth=d) for d in model.depths}
        depth = model.add_subnet((1, 2, 3, 3, 1))
        uncalibrated = model(x, depth=depth)
        assert calibrate_bn(model, [x], depth) == 2
        assert not torch.equal(model(x, depth=depth), uncalibrated)
        assert torch.equal(model.extract(depth)(x), model(x, depth=depth))
        assert all(torch.equal(model(x, depth=d), logits) for d, logits in before.items())
    assert any(k.startswith(f'subnets.{depth}.norm_head.') for k in model.state_dict())


@pytest.mark.parametrize(('family', 'private'), [
    ('vit', ['final_norm', 'classifier']), ('convnext', ['final_norm', 'classifier', 'conv']),
    ('regnet', ['affine', 'classifier', 'conv']), *(
        pytest.param(family, private, marks=pytest.mark.slow) for family, private in (
            ('vit_pooled', ['final_norm']), ('swin', ['final_norm', 'conv']), ('bit', ['final_norm', 'conv']),
            ('efficientnet', ['classifier', 'conv']), ('mobilenetv3', ['classifier', 'conv']),
            ('wide_resnet', ['affine', 'classifier', 'conv'])))])
def test_private_parts_are_kept_extracted_and_saved(family, private, tmp_path):
    """Catches a part that stays shared, is lost when saved or extracted, or gets no gradient."""
    model, x = small(family, private=private)
    shared = small_net(family)
    own = {name: p for name, p in model.named_parameters() if name.startswith('subnets.')}
    with torch.no_grad():
        for i, p in enumerate(own.values()):  # each its own values
            p.mul_(1 + 0.01 * i)
    for depth in model.depths[1:]:
        names = [name for name in own if name.startswith(f'subnets.{depth}.')]
        if 'final_norm' in private:
            assert sum(own[name].ndim == 1 and 'norm' in name for name in names) == 2
        if 'classifier' in private:
            assert f'subnets.{depth}.{model.pretrained_cfg["classifier"]}.weight' in names
    assert ('conv' in private) == any(p.ndim > 1 and len(p) != model.num_classes for p in own.values())
    size = SMALL[family][2]
    save_model(model, tmp_path, data_config=dict(input_size=(3, size, size)), class_names=[], rows=[])
    again = load_model(str(tmp_path)).eval()
    with torch.no_grad():
        for depth, output in model(x, depth='all').items():
            plain = model.extract(depth)
            assert type(plain) is type(shared) and 'private' not in plain._model_args
            assert torch.equal(plain(x), output.logits) and torch.equal(again(x, depth=depth), output.logits)
            plain.load_state_dict(model.extract_state_dict(model.state_dict(), depth))
            assert torch.equal(plain(x), output.logits)
            features = model.forward_features(x, depth=depth)
            pooled = model.forward_head(features, pre_logits=True, depth=depth)
            assert torch.equal(pooled, plain.forward_head(features, pre_logits=True))
    sum(output.logits.square().sum() for output in model.train()(x, depth='all').values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in own.values())
    alone, common = (make_dynamic(copy.deepcopy(shared), private=kinds).eval() for kinds in (private, []))
    with torch.no_grad():
        for depth in model.depths:  # they begin as copies of the full-net's, of a stock net's weights too
            assert torch.equal(alone(x, depth=depth), common(x, depth=depth))
        for weights in (shared, common):  # of the full-net alone, and of sub-nets that share
            model.load_state_dict(weights.state_dict())
            for depth in model.depths:
                assert torch.equal(model.eval()(x, depth=depth), common(x, depth=depth))
    with pytest.raises(InputError, match='create it with the `private` of the weights'):
        common.load_state_dict(again.state_dict())


@pytest.mark.parametrize('family', ['convnext', 'wide_resnet'])
def test_private_classifiers_are_of_the_classes_asked_for(family, tmp_path):
    """Catches sub-nets that keep a classifier of other classes, or lose their norm with it."""
    norm = ['final_norm'] if family == 'convnext' else []
    model, x = small(family, private=['classifier', *norm])
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if 'norm' in name}
    size = SMALL[family][2]
    save_model(model, tmp_path, data_config=dict(input_size=(3, size, size)), class_names=[], rows=[])
    for count in (3, 0, 5):
        model.reset_classifier(count)
        for depth, output in model(x, depth='all').items():
            assert output.logits.shape == (2, count or model.num_features)
            assert torch.equal(output.logits, model.extract(depth)(x))
        private = {id(classifier) for classifier in model.get_classifiers()}
        assert len(private) == (len(model.depths) if count else 1)
        assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3).eval()
    assert {output.logits.shape for output in other(x, depth='all').values()} == {(2, 3)}
    assert all(torch.equal(p, kept[name]) for name, p in other.named_parameters() if name in kept)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=0).eval()
    assert features(x, depth=features.depths[-1]).shape == (2, model.num_features)
    model.prune_intermediate_layers([0], prune_head=False)
    model.reset_classifier(3)
    assert len(model.get_classifiers()) == len({model.blocks(depth) for depth in model.depths})  # equal nets have one


def test_pruning_and_gradient_checkpointing_at_every_depth():
    for family in ('convnext', 'vit', 'regnet'):
        model, x = small(family)
        expected = model(x, depth='all')
        model.set_grad_checkpointing(True)
        for depth, output in model.train()(x, depth='all').items():
            if not find_norms(model):
                assert torch.allclose(output.logits, expected[depth].logits, atol=1e-5)
        model.eval().set_grad_checkpointing(False)
        taps = {d: model.forward_intermediates(x, [1], depth=d, intermediates_only=True)[0] for d in model.depths}
        model.prune_intermediate_layers([1])
        for depth, tap in taps.items():
            assert torch.equal(model.forward_intermediates(x, [1], depth=depth, intermediates_only=True)[0], tap)
