"""Tags of weights: those that come with the library, those on the Hub, those of timm, and none."""
import json

import pytest
import timm
import torch
from helpers import hub_server
from helpers.hub_server import child
from small_models import IMAGES, logits, make_model, save
from timm.models import PretrainedCfg

from timm_ddnn.models.ddnn_resnet import WEIGHTS, read_weights_cfgs

hub = hub_server.hub  # the fixture


def test_weights_beside_the_configuration_need_no_network(tmp_path):
    """Catches a tag that goes to the Hub though its weights are here, or lacks what the data were."""
    save(make_model(), tmp_path / 'ddnn_resnet20.mine')
    cfg = read_weights_cfgs(tmp_path)['ddnn_resnet20.mine']
    model = timm.create_model('ddnn_resnet20', pretrained=True, pretrained_cfg=cfg, channels=(4, 8, 16)).eval()
    assert torch.equal(model(IMAGES, depth=14), logits(make_model())[14])
    assert model.pretrained_cfg['label_names'] == [f'class {i}' for i in range(10)]
    assert model.trained_depths == (20, 14, 8)


def test_an_overlay_goes_before_weights_of_this_library(tmp_path):
    """Catches other weights that a user gives and that are silently passed over."""
    save(make_model(), tmp_path / 'ddnn_resnet20.mine')
    other = save(make_model(seed=1), tmp_path / 'other')
    cfg = PretrainedCfg(**read_weights_cfgs(tmp_path)['ddnn_resnet20.mine'])
    state_dict = make_model(seed=1).state_dict()
    for overlay in ({'file': str(other / 'model.safetensors')}, {'state_dict': state_dict}):
        model = timm.create_model(
            'ddnn_resnet20', pretrained=True, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay, channels=(4, 8, 16))
        assert torch.equal(model.eval()(IMAGES), logits(make_model(seed=1))[20])


def test_weights_on_the_hub_are_those_of_the_organization_at_the_pinned_commit(hub, tmp_path):
    """Catches a tag that follows the branch, and an organization that the environment does not set."""
    first = save(make_model(), tmp_path / 'ddnn_resnet20.mine')
    second = save(make_model(seed=1), tmp_path / 'second')
    names = ('config.json', 'model.safetensors')
    commit = hub.publish('me/ddnn_resnet20.mine', {name: (first / name).read_bytes() for name in names})
    hub.publish('me/ddnn_resnet20.mine', {name: (second / name).read_bytes() for name in names})
    (first / 'model.safetensors').unlink()
    config = json.loads((first / 'config.json').read_text())
    (first / 'config.json').write_text(json.dumps(config | {'revision': commit.oid}))
    result = child(hub, f"""
import timm, torch
from pathlib import Path
from timm_ddnn.ddnn_resnet import read_weights_cfgs
cfg = read_weights_cfgs(Path({str(tmp_path)!r}))['ddnn_resnet20.mine']
model = timm.create_model('ddnn_resnet20', pretrained=True, pretrained_cfg=cfg, channels=(4, 8, 16)).eval()
torch.save(model.state_dict(), {str(tmp_path / 'out.pt')!r})
""", timeout=200, TIMM_DDNN_ORGANIZATION='me', OMP_NUM_THREADS='1')
    assert result.returncode == 0, result.stderr
    loaded, expected = torch.load(tmp_path / 'out.pt'), make_model().state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_the_most_accurate_weights_are_the_default(tmp_path):
    """Catches a default that goes by the name of the tag."""
    for name, lead in ('a', 0), ('b', 1), ('c', -1):
        config = save(make_model(), tmp_path / f'ddnn_resnet20.{name}') / 'config.json'
        content = json.loads(config.read_text())
        content['depths'][1]['top1'] += lead
        config.write_text(json.dumps(content))
    assert [name[-1] for name in read_weights_cfgs(tmp_path)] == ['b', 'a', 'c']
    best = next(name for name in read_weights_cfgs(WEIGHTS) if name.startswith('ddnn_resnet20.'))
    assert timm.create_model('ddnn_resnet20', pretrained=True).pretrained_cfg['tag'] == best.partition('.')[2]


@pytest.mark.parametrize('path', sorted(WEIGHTS.glob('*/config.json')), ids=lambda path: path.parent.name)
def test_weights_of_this_library_are_complete(path):
    """Catches a tag that is not in the registry, depths without a trained net or an accuracy, and damaged weights."""
    architecture, _, tag = path.parent.name.partition('.')
    config = json.loads(path.read_text())
    model = timm.create_model(path.parent.name, pretrained=True)
    assert model.pretrained_cfg['tag'] == config['pretrained_cfg']['tag'] == tag
    assert path.parent.name in timm.list_pretrained('ddnn_*')
    assert model.trained_depths == model.depths == tuple(row['depth'] for row in config['depths'])
    assert all(row['top1'] > 50 for row in config['depths'])
    kept = timm.create_model(f'local-dir:{path.parent}', pretrained=True)  # with the arguments it was trained with
    mine, expected = logits(model.eval()), logits(kept.eval())
    assert all(torch.equal(mine[depth], expected[depth]) for depth in expected)
    assert len(model.pretrained_cfg['label_names']) == model.num_classes
    assert 'label_names' not in timm.create_model(architecture).pretrained_cfg  # what is trained next has its own


def test_a_model_without_weights_raises():
    """Catches random numbers that pass for pretrained weights."""
    with pytest.raises(RuntimeError, match='No pretrained weights exist for ddnn_resnet110'):
        timm.create_model('ddnn_resnet110', pretrained=True)
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('ddnn_resnet110.imagenet', pretrained=True)
