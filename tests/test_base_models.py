"""What a saved model says of published weights: those that its own come from, and nothing of others."""
import json

import pytest
import timm
from helpers.models import narrow
from helpers.small_models import make_model, save
from helpers.training import MODEL, few_digits, read, run
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from timm_ddnn.hub.save import save_model
from timm_ddnn.models.load import create_ddnn, load_teacher
from timm_ddnn.weights import download
from timm_ddnn.weights.build import ABOUT_WEIGHTS

KD = 'ddnn_resnet20.kd_cifar10'
SMALL = dict(channels=(4, 8, 16))


def save_and_read(model, folder):
    """-> the config.json that a save of a model gives"""
    folder.mkdir()
    save_model(model, folder, data_config={}, class_names=[], rows=[])
    return json.loads((folder / 'config.json').read_text())


@pytest.fixture
def folder(tmp_path):
    """A saved model that comes from one on the Hub."""
    folder = save(make_model(), tmp_path / 'net')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'base_model': ['me/net']}))
    return folder


@pytest.mark.parametrize(('name', 'kwargs', 'expected'), [
    ('ddnn_resnet20', SMALL, []),
    ('ddnn_resnet50', narrow('ddnn_resnet50'), []),
    (KD, SMALL, []),
    (KD, dict(pretrained=True), [KD]),
    ('ddnn_resnet20', dict(pretrained=True), [KD]),
    ('{folder}', {}, []),
    ('{folder}', dict(pretrained=True), ['me/net']),
    ('{folder}', dict(pretrained=True, num_classes=3), ['me/net']),
    (KD, dict(SMALL, checkpoint_path='{folder}/model.safetensors'), ['me/net']),
    (KD, dict(pretrained=True, checkpoint_path='{alone}'), []),
    (KD, dict(SMALL, pretrained=True, pretrained_cfg_overlay=dict(source=None, file='{alone}')), []),
])
def test_a_saved_model_names_the_weights_that_it_comes_from(folder, tmp_path, name, kwargs, expected):
    """Catches a tag, license or paper of default weights in a model that never had them, and origins that are lost."""
    alone = tmp_path / 'alone.safetensors'
    save_file((timm.create_model(KD) if 'checkpoint_path' in kwargs else make_model()).state_dict(), alone)
    given = json.loads(json.dumps([name, kwargs]).replace('{folder}', str(folder)).replace('{alone}', str(alone)))
    model = create_ddnn(given[0], **given[1])
    if not expected and 'pretrained' not in kwargs:
        assert not set(ABOUT_WEIGHTS) & model.pretrained_cfg.keys()
    for net, place in ((model, 'all'), (model.extract(), 'plain')):
        config = save_and_read(net, tmp_path / place)
        assert config.get('base_model', []) == expected
        assert not {*ABOUT_WEIGHTS, 'url', 'hf_hub_id', 'file'} & config['pretrained_cfg'].keys()
        again = load_teacher(str(tmp_path / place))
        assert again.base_models == expected


def test_weights_of_a_tag_of_timm_are_named_as_its_repository(tmp_path, monkeypatch):
    """Catches a base model that the Hub does not know, or that is the name of a model of this library."""
    path = tmp_path / 'model.safetensors'

    def fetch(repo_id, filename, **kwargs):
        if filename == 'config.json':
            raise EntryNotFoundError('none')
        return path
    monkeypatch.setattr(download, 'fetch', fetch)
    args = dict(channels=(4, 8, 16, 32))
    save_file(timm.create_model('resnet18', **args).state_dict(), path)
    model = create_ddnn('ddnn_resnet18', pretrained=True, **args)
    assert model.base_models == ['timm/resnet18.a1_in1k']
    config = save_and_read(model, tmp_path / 'all')
    assert config['base_model'] == ['timm/resnet18.a1_in1k']
    assert not set(ABOUT_WEIGHTS) & config['pretrained_cfg'].keys()
    teacher = timm.create_model('test_resnet')
    monkeypatch.setattr('timm_ddnn.models.load._create', lambda *args, **kwargs: teacher)
    assert load_teacher('test_resnet').base_models == ['timm/test_resnet.r160_in1k']


@pytest.mark.usefixtures('surroundings')
def test_a_run_names_its_weights_and_its_teacher(tmp_path, monkeypatch):
    """Catches an origin that the best weights, checkpoints or the summary lack, or that a resumed run forgets."""
    for name in ('plot_accuracy', 'plot_curves'):
        monkeypatch.setattr(f'timm_ddnn.train.output.{name}', lambda *args: None)
    options = [*few_digits(), '--epochs', 1, '-b', 176, '-j', 0]
    run(*MODEL, *options, '--output', 'first')
    assert 'base_model' not in read('first', 'config.json') and read('first')['base_model'] == []
    for name in ('start', 'teacher'):
        (tmp_path / name).mkdir()
        model = create_ddnn('first', pretrained=True)
        model.base_models = [f'me/{name}']
        names = read('first', 'config.json')['label_names']
        save_model(model, tmp_path / name, data_config={}, class_names=names, rows=[])
    options += ['--model', 'start', '--pretrained', '--teacher', 'teacher', '--output', 'second']
    run(*options)
    for resumed in (False, True):
        if resumed:
            run(*options, '--resume', 'auto')
        for place in ('.', 'best', 'checkpoints/step-00000002'):
            assert read(f'second/{place}', 'config.json')['base_model'] == ['me/start', 'me/teacher'], place
        assert read('second')['base_model'] == ['me/start', 'me/teacher']
