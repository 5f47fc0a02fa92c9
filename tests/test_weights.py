"""Loading, saving and extracting weights: stock files, this library's files, and damaged ones."""
import json
import logging

import pytest
import safetensors.torch
import timm
import torch
from helpers.models import create, images, logits_by_depth, randomize_norms
from timm.models import load_checkpoint, save_for_hf
from timm.models._hub import load_model_config_from_path

from timm_ddnn import EKDTask
from timm_ddnn.models.ddnn_resnet import WEIGHTS
from timm_ddnn.utils.errors import InputError


@pytest.fixture(scope='module')
def stock():
    torch.manual_seed(5)
    return randomize_norms(timm.create_model('resnet50', num_classes=11)).eval()


@pytest.fixture(scope='module')
def stock_file(stock, tmp_path_factory):
    path = tmp_path_factory.mktemp('stock') / 'resnet50.pth'
    torch.save(stock.state_dict(), path)
    return str(path)


def load(name, path, **kwargs):
    """Create a model from a file of 11 classes, as `pretrained=True` does from the Hub."""
    overlay = {'file': path, 'num_classes': 11}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


@pytest.mark.parametrize('route', ['checkpoint_path', 'load_checkpoint', 'overlay', 'training checkpoint'])
def test_stock_checkpoint_loads_into_the_full_net(stock, stock_file, route, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    if route == 'overlay':
        model = load('ddnn_resnet50', stock_file)
    elif route == 'training checkpoint':
        torch.save({'state_dict': {f'module.{k}': v for k, v in stock.state_dict().items()}}, tmp_path / 'last.pth')
        model = timm.create_model('ddnn_resnet50', num_classes=11, checkpoint_path=str(tmp_path / 'last.pth')).eval()
    else:
        path = stock_file if route == 'checkpoint_path' else None
        model = timm.create_model('ddnn_resnet50', num_classes=11, checkpoint_path=path).eval()
        if route == 'load_checkpoint':
            load_checkpoint(model, stock_file)
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model(x), stock(x))
    assert model.trained_depths == (50,)
    assert '(26, 14)' in caplog.text and 'not trained' in caplog.text
    for depth in (26, 14):
        own = {k for k in model.state_dict() if k.startswith(f'subnets.{depth}.')}
        assert own and all(torch.equal(model.state_dict()[k], stock.state_dict()[k.split('.', 2)[2]]) for k in own)


def test_a_file_without_counts_of_batches_loads(caplog):
    """Catches files of before `num_batches_tracked`, which PyTorch completes, that are loaded without a warning."""
    state = {k: v for k, v in create('cifar_resnet20').state_dict().items() if not k.endswith('num_batches_tracked')}
    model = timm.create_model('ddnn_resnet20')
    model.load_state_dict(state)
    assert model.trained_depths == (20,)
    assert 'Depths (14, 8) are not trained' in caplog.text


def test_stock_checkpoint_adapts_to_other_classes_and_channels(stock, stock_file):
    model = load('ddnn_resnet50', stock_file, num_classes=3, in_chans=1)
    assert torch.equal(model.conv1.weight, stock.conv1.weight.sum(dim=1, keepdim=True))
    assert torch.equal(model.layer4[2].conv3.weight, stock.layer4[2].conv3.weight)
    x = images(model)
    assert all(a.shape == (2, 3) for a in logits_by_depth(model, x).values())
    with pytest.raises(RuntimeError, match='size mismatch'):  # as timm's own models: this route does not adapt
        timm.create_model('ddnn_resnet50', num_classes=3, checkpoint_path=stock_file)


@pytest.fixture(scope='module')
def trained():
    """A ddnn_resnet20 of 10 classes with every depth trained."""
    model = create('ddnn_resnet20').train()
    model(images(model, batch=4), depth='all')
    return model.eval()


def test_own_checkpoint_loads_at_every_depth(trained, tmp_path):
    x = images(trained)
    expected = logits_by_depth(trained, x)
    torch.save(trained.state_dict(), tmp_path / 'own.pth')
    safetensors.torch.save_file(trained.state_dict(), tmp_path / 'own.safetensors')
    for path in ('own.pth', 'own.safetensors'):
        model = timm.create_model('ddnn_resnet20', checkpoint_path=str(tmp_path / path)).eval()
        assert all(torch.equal(a, expected[d]) for d, a in logits_by_depth(model, x).items())
        assert model.trained_depths == (20, 14, 8)
    overlay = {'file': str(tmp_path / 'own.pth')}
    model = timm.create_model('ddnn_resnet20', pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay).eval()
    with torch.no_grad():
        for depth in model.depths:
            assert torch.equal(model.forward_features(x, depth=depth), trained.forward_features(x, depth=depth))
            assert model(x, depth=depth).shape == (2, 4)


DAMAGES = {
    'a statistic of a sub-net': 'subnets.14.layer2.0.bn1.running_mean',
    'all of one sub-net': 'subnets.8.',
    'the record of what was trained': 'subnets.trained',
    'a convolution': 'layer3.1.conv2.weight',
    'a norm of the full-net': 'layer1.0.bn1.running_var',
    'the stem': 'conv1.weight',
}


@pytest.mark.parametrize('missing', DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize('how', ['strict', 'non-strict', 'other classes', 'features_only', 'in a task'])
def test_damaged_file_does_not_load(trained, missing, how, tmp_path):
    """timm loads non-strictly to adapt classes, PyTorch then says nothing of a missing entry: this library must."""
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith(missing)}
    path = tmp_path / 'damaged.pth'
    torch.save(state, path)
    overlay = {'file': str(path)}
    with pytest.raises(InputError, match=' missing.*' + missing.replace('.', r'\.')):
        if how in ('strict', 'non-strict'):
            timm.create_model('ddnn_resnet20').load_state_dict(state, strict=how == 'strict')
        elif how == 'other classes':
            timm.create_model('ddnn_resnet20', pretrained=True, num_classes=3, pretrained_cfg_overlay=overlay)
        elif how == 'features_only':
            timm.create_model('ddnn_resnet20', pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
        else:
            task = EKDTask(timm.create_model('ddnn_resnet20'), verbose=False)
            task.load_state_dict({f'trainable_module.{k}': v for k, v in state.items()}, strict=False)


@pytest.mark.parametrize('was_trained', [True, False])
def test_a_full_net_that_was_trained_alone_loads(was_trained):
    """Catches weights of `--subnets` alone being refused, or their sub-nets counted as trained."""
    alone = create('ddnn_resnet20', subnets=())
    alone.mark_trained(alone.depths if was_trained else ())
    model = timm.create_model('ddnn_resnet20')
    model.load_state_dict(alone.state_dict())
    assert model.trained_depths == ((20,) if was_trained else ())
    x = images(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), alone(x))
    state = {name: tensor for name, tensor in alone.state_dict().items() if not name.startswith('layer3.1')}
    with pytest.raises(InputError, match=r'missing, the first being .layer3\.1'):
        model.load_state_dict(state, strict=False)


def test_failed_load_of_foreign_weights_names_what_is_wrong(trained, caplog):
    model = timm.create_model('ddnn_resnet20', subnets=((2, 2, 1),))
    with pytest.raises(InputError, match=r'of sub-nets \[8, 14\], the model with depths \(20, 12\) of \[12\]'):
        model.load_state_dict(trained.state_dict(), strict=False)
    caplog.clear()
    with pytest.raises(RuntimeError, match=r'layer1.2.conv1.weight'):
        timm.create_model('ddnn_resnet20').load_state_dict(timm.create_model('cifar_resnet14').state_dict())
    assert 'hold depth 20' not in caplog.text  # they hold 14
    wrong = dict(trained.state_dict())
    wrong['subnets.14.layer2.0.bn1.running_mean'] = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r'subnets.14.layer2.0.bn1.running_mean'):
        timm.create_model('ddnn_resnet20').load_state_dict(wrong, strict=False)


def test_a_headless_model_takes_weights_with_a_head(trained):
    model = timm.create_model('ddnn_resnet20', num_classes=0).eval()
    model.load_state_dict(trained.state_dict(), strict=False)
    with torch.no_grad():
        pooled = trained.forward_head(trained.forward_features(images(trained), depth=8), pre_logits=True, depth=8)
        assert torch.equal(model(images(model), depth=8), pooled)


def test_local_dir_round_trip_keeps_sub_nets_and_what_was_trained(tmp_path):
    model = create('ddnn_resnet20', num_classes=6, subnets=((3, 3, 1), (1, 2, 3)), depth=14)
    assert model.add_subnet((2, 1, 1)) == 10
    model.train()(images(model, batch=4), depth=(20, 16))
    model.eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / 'config.json').read_text())['architecture'] == 'ddnn_resnet20'
    _, _, args = load_model_config_from_path(tmp_path)
    assert args['subnets'] == [[3, 3, 1], [1, 2, 3], [2, 1, 1]]
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.depths == (20, 16, 14, 10) and again.trained_depths == (20, 16) and again.default_depth == 14
    x = images(model)
    expected = logits_by_depth(model, x)
    assert all(torch.equal(a, expected[d]) for d, a in logits_by_depth(again, x).items())


@pytest.mark.parametrize(('name', 'depth'), [('ddnn_resnet50', 26), ('ddnn_resnet50', 14), ('ddnn_resnet20', 8)])
def test_extracted_net_saves_and_loads_as_a_stock_model(name, depth, tmp_path):
    model = create(name, num_classes=6, in_chans=1, global_pool='avgmax')
    model.pretrained_cfg.update(mean=(0.1,), std=(0.9,), tag='mine', hf_hub_id='some/where')
    x = images(model)
    plain = model.extract(depth)
    assert plain.pretrained_cfg['mean'] == (0.1,) and plain.pretrained_cfg['num_classes'] == 6
    assert not {'tag', 'hf_hub_id', 'url'} & set(plain.pretrained_cfg)
    save_for_hf(plain, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert not config['architecture'].startswith('ddnn')
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert type(again) is type(plain)
    with torch.no_grad():
        assert torch.equal(again(x), model(x, depth=depth))


def test_extraction_copies_and_changes_nothing(small):
    x = images(small)
    expected = logits_by_depth(small, x)
    random_state = torch.get_rng_state()
    plain = small.extract(14)
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(torch.equal(a, expected[d]) for d, a in logits_by_depth(small, x).items())
    assert small.double().extract(8).conv1.weight.dtype == torch.float64


def test_trained_depths_tell_what_was_trained():
    model = timm.create_model('ddnn_resnet20')
    x = torch.randn(4, 3, 32, 32)
    assert model.trained_depths == ()
    model.eval()(x, depth='all')
    with torch.no_grad():
        model.train()(x, depth='all')
    assert model.trained_depths == ()
    model(x, depth=8)
    assert model.trained_depths == (8,)
    model(x)
    assert model.trained_depths == (20, 8)
    assert model.add_subnet((2, 2, 1)) == 12
    assert model.depths == (20, 14, 12, 8) and model.trained_depths == (20, 8)


def test_pretrained_tags_are_timms_weights():
    """The full-net of `pretrained=True` is timm's own where we have no weights: same repository, same preprocessing."""
    tagged = set(timm.list_pretrained('ddnn_*')) - {path.name for path in WEIGHTS.glob('*')}
    assert 'ddnn_resnet50.a1_in1k' in tagged
    for name in tagged:
        mine, timms = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(name.removeprefix('ddnn_'))
        assert mine.hf_hub_id == timms.hf_hub_id and mine.hf_hub_id.startswith('timm/')
        assert (mine.mean, mine.std, mine.input_size, mine.crop_pct) == (
            timms.mean, timms.std, timms.input_size, timms.crop_pct)
    with pytest.raises(RuntimeError, match='No pretrained weights'):
        timm.create_model('ddnn_resnet110', pretrained=True)
