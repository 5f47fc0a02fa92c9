"""Every entrypoint at every depth: what timm promises of its models, and equality with the plain nets."""
import threading
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from helpers.models import EXPECTED_DEPTHS, FAMILY_DEPTHS, create, images, logits_by_depth, narrow, some_at_once
from timm.layers import BlurPool2d, DropBlock2d, SelectiveKernel, SEModule
from timm.models._manipulate import group_parameters

from timm_ddnn import CifarResNet, calibrate_bn
from timm_ddnn.models.load import create_ddnn
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.modules import find_norms

NAMES = list(EXPECTED_DEPTHS)
CIFAR_NAMES = [
    'ddnn_resnet20', 'ddnn_resnet32', 'ddnn_resnet44', 'ddnn_resnet56', 'ddnn_resnet110', 'ddnn_cifar_resnet18',
    'ddnn_cifar_resnet18_025', 'ddnn_cifar_resnet34', 'ddnn_cifar_resnet50']
ONE_OF_EACH_KIND = some_at_once('ddnn_resnet18', 'ddnn_resnet50', 'ddnn_resnet20', 'ddnn_cifar_resnet18')


def test_registry_lists_all_entrypoints():
    assert sorted(timm.list_models('ddnn_*')) == sorted([*NAMES, *FAMILY_DEPTHS])
    assert len(timm.list_models('cifar_resnet*')) == 11
    assert timm.models.is_model_in_modules('ddnn_resnet50', ['ddnn_resnet'])
    assert 'ddnn_resnet50' not in timm.list_models(module='resnet'), 'registered among the models of timm itself'


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
def test_every_depth_equals_the_extracted_plain_net(name):
    """Fails if a sub-net runs other blocks, other norms or another head than the plain net, or two depths agree."""
    model = create(name, **narrow(name))
    assert model.depths == EXPECTED_DEPTHS[name]
    x = images(model)
    with torch.no_grad():
        together = model(x, depth='all')
        assert tuple(together) == model.depths
        for depth in model.depths:
            plain = model.extract(depth)
            assert type(plain) is (CifarResNet if name in CIFAR_NAMES else timm.models.ResNet)
            assert not plain.training
            logits = model(x, depth=depth)
            assert logits.isfinite().all()
            assert torch.equal(logits, plain(x))
            assert torch.equal(logits, together[depth].logits)
            for mine, theirs in zip(together[depth].features, plain.forward_intermediates(x)[1][1:], strict=True):
                assert torch.equal(mine, theirs)
            # what was extracted is a stock model: its weights fit the name that its configuration carries
            name_args = {k: v for k, v in plain._model_args.items() if k in ('layers', 'channels')}
            stock = timm.create_model(plain.pretrained_cfg['architecture'], **name_args).eval()
            assert type(stock) is type(plain)
            stock.load_state_dict(model.extract_state_dict(model.state_dict(), depth), strict=True)
            assert torch.equal(stock(x), logits)
        assert torch.equal(model(x), together[model.depths[0]].logits)
        distinct = {tuple(output.logits.flatten().tolist()) for output in together.values()}
    assert len(distinct) == len(model.depths), 'depths compute the same, the test shows nothing'


@pytest.mark.parametrize(('name', 'depth', 'architecture', 'layers'), [
    ('ddnn_resnet34', 18, 'resnet18', None),
    ('ddnn_resnet34', 10, 'resnet34', [1, 1, 1, 1]),
    ('ddnn_resnet50', 26, 'resnet26', None),
    ('ddnn_resnet50', 14, 'resnet50', [1, 1, 1, 1]),
    ('ddnn_resnet50d', 26, 'resnet26d', None),
    ('ddnn_resnet152', 101, 'resnet101', None),
    ('ddnn_resnet56', 32, 'cifar_resnet32', None),
    ('ddnn_cifar_resnet34', 18, 'cifar_resnet18', None),
    ('ddnn_cifar_resnet50', 14, 'cifar_resnet50', [1, 1, 1, 1]),
])
def test_extraction_takes_the_stock_name_where_there_is_one(name, depth, architecture, layers):
    plain = timm.create_model(name, device='meta').extract(depth)
    assert plain.pretrained_cfg['architecture'] == architecture
    assert plain._model_args.get('layers') == layers


def test_a_narrow_net_is_extracted_as_narrow():
    """Catches a stock net of that depth, cifar_resnet14 here, which cannot be built with the model's arguments."""
    model = timm.create_model('ddnn_cifar_resnet50', channels=(8, 16, 32, 64), device='meta')
    for depth in model.depths:
        plain = model.extract(depth)
        assert plain.pretrained_cfg['architecture'] == 'cifar_resnet50'
        again = timm.create_model('cifar_resnet50', **plain._model_args, device='meta')
        assert [(k, v.shape) for k, v in again.state_dict().items()] == [
            (k, v.shape) for k, v in plain.state_dict().items()]


def test_a_depth_of_other_blocks_than_timms_is_not_given_timms_name():
    """Fails if the name were taken from the depth alone: (3, 3, 1, 1) has 26 layers and is not resnet26."""
    model = timm.create_model('ddnn_resnet50', subnets=((3, 3, 1, 1),), device='meta')
    plain = model.extract(26)
    assert plain.pretrained_cfg['architecture'] == 'resnet50'
    assert plain._model_args['layers'] == [3, 3, 1, 1]


def test_full_net_is_the_stock_net_with_the_same_seed():
    for name in ('resnet18', 'resnet50'):
        torch.manual_seed(3)
        stock = timm.create_model(name)
        torch.manual_seed(3)
        model = timm.create_model(f'ddnn_{name}')
        for key, value in stock.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in stock.parameters())


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
def test_backward_gives_every_parameter_a_gradient(name):
    """As timm demands of a plain forward, and of all depths together."""
    model = timm.create_model(name, num_classes=7, **narrow(name)).train()
    x = images(model, size=32)
    for depth in (None, 'all'):
        model.zero_grad()
        out = model(x, depth=depth)
        loss = out.mean() if depth is None else sum(output.logits.mean() for output in out.values())
        loss.backward()
        without = [n for n, p in model.named_parameters() if p.grad is None]
        assert not without


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
def test_timm_arguments_and_classifier_at_every_depth(name):
    model = timm.create_model(
        name, num_classes=5, in_chans=1, drop_rate=0.1, drop_path_rate=0.2, global_pool='max', output_stride=8,
        device='meta', dtype=torch.bfloat16)
    x = torch.empty(2, 1, 64, 64, device='meta', dtype=torch.bfloat16)
    stride = min(8, model.feature_info[-1]['reduction'])
    assert all(t.device.type == 'meta' for t in [*model.parameters(), *model.buffers()])
    for depth in model.depths:
        features = model.forward_features(x, depth=depth)
        assert features.shape == (2, model.num_features, 64 // stride, 64 // stride)
        assert model.forward_head(features, depth=depth).shape == (2, 5)
        assert model.forward_head(features, pre_logits=True, depth=depth).shape == (2, model.num_features)
        assert model(x, depth=depth).dtype == torch.bfloat16
    model.reset_classifier(3)
    assert all(o.logits.shape == (2, 3) for o in model(x, depth='all').values())
    model.reset_classifier(0)
    assert all(o.logits.shape == (2, model.num_features) for o in model(x, depth='all').values())
    model.reset_classifier(0, '')
    assert all(o.logits.ndim == 4 for o in model(x, depth='all').values())


@pytest.mark.parametrize('name', NAMES)
def test_default_cfg_describes_the_model(name):
    model = timm.create_model(name, device='meta')
    cfg = model.default_cfg
    keys = model.state_dict()
    assert cfg['architecture'] == name
    assert cfg['classifier'] + '.weight' in keys and cfg['first_conv'] + '.weight' in keys
    x = torch.empty(1, *cfg['input_size'], device='meta')
    assert model.forward_features(x).shape[-2:] == tuple(cfg['pool_size'])
    assert model(x).shape == (1, cfg['num_classes'])
    with pytest.raises(InputError, match='not_an_argument'):
        timm.create_model(name, device='meta', not_an_argument=1)


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
def test_reset_classifier_keeps_the_shared_features_at_every_depth(name):
    model = create(name, **narrow(name))
    x = images(model)
    with torch.no_grad():
        before = {d: model.forward_features(x, depth=d) for d in model.depths}
        model.reset_classifier(4)
        for depth in model.depths:
            logits = model(x, depth=depth)
            assert logits.shape == (2, 4)
            assert torch.equal(model.forward_features(x, depth=depth), before[depth])
            plain = model.extract(depth)
            assert torch.equal(plain(x), logits)
            assert plain.num_classes == plain.pretrained_cfg['num_classes'] == 4
    assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == 'fc'


def test_default_depth_of_the_constructor():
    model, full = create('ddnn_resnet20', depth=14), create('ddnn_resnet20')
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model(x), full(x, depth=14))
        assert torch.equal(model.forward_features(x), full.forward_features(x, depth=14))
        assert torch.equal(model(x, depth=20), full(x))
        assert torch.equal(model.extract()(x), model(x))


@pytest.mark.parametrize('depth', [
    13, 'most', (20, 13), (), 2.5, 20.0, True, (20, None), (14, 8.0), (14, 14), {20}, torch.tensor(20),
    torch.zeros(9999),
])
def test_what_is_not_a_depth_names_those_that_exist(small, depth):
    """Catches types that pass for a depth, in any method, and a tensor in a message."""
    x = images(small)
    for call in (
            partial(small, x, depth=depth), partial(small.forward_features, x, depth=depth),
            partial(small.forward_intermediates, x, depth=depth), partial(small.extract, depth),
            partial(small.blocks, depth), partial(small.path, depth), partial(small.path_norms, depth),
            partial(small.count_shared, 20, depth), partial(calibrate_bn, small, [x], depth=depth)):
        with pytest.raises(InputError, match=r'\(20, 14, 8\)') as error:
            call()
        assert len(str(error.value)) < 150
        assert isinstance(depth, torch.Tensor) or repr(depth) in str(error.value)


def test_unknown_default_depth():
    with pytest.raises(InputError, match=r'\(20, 14, 8\).* got 13'):
        timm.create_model('ddnn_resnet20', depth=13)


@pytest.mark.parametrize('subnets', [
    ((4, 1, 1),), ((0, 1, 1),), ((1, 1),), ((1, 1, 1, 1),), ((1, 1.0, 1),), ((1, True, 1),), ('111',), (7,),
    ((1, 2, 1), (2, 1, 1)), ((3, 3, 3),),
])
def test_invalid_subnets_are_refused_with_a_reason(subnets):
    """Too deep, empty stages, wrong numbers of stages, no integers, and two nets of one layer count."""
    with pytest.raises(ValueError, match=r'\(3, 3, 3\)|depth 10'):
        timm.create_model('ddnn_resnet20', subnets=subnets)


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
@pytest.mark.parametrize('several', ['all', 'some'])
def test_features_and_intermediates_of_several_depths(name, several):
    model = create(name, **narrow(name))
    x = images(model)
    depth = 'all' if several == 'all' else model.depths[::-2]
    expected = model.depths if several == 'all' else model.depths[::-2][::-1]
    with torch.no_grad():
        maps = model.forward_features(x, depth=depth)
        logits = model.forward_head(maps, depth=depth)
        pooled = model.forward_head(maps, pre_logits=True, depth=depth)
        taps = model.forward_intermediates(x, depth=depth)
        assert tuple(maps) == tuple(logits) == tuple(taps) == tuple(sorted(expected, reverse=True))
        for d in maps:
            plain = model.extract(d)
            assert torch.equal(maps[d], plain.forward_features(x))
            assert torch.equal(logits[d], plain(x))
            assert torch.equal(pooled[d], plain.forward_head(maps[d], pre_logits=True))
            last, intermediates = plain.forward_intermediates(x)
            assert torch.equal(taps[d][0], last)
            assert all(torch.equal(a, b) for a, b in zip(taps[d][1], intermediates, strict=True))


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
@pytest.mark.parametrize('options', [
    {}, {'indices': 2}, {'indices': [0, -1]}, {'indices': [1]}, {'indices': [1], 'stop_early': True},
    {'indices': [0], 'stop_early': True}, {'indices': [1, 2], 'intermediates_only': True},
])
def test_forward_intermediates_as_the_plain_net_at_every_depth(name, options):
    model = create(name, **narrow(name))
    x = images(model)
    flat = options.get('intermediates_only', False)
    for depth in model.depths:
        with torch.no_grad():
            mine = model.forward_intermediates(x, depth=depth, **options)
            theirs = model.extract(depth).forward_intermediates(x, **options)
        pairs = zip(mine, theirs, strict=True) if flat else zip(
            [mine[0], *mine[1]], [theirs[0], *theirs[1]], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(('name', 'feature_cls'), [
    *(('ddnn_resnet20', cls) for cls in ('list', 'dict', 'hook', 'fx', 'getter')),
    ('ddnn_resnet50', 'list'), ('ddnn_resnet18', 'fx'), ('ddnn_cifar_resnet18', 'list'),
])
def test_features_only_gives_the_maps_of_the_depth_asked_for(name, feature_cls, tmp_path):
    """Fails if an extractor, rebuilt from the model's children, gives the full-net's maps whatever the depth."""
    model = create(name, **narrow(name))
    x = images(model)
    path = tmp_path / 'weights.pth'
    torch.save(model.state_dict(), path)
    seen = []
    for depth in (None, *model.depths):
        extractor = timm.create_model(
            name, features_only=True, depth=depth, feature_cls=feature_cls, pretrained=True,
            pretrained_cfg_overlay={'file': str(path)}, **narrow(name)).eval()
        with torch.no_grad():
            maps = extractor(x)
            maps = list(maps.values()) if isinstance(maps, dict) else maps
            expected = model.forward_intermediates(x, depth=depth, intermediates_only=True)[-len(maps):]
        assert len(maps) == len(extractor.feature_info.channels()) >= 4
        for info, out, exact in zip(extractor.feature_info.get_dicts(), maps, expected, strict=True):
            assert torch.equal(out, exact)
            assert out.shape[1] == info['num_chs'] and x.shape[-1] // out.shape[-1] == info['reduction']
        seen.append(maps[-1])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_features_only_takes_indices():
    extractor = timm.create_model('ddnn_resnet50', features_only=True, depth=26, out_indices=(1, 3), device='meta')
    assert [o.shape[1] for o in extractor(torch.empty(1, 3, 64, 64, device='meta'))] == [256, 1024]


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
def test_prune_intermediate_layers_at_every_depth(name):
    model = create(name, **narrow(name))
    x = images(model)
    for last in range(len(model.feature_info)):
        pruned = deepcopy(model)
        assert pruned.prune_intermediate_layers([last]) == [last]
        for depth in model.depths:
            with torch.no_grad():
                kept = pruned.forward_intermediates(x, indices=[last], depth=depth, intermediates_only=True)[0]
                assert torch.equal(kept, model.forward_intermediates(x, depth=depth)[1][last])
        stages = [int(n.split('layer')[1][0]) for n, _ in pruned.named_parameters() if 'layer' in n]
        assert max(stages, default=0) == last  # map 0 is the stem's
    kept_parameters = {n.split('.')[0] for n, _ in pruned.named_parameters()}
    assert 'fc' not in kept_parameters


@pytest.mark.parametrize('name', some_at_once('ddnn_resnet18', 'ddnn_resnet20'))
def test_torchscript_and_fx(name):
    model = create(name, **narrow(name))
    x = images(model)
    with torch.no_grad():
        for depth in model.depths:
            at_depth = create(name, depth=depth, **narrow(name))
            expected = model(x, depth=depth)
            assert torch.equal(torch.jit.script(at_depth)(x), expected)
            assert torch.equal(torch.jit.trace(at_depth, x)(x), expected)
            traced = torch.fx.symbolic_trace(at_depth)
            assert torch.equal(traced(x), expected)
            assert torch.equal(torch.jit.script(traced)(x), expected)
        graph = torch.fx.symbolic_trace(model, concrete_args={'depth': model.depths[1]})
        assert torch.equal(graph(x, model.depths[1]), model(x, depth=model.depths[1]))


@pytest.mark.parametrize(('name', 'attention'), [
    ('ddnn_resnet20', 'se'), ('ddnn_resnet20', 'sk'), ('ddnn_resnet18', 'sk'),
])
def test_blocks_are_built_as_timms(name, attention):
    """Catches arguments of timm's ResNet that are refused or passed over, and norms in the lists of an attention."""
    kwargs = dict(
        drop_block_rate=0.3, aa_layer=BlurPool2d, block_args=dict(attn_layer=attention), num_classes=7, **narrow(name))
    model = create(name, **kwargs)
    assert [bool(count_modules(stage, DropBlock2d)) for stage in (model.layer1, model.layer2, model.layer3)] == [
        False, False, True]
    assert [count_modules(stage, BlurPool2d) for stage in (model.layer1, model.layer2)] == [0, 1]
    kind = {'se': SEModule, 'sk': SelectiveKernel}[attention]
    assert count_modules(model, kind) == sum(model.blocks(model.depths[0]))
    x = images(model, batch=4)
    expected = logits_by_depth(model, x)
    for depth, logits in expected.items():
        with torch.no_grad():
            assert torch.equal(model.extract(depth)(x), logits)
            assert torch.equal(torch.fx.symbolic_trace(create(name, depth=depth, **kwargs))(x), logits)
    sum(output.logits.mean() for output in model.train()(x, depth='all').values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def count_modules(module, kind):
    return sum(isinstance(m, kind) for m in module.modules())


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    ('ddnn_resnet20', dict(channels=(0, 0, 0)), r'channels\[0\] in arguments of .* must be an integer .*, got 0'),
    ('ddnn_resnet20', dict(channels=torch.ones(1000)), r'channels in arguments of .* got <Tensor of shape \(1000,\)>$'),
    ('cifar_resnet20', dict(layers=(3, 0, 3)), r'layers\[1\] in arguments of .*, got 0'),
    ('ddnn_resnet50', dict(channels=(8, 16, 32, 0)), r'channels\[3\] in arguments of .*, got 0'),
    ('ddnn_resnet20', dict(in_chans=0), 'in_chans in arguments of .* must be an integer from 1 to 4096, got 0'),
    ('ddnn_resnet20', dict(global_pool=''), "global_pool must not be '' where there is a classifier"),
    ('ddnn_resnet50', dict(global_pool=''), "global_pool must not be '' where there is a classifier"),
    ('ddnn_resnet20', dict(avg_down=True), r"must be of .*, got \['avg_down'\]"),
    ('ddnn_resnet20', dict(global_pool='most'), 'most'),
    ('ddnn_resnet20', dict(aa_layer='none of these'), 'none of these'),
    ('ddnn_resnet20', dict(block_args=dict(gamma=1)), 'gamma'),
    ('ddnn_vit_tiny_patch16_224', dict(drop_path_rate=-0.1), 'drop_path_rate in .* a number from 0 to 1, got -0.1'),
    ('ddnn_convnext_tiny', dict(drop_rate=float('nan')), 'drop_rate in arguments of .*, got nan'),
    ('ddnn_resnet20', dict(private='no'), "private must be a sequence of .*'conv'.*, got 'no'"),
    ('ddnn_resnet20', dict(num_classes=-1), 'num_classes in arguments of .* must be an integer from 0 to 1000000'),
    ('ddnn_resnet20', dict(layers=(10 ** 5, 1, 1)), r'layers\[0\] in arguments of .* from 1 to 1000, got 100000'),
    ('ddnn_convnext_tiny', dict(depths=(10 ** 6, 1, 1, 1)), r'depths\[0\] in arguments of .*, got 1000000'),
    ('ddnn_resnet20', dict(channels=(10 ** 5,) * 3), 'memory must be [0-9]+ GiB or more for the model alone, got'),
    ('ddnn_resnet20', dict(device='meta'), 'device is not an argument of a model here'),
])
def test_arguments_that_make_no_model_are_one_line(name, kwargs, message):
    """Catches nets without channels, which train in silence, and errors without the name of the model."""
    make = create_ddnn if name.startswith('ddnn') else timm.create_model
    with pytest.raises(InputError, match=message) as error:
        make(name, **kwargs)
    assert len(str(error.value)) <= 1100


@pytest.mark.parametrize('tensors', [{}, [torch.zeros(2)], {'conv1.weight': [1.0]}, 'weights.bin', torch.zeros(2)])
@pytest.mark.parametrize('place', ['pretrained_cfg', 'pretrained_cfg_overlay'])
def test_a_state_dict_of_another_type_is_one_line(place, tensors):
    with pytest.raises(InputError, match=r'^state_dict must be tensors by their names, got ') as error:
        timm.create_model('ddnn_resnet20', pretrained=True, **{place: {'state_dict': tensors}})
    assert len(str(error.value)) < 200


def test_threads_at_different_depths(small):
    """Fails if the depth were a state of the model: threads would see each other's."""
    x = images(small, batch=4)
    expected = logits_by_depth(small, x)
    barrier, wrong = threading.Barrier(len(small.depths)), []

    def ask(depth):
        with torch.no_grad():
            for _ in range(25):
                barrier.wait()
                if not torch.allclose(small(x, depth=depth), expected[depth], atol=1e-5):
                    wrong.append(depth)

    threads = [threading.Thread(target=ask, args=(depth,)) for depth in small.depths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize('name', ONE_OF_EACH_KIND)
@pytest.mark.parametrize('private', [[], ['affine', 'classifier', 'conv']])
def test_group_matcher_puts_a_sub_nets_parameters_with_their_block(name, private):
    model = timm.create_model(name, device='meta', private=private)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    names = [n for n, _ in model.named_parameters()]
    assert set(groups) == set(names)
    own = [n for n in names if n.startswith('subnets.')]
    assert bool(own) is bool(private)
    for n in own:
        assert groups[n] == groups[n.split('.', 2)[2]]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == len(model.blocks(model.depths[0])) + 2


def test_cifar_family_is_that_of_the_paper():
    """Parameters in millions from table 6 of arXiv 1512.03385, shortcuts of option A: no parameters in them."""
    for name, millions in (('20', 0.27), ('32', 0.46), ('44', 0.66), ('56', 0.85), ('110', 1.7)):
        net = timm.create_model(f'cifar_resnet{name}')
        assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1 if name == '110' else 2) == millions
    x = torch.randn(1, 16, 8, 8)
    shortcut = net.layer2[0].downsample(x)
    assert shortcut.shape == (1, 32, 4, 4)
    assert torch.equal(shortcut[:, :16], x[:, :, ::2, ::2]) and not shortcut[:, 16:].any()
    assert len(find_norms(net)) == 109
    assert isinstance(timm.create_model('cifar_resnet18', device='meta').layer4[0].downsample, torch.nn.Sequential)
    with pytest.raises(ValueError, match='three stages'):
        timm.create_model('cifar_resnet20', layers=(1, 1, 1, 1))
    with pytest.raises(ValueError, match='got 3'):
        timm.create_model('cifar_resnet20', output_stride=3)
    dilated = timm.create_model('cifar_resnet20', output_stride=1).eval()
    assert dilated.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 64, 32, 32)
