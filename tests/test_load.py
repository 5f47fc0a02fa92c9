"""Models from a name that a user typed: what is found, what is wrong input, and what is a bug."""
import argparse
import shutil

import pytest
import timm
import torch
import yaml
from helpers.small_models import make_model, save
from timm.utils import CheckpointSaver

from timm_ddnn.hub.publish import push_to_hub
from timm_ddnn.models.dynamic_depth import DynamicDepthMixin
from timm_ddnn.models.load import create_ddnn, load_model, load_teacher, resolve_name, saved_results
from timm_ddnn.utils.errors import InputError


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp('saved') / 'net')


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A model in the folder 'net', which is in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(saved, tmp_path / 'net')


def test_a_folder_goes_before_a_model_of_its_name(folder, caplog):
    """Catches the bundled weights in the place of a run whose folder happens to be called like a model."""
    folder.rename('ddnn_resnet20')
    assert load_model('ddnn_resnet20').conv1.out_channels == 4
    assert load_teacher('ddnn_resnet20').conv1.out_channels == 4
    assert "'ddnn_resnet20' names a folder and a registered model: the folder is loaded" in caplog.text
    (folder.parent / 'ddnn_resnet56').mkdir()  # of something else
    assert load_model('ddnn_resnet56').depths[0] == 56
    assert "'ddnn_resnet56' names a folder and a registered model: the registered model is loaded" in caplog.text
    (folder.parent / 'ddnn_resnet56' / 'args.yaml').touch()  # of timm's training script
    assert resolve_name('ddnn_resnet56') == 'local-dir:ddnn_resnet56'
    assert resolve_name('ddnn_resnet20.ekd_cifar10') == 'ddnn_resnet20.ekd_cifar10'


@pytest.mark.parametrize(('name', 'kwargs', 'message'), [
    ('ddnn_resnet21', {}, r'must be a dynamic-depth model such as ddnn_resnet\d+, .*'),
    ('vgg11', {}, r'nets of several depths are made of CifarResNet, ConvNeXt, .*, not of VGG'),
    ('resnet10t', {}, 'a net must have a stage of more than one block that may be left out'),
    ('net/none', {}, "must be a folder of a model, 'hf-hub:OWNER/NAME' or a name, got 'net/none'"),
    ('ddnn_resnet20.none', {}, r"tag of ddnn_resnet20 must be one of \['.*'\], got 'none'"),
    ('ddnn_resnet110', {'pretrained': True}, 'No pretrained weights exist for ddnn_resnet110'),
    ('local-dir:none', {}, 'none is not the folder of a model'),
    ('other-source:net', {}, "Unknown model source 'other-source'"),
    ('local-dir:', {}, 'has no model id'),
    ('ddnn_resnet20', {'channel': 5}, r"arguments of DynamicDepthCifarResNet must be of .*, got \['channel'\]"),
    ('ddnn_resnet20', {'global_pool': 'none'}, 'ddnn_resnet20 cannot be made with the arguments given'),
    ('ddnn_resnet20', {'act_layer': 'none'}, 'ddnn_resnet20 cannot be made with the arguments given'),
    ('ddnn_resnet20', {'layers': 'many'}, 'cannot be created'),
    ('ddnn_resnet20', {'depth': 9}, 'depth must be one of'),
    ('net', {'channels': (4, 8, 32), 'pretrained': True}, 'must have shape'),
    ('ddnn_resnet20', {'checkpoint_path': 'none'}, 'none does not exist'),
    ('ddnn_resnet20', {'checkpoint_path': 'net/config.json'}, 'is not a file of weights'),
    ('ddnn_resnet20', {'checkpoint_path': 'list.pth'}, 'is not a file of weights'),
    ('ddnn_resnet20', {'checkpoint_path': 'text.pth'}, 'it holds more than tensors'),
    ('ddnn_resnet20', {'checkpoint_path': 'net/model.safetensors'}, 'must have shape'),
])
def test_wrong_input_is_one_line_that_names_it(folder, name, kwargs, message):
    """Catches tracebacks of timm and torch for what a user typed."""
    torch.save([1], 'list.pth')
    torch.save({'a': 'b'}, 'text.pth')
    with pytest.raises(InputError, match=message) as error:
        create_ddnn(name, **kwargs)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize(('name', 'message'), [
    ('none', 'Unknown model'), ('resnet18.none', 'tag of resnet18 must be one of'),
    ('cifar_resnet20', 'No pretrained weights exist for cifar_resnet20'), ('local-dir:stock', 'stock'),
    ('local-dir:nan', r'fc\.bias of .* finite values'),
])
def test_a_teacher_that_is_none_is_wrong_input(folder, name, message):
    """Catches tracebacks for nets of timm that cannot be loaded, and a teacher that says NaN."""
    net = timm.create_model('resnet18', num_classes=2)
    net.fc.bias.data[0] = torch.nan
    timm.models.save_for_hf(net, 'nan', safe_serialization=True)
    shutil.copytree('nan', 'stock')
    (folder.parent / 'stock' / 'model.safetensors').write_bytes(b'0')
    with pytest.raises(InputError, match=message):
        load_teacher(name)


@pytest.mark.parametrize('error', [RuntimeError, TypeError, AttributeError, KeyError, ZeroDivisionError])
@pytest.mark.parametrize('place', ['__init__', 'add_subnet', '_load_from_state_dict'])
def test_a_bug_keeps_its_type(folder, monkeypatch, error, place):
    """Catches bugs of this library that pass for wrong input and so lose their traceback."""
    def fail(*args, **kwargs):
        raise error('planted')
    monkeypatch.setattr(DynamicDepthMixin, place, fail)
    for load, name in ((load_model, 'net'), (load_teacher, 'net'), (load_model, 'ddnn_resnet20')):
        with pytest.raises(error, match='planted'):
            load(name)


def test_results_are_those_of_the_weights_that_were_loaded(folder):
    """Catches accuracies of other classes, of depths that the model has not, or of weights that were not loaded."""
    assert [row['top1'] for row in saved_results(load_model('net'))] == [70.0, 71.0, 72.0]
    assert saved_results(create_ddnn('net')) == []
    assert saved_results(create_ddnn('net', pretrained=True, num_classes=7)) == []
    assert saved_results(create_ddnn('net', checkpoint_path='net/model.safetensors')) == []
    assert saved_results(timm.create_model('ddnn_resnet32')) == []
    assert len(saved_results(timm.create_model('ddnn_resnet20', pretrained=True))) == 3


def timm_run(folder, name, model, ema=None, **args):
    """Write what timm's train.py leaves: arguments, and checkpoints by its own saver."""
    folder.mkdir()
    unset = dict.fromkeys(('num_classes', 'in_chans', 'img_size', 'input_size', 'gp', 'mean', 'std', 'crop_pct'))
    args = {'model': name, **unset, 'interpolation': '', 'model_kwargs': {}, **args}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args, default_flow_style=False))
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=0.1), args=argparse.Namespace(**args), checkpoint_dir=str(folder),
        recovery_dir=str(folder), model_ema=ema)
    saver.save_checkpoint(0, metric=1.0)
    return folder


def test_a_run_of_timms_script_is_a_model_and_a_teacher(tmp_path, monkeypatch):
    """Catches a training by timm's own script whose result no command takes, or takes with random weights."""
    model = make_model(in_chans=1)
    folder = timm_run(tmp_path / 'run', 'ddnn_resnet20', model, in_chans=1, img_size=48, mean=[0.5], std=[0.2],
                      model_kwargs={'channels': [4, 8, 16]})
    x = torch.randn(2, 1, 48, 48)
    for loaded in (load_model(str(folder)), load_teacher(f'local-dir:{folder}').eval()):
        assert loaded.trained_depths == (20, 14, 8)
        assert torch.equal(loaded(x, depth=14), model(x, depth=14))
        assert loaded.pretrained_cfg['input_size'] == (1, 48, 48)
        assert loaded.pretrained_cfg['mean'] == [0.5] and loaded.pretrained_cfg['crop_pct'] == 1.0
        assert saved_results(loaded) == [] and 'label_names' not in loaded.pretrained_cfg
    monkeypatch.chdir(tmp_path)
    published = push_to_hub(folder, 'me/net', dry_run=True).url
    assert torch.equal(load_model(published)(x, depth=14), model(x, depth=14))
    assert create_ddnn(str(folder)).num_classes == 10
    assert not torch.equal(create_ddnn(str(folder)).conv1.weight, model.conv1.weight)

    net = timm.create_model('resnet18', num_classes=7).eval()
    ema = timm.create_model('resnet18', num_classes=7).eval()
    teacher = load_teacher(str(timm_run(tmp_path / 'stock', 'resnet18', net, ema=ema))).eval()
    assert teacher.num_classes == 7
    assert torch.equal(teacher.fc.weight, ema.fc.weight) != torch.equal(teacher.fc.weight, net.fc.weight)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('args.yaml', '[', r'args\.yaml must be YAML'),
    ('args.yaml', '[]', r'args\.yaml must be an object'),
    ('args.yaml', 'model: none', r'model in .*args\.yaml must be one of'),
    ('args.yaml', 'model: ddnn_resnet20\nmodel_kwargs: {surprise: 1}', 'surprise'),
    ('args.yaml', None, 'has no config.json'),
    ('model_best.pth.tar', '0', r'model_best\.pth\.tar is not a file of weights'),
    ('*.pth.tar', None, 'has no config.json'),
])
def test_a_damaged_run_of_timms_script_is_wrong_input(tmp_path, name, content, message):
    """Catches tracebacks for what a killed training left."""
    folder = timm_run(tmp_path / 'run', 'ddnn_resnet20', timm.create_model('ddnn_resnet20'))
    for path in list(folder.glob(name)):
        path.unlink()
        if content is not None:
            path.write_text(content)
    for load in (load_model, load_teacher):
        with pytest.raises(InputError, match=message):
            load(str(folder))
