"""Tags of weights: those that come with the library, those of timm, and none."""
import json

import pytest
import timm
import torch
from helpers.small_models import IMAGES, logits, make_model, save
from timm.models import PretrainedCfg

from timm_ddnn.models.cifar_resnet import cifar_cfg
from timm_ddnn.models.ddnn_resnet import WEIGHTS, default_cfgs

FOLDERS = sorted(WEIGHTS.glob('[!.]*/config.json'))


@pytest.fixture
def cfg(tmp_path):
    """Configuration of a tag whose weights are in a folder."""
    folder = save(make_model(), tmp_path / 'ddnn_resnet20.mine')
    return cifar_cfg(source='local-dir', file=str(folder), label_names=tuple(f'class {i}' for i in range(10)))


def test_weights_in_a_folder_need_no_network(cfg):
    """Catches a tag that goes to the Hub though its weights are here, or lacks what the data were."""
    model = timm.create_model('ddnn_resnet20', pretrained=True, pretrained_cfg=cfg, channels=(4, 8, 16)).eval()
    assert torch.equal(model(IMAGES, depth=14), logits(make_model())[14])
    assert list(model.pretrained_cfg['label_names']) == [f'class {i}' for i in range(10)]
    assert model.trained_depths == (20, 14, 8)


def test_an_overlay_goes_before_weights_of_this_library(cfg, tmp_path):
    """Catches other weights that a user gives and that are silently passed over."""
    other = save(make_model(seed=1), tmp_path / 'other')
    for overlay in ({'file': str(other / 'model.safetensors')}, {'state_dict': make_model(seed=1).state_dict()}):
        model = timm.create_model(
            'ddnn_resnet20', pretrained=True, pretrained_cfg=PretrainedCfg(**cfg), pretrained_cfg_overlay=overlay,
            channels=(4, 8, 16))
        assert torch.equal(model.eval()(IMAGES), logits(make_model(seed=1))[20])


def test_configurations_have_the_form_of_timms():
    """Catches lists where timm's scripts add tuples, and types that its own configurations have not."""
    form = timm.get_pretrained_cfg('resnet50').to_dict()
    for entry in default_cfgs.values():
        for cfg in entry.cfgs.values():
            for name, value in cfg.to_dict().items():
                assert not isinstance(value, list)
                assert name not in form or isinstance(value, type(form[name])), name


def test_the_default_is_the_first_tag_of_the_table():
    """Catches a default that other weights in the folder change."""
    assert timm.get_pretrained_cfg('ddnn_resnet20').tag == 'kd_cifar10'
    assert timm.create_model('ddnn_resnet20', pretrained=True).pretrained_cfg['tag'] == 'kd_cifar10'
    model = timm.create_model('ddnn_cifar_resnet18_025', pretrained=True)
    assert model.num_classes == 100 and model.pretrained_cfg['tag'] == 'ekd_cifar100'


def test_every_folder_of_weights_is_in_the_table():
    bundled = {f'{name}.{tag}' for name, entry in default_cfgs.items() for tag in entry.tags
               if entry.cfgs[tag].source == 'local-dir'}
    assert bundled == {path.parent.name for path in FOLDERS}


@pytest.mark.parametrize('path', FOLDERS, ids=lambda path: path.parent.name)
def test_weights_of_this_library_are_complete(path):
    """Catches a table that differs from the folder, depths that are not trained, and damaged weights."""
    architecture, _, tag = path.parent.name.partition('.')
    config = json.loads(path.read_text())
    model = timm.create_model(path.parent.name, pretrained=True)
    kept = config['pretrained_cfg'] | {'label_names': config['label_names']}
    mine = json.loads(json.dumps(model.pretrained_cfg))
    assert not {name: value for name, value in kept.items() if mine.get(name) != value}
    assert model.pretrained_cfg['tag'] == tag
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
