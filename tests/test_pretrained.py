"""Configurations and weights from elsewhere, in a folder: what is refused, and what is loaded as timm loads it."""
import json
import math
import shutil
import tracemalloc

import pytest
import timm
import torch
from helpers.small_models import make_model, save
from safetensors.torch import load_file, save_file

import timm_ddnn
from timm_ddnn.models.load import create_ddnn, saved_results
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.files import file_sha256
from timm_ddnn.weights.download import read_config


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp('saved') / 'net')


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'net')


def change(folder, **changes):
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split('__')
        part = config
        for parent in parents:
            part = part[parent]
        part[last] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(model_args__layers=[10 ** 9, 1, 1]),
     r'model_args\.layers\[0\] in config\.json of .* must be an integer from 1 to 1000, got 1000000000'),
    (dict(model_args__layers=[900, 900, 900]), 'layers and subnets of at most 1000 blocks, got 2709'),
    (dict(model_args__layers=[99] * 3, model_args__subnets=[[i] * 3 for i in range(1, 99)]), 'of at most 1000 blocks'),
    (dict(model_args__layers=[1] * 10_000), r'layers in .* must be a list of 1 to 8 items'),
    (dict(model_args__layers='many'), "layers in .* must be a list of 1 to 8 items, got 'many'"),
    (dict(model_args__layers=[3, 3]),
     'layers and channels must be of three stages'),
    (dict(model_args__subnets=[[9, 9, 9]]), 'blocks of a sub-net must be 3 integers'),
    (dict(model_args__channels=[4, 8, 90_000]), r'at most \d+ values, got \d+, the weights hold \d+'),
    (dict(model_args__channels=[4, 8, 900_000]), r'channels\[2\] in .* must be an integer from 1 to 100000'),
    (dict(model_args__global_pool='x'), 'ddnn_resnet20 cannot be made with the arguments given'),
    (dict(model_args__surprise=1), r"model_args in config.json must be of .* got \['surprise'\]"),
    (dict(model_args__features_only=True), r"got \['features_only'\]"),
    (dict(model_args__device='meta'), r"got \['device'\]"),
    (dict(model_args__pretrained_strict=False), r"got \['pretrained_strict'\]"),
    (dict(model_args__drop_rate=[[[[1]]]]), r'model_args\.drop_rate in .* must be a number'),
    (dict(model_args__drop_rate='x' * 1000), r'model_args\.drop_rate in .* must be a number'),
    (dict(model_args__subnets=5), 'subnets in .* must be a list of 0 to 1000 items, got 5'),
    (dict(pretrained_cfg__first_conv=5), 'first_conv in .* must be text of at most 1000 characters, got 5'),
    (dict(pretrained_cfg__std=[0, 0, 0]), r'std\[0\] in .* must be a number above 0, got 0'),
    (dict(pretrained_cfg__std=[1, 1, -1]), r'std\[2\] in .* must be a number above 0, got -1'),
    (dict(pretrained_cfg__std=[1, 1]), r'std in .* must be 3 numbers, one for each channel, got \[1, 1\]'),
    (dict(pretrained_cfg__crop_pct=0), 'crop_pct in .* must be a number from 0.1 to 2, got 0'),
    (dict(pretrained_cfg__crop_pct=0.001), 'crop_pct in .* must be a number from 0.1 to 2, got 0.001'),
    (dict(pretrained_cfg__crop_pct=0.5, pretrained_cfg__input_size=[3, 4000, 4000]),
     'crop_pct in .* must be large enough to cut 4000 x 4000 from at most 4096 pixels, got 0.5'),
    (dict(pretrained_cfg__test_crop_pct=2.1), 'test_crop_pct in .* must be a number from 0.1 to 2, got 2.1'),
    (dict(pretrained_cfg__interpolation='x'), "interpolation in .* must be one of .*'bicubic', .* got 'x'"),
    (dict(pretrained_cfg__crop_mode='x'), "crop_mode in .* must be one of .*'center', .* got 'x'"),
    (dict(model_args__num_classes=7), 'model_args.num_classes in .* must be 10 as elsewhere, got 7'),
    (dict(pretrained_cfg__license=5), 'license in .* must be text of at most 10000 characters, got 5'),
    (dict(pretrained_cfg__hf_hub_id='me/other'), "hf_hub_id in .* must be None, got 'me/other'"),
    (dict(pretrained_cfg__crop_pct='x'), "crop_pct in .* must be a number from 0.1 to 2, got 'x'"),
    (dict(pretrained_cfg__hf_hub_filename='../../other.bin'), "must be None, got '../../other.bin'"),
    (dict(pretrained_cfg__url='http://127.0.0.1/x.pth'), "url in .* must be None, got 'http://127.0.0.1/x.pth'"),
    (dict(pretrained_cfg__state_dict={'a': [1]}), 'state_dict in .* must be None'),
    (dict(pretrained_cfg__custom_load=True), 'custom_load in .* must be False, got True'),
    (dict(pretrained_cfg__surprise=1), "pretrained_cfg in .* with keys of .*, got 'surprise'"),
    (dict(model_args__in_chans=None), 'in_chans in .* must be an integer from 1 to 4096, got None'),
    (dict(pretrained_cfg__input_size=None), 'input_size in .* must be a list of 3 items, got None'),
    (dict(num_classes=None), 'num_classes in .* must be an integer from 0 to 1000000, got None'),
    (dict(pretrained_cfg__input_size=[3, 32]), r'input_size in .* must be a list of 3 items, got \[3, 32\]'),
    (dict(pretrained_cfg__input_size=[3, 32, 4097]), r'input_size\[2\] in .* must be an integer from 1 to 4096'),
    (dict(pretrained_cfg__input_size=[4000, 4000, 4000], model_args__in_chans=4000,
          pretrained_cfg__mean=[0], pretrained_cfg__std=[1]), 'input_size in .* of at most 67108864 values'),
    (dict(pretrained_cfg__test_input_size=[3, 0, 32]), r'test_input_size\[1\] in .* must be an integer from 1'),
    (dict(pretrained_cfg__mean=[0, 0, math.inf]), r'mean\[2\] in .* must be a number, got .Infinity'),
    (dict(pretrained_cfg__mean=[0, math.nan, 0]), r'mean\[1\] in .* must be a number, got .NaN'),
    (dict(pretrained_cfg__mean=['a', 'b', 'c']), r"mean\[0\] in .* must be a number, got 'a'"),
    (dict(num_classes=-1), 'num_classes in .* must be an integer from 0 to 1000000, got -1'),
    (dict(num_classes=1_000_001), 'num_classes in .* got 1000001'),
    (dict(num_classes='ten'), "num_classes in .* got 'ten'"),
    (dict(label_names=['a', 'b', 'c']), r"label_names in .* must be 10 names, one for each class, got \['a', 'b', 'c'"),
    (dict(label_names=['a'] * 9 + [5]), r'label_names\[9\] in .* must be text'),
    (dict(depths=[{'depth': 20}] * 1001), 'depths in .* must be a list of 0 to 1000 items'),
    (dict(depths=[{'depth': 20, 'top1': math.nan}]), r'depths\[0\]\.top1 in .* must be a number from 0 to 100'),
    (dict(depths=[{'top1': 1}]), r"depths\[0\] in .* must be an object with 'depth'"),
    (dict(weights_sha256=5), r'weights_sha256 in .* must be text that matches \[0-9a-fA-F\]\{64\}, got 5'),
])
def test_a_strangers_configuration_is_refused_before_anything_is_built(folder, monkeypatch, changes, message):
    """Catches a configuration that takes memory or reads other files, and errors that do not say what is wrong."""
    change(folder, **changes)
    built = []

    class Watched(timm_ddnn.DynamicDepthCifarResNet):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            built.append(kwargs.get('device'))

    Watched.__name__ = 'DynamicDepthCifarResNet'
    monkeypatch.setattr('timm_ddnn.models.ddnn_resnet.DynamicDepthCifarResNet', Watched)
    with pytest.raises(InputError, match=message) as error:
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert len(str(error.value)) < 1_500
    assert set(built) <= {'meta'}


def test_a_configuration_without_weights_is_limited_too(folder):
    """Catches a check that only weights set off."""
    change(folder, model_args__channels=[4, 8, 20_000])
    with pytest.raises(InputError, match='a model of at most 200000000 values, got'):
        timm.create_model(f'local-dir:{folder}')


def test_weights_that_do_not_fit_are_named(folder):
    """Catches an error that does not say which tensor differs."""
    change(folder, model_args__channels=[4, 8, 32])
    with pytest.raises(InputError, match=r'layer3\.0\.conv1\.weight of .* must have shape \(32, 8, 3, 3\) as in'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_damaged_weights_in_a_folder_are_refused(folder):
    """Catches weights in a folder that nobody compares with the sum in config.json."""
    content = bytearray((folder / 'model.safetensors').read_bytes())
    content[-1] ^= 1
    (folder / 'model.safetensors').write_bytes(content)
    with pytest.raises(OSError, match=r'model\.safetensors is damaged: SHA-256 .* as config\.json says'):
        timm.create_model(f'local-dir:{folder}', pretrained=True)


def test_a_saved_model_adapts_to_other_classes_and_channels(folder):
    """Catches checks of sizes that refuse what timm adapts."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=1000, in_chans=1)
    assert model(torch.zeros(1, 1, 32, 32), depth=8).shape == (1, 1000)
    assert torch.equal(model.layer2[0].conv1.weight, make_model().layer2[0].conv1.weight)


@pytest.mark.parametrize('content', ['[]', '{', '{"architecture": "resnet18"}', '{"architecture": 5}',
                                     '{"architecture": "ddnn_resnet20", "pretrained_cfg": 5}'])
def test_a_configuration_of_no_dynamic_model_is_refused_by_the_commands(folder, content):
    """Catches another architecture that is built, or a pickle that is loaded, before its type is checked."""
    (folder / 'config.json').write_text(content)
    (folder / 'model.safetensors').unlink()
    (folder / 'pytorch_model.bin').write_bytes(b'0')
    with pytest.raises(InputError, match=r'config\.json of|must be a dynamic-depth model'):
        create_ddnn(f'local-dir:{folder}', pretrained=True)


def rewrite(folder, change_tensors):
    """Change the tensors of a folder as somebody would who saves them anew, with their checksum."""
    tensors = load_file(folder / 'model.safetensors')
    change_tensors(tensors)
    save_file(tensors, folder / 'model.safetensors')
    change(folder, weights_sha256=file_sha256(folder / 'model.safetensors'))


def put(name, value):
    def change_tensors(tensors):
        tensors[name].view(-1)[0] = value
    return change_tensors


def cast(name, dtype):
    def change_tensors(tensors):
        tensors[name] = tensors[name].to(dtype)
    return change_tensors


@pytest.mark.parametrize(('change_tensors', 'message'), [
    (put('layer2.0.conv1.weight', math.nan), r'layer2\.0\.conv1\.weight of .* finite values, got NaN or infinity'),
    (put('bn1.bias', math.inf), r'bn1\.bias of .* finite values'),
    (put('fc.bias', -math.inf), r'fc\.bias of .* finite values'),
    (put('subnets.14.layer2.0.bn1.running_mean', math.nan), r'subnets\.14\.layer2\.0\.bn1\.running_mean of .* finite'),
    (put('bn1.running_var', -0.5), r'bn1\.running_var of .* must be variances of at least 0, got -0\.5'),
    (lambda tensors: tensors.update({'bn1.bias': torch.full((4,), 1e300, dtype=torch.float64)}), 'bn1.bias .* finite'),
    (lambda tensors: tensors.update({'subnets.trained': torch.full((3,), math.nan)}), r'subnets\.trained of .* finite'),
    (cast('conv1.weight', torch.int32), r'conv1\.weight of .* must be of type torch\.float64, .* got torch\.int32'),
    (cast('fc.weight', torch.bool), r'fc\.weight of .* got torch\.bool'),
    (cast('fc.weight', torch.float8_e4m3fn), r'fc\.weight of .* got torch\.float8_e4m3fn'),
    (lambda tensors: tensors.pop('bn1.bias'), r"1 are missing such as 'bn1\.bias', 0 are unknown"),
    (lambda tensors: tensors.pop('subnets.14.layer2.0.bn1.running_var'), 'running_var'),
    (lambda tensors: tensors.update(other=torch.zeros(1)), r"0 are missing, 1 are unknown such as 'other'"),
    (lambda tensors: tensors.update({'fc.weight': torch.zeros(7, 16), 'fc.bias': torch.zeros(7)}),
     r'num_classes of the configuration must be 7, as in fc\.weight of .*, got 10|fc\.weight .* must have shape'),
])
@pytest.mark.parametrize('place', ['local-dir', 'file', 'state_dict', 'checkpoint_path'])
def test_weights_that_cannot_be_right_are_refused(folder, change_tensors, message, place):
    """Catches a model whose outputs are NaN or random and that says that all its depths are trained."""
    rewrite(folder, change_tensors)
    file = str(folder / 'model.safetensors')
    model = dict(model_name='ddnn_resnet20', channels=(4, 8, 16))
    with pytest.raises(InputError, match=message) as error:
        if place == 'local-dir':
            timm.create_model(f'local-dir:{folder}', pretrained=True)
        elif place == 'checkpoint_path':
            create_ddnn('ddnn_resnet20', channels=(4, 8, 16), checkpoint_path=file)
        else:
            given = {'file': file, 'state_dict': load_file(file)}[place]
            timm.create_model(**model, pretrained=True, pretrained_cfg_overlay={place: given})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize('change_tensors', [
    put('bn1.bias', math.nan), put('bn1.running_var', -0.5), cast('conv1.weight', torch.int32),
])
def test_values_are_checked_wherever_they_are_loaded(folder, change_tensors):
    """Catches weights that timm or torch puts into a model by itself."""
    rewrite(folder, change_tensors)
    file = folder / 'model.safetensors'
    with pytest.raises(InputError, match='of the state dict must'):
        timm.create_model('ddnn_resnet20', channels=(4, 8, 16), checkpoint_path=str(file))
    with pytest.raises(InputError, match='of the state dict must'):
        timm.create_model('ddnn_resnet20', channels=(4, 8, 16)).load_state_dict(load_file(file))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_load(folder, dtype):
    """Catches a check of types that refuses what can be loaded."""
    def change_tensors(tensors):
        tensors.update({name: t.to(dtype) for name, t in tensors.items() if t.is_floating_point()})
    rewrite(folder, change_tensors)
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).trained_depths == (20, 14, 8)


@pytest.mark.parametrize('change_tensors', [put('fc.bias', math.nan), cast('fc.weight', torch.int8)])
def test_a_classifier_that_is_left_out_is_checked_too(folder, change_tensors):
    """Catches checks of the model in the place of the weights: what they would have put into it may be damaged."""
    rewrite(folder, change_tensors)
    with pytest.raises(InputError, match=r'fc\.'):
        timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=5)


def test_weights_of_a_url_are_checked_too(folder, monkeypatch):
    """Catches the one place of weights that timm alone reads."""
    rewrite(folder, put('bn1.bias', math.nan))
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_url', lambda *args, **kwargs: load_file(
        folder / 'model.safetensors'))
    with pytest.raises(InputError, match=r'bn1\.bias of the state dict must have finite values'):
        timm.create_model('ddnn_resnet20', pretrained=True, channels=(4, 8, 16),
                          pretrained_cfg_overlay=dict(url='http://host/net.pth', hf_hub_id=None))


@pytest.mark.parametrize('asked', [{}, {'num_classes': 7}, {'num_classes': 10}, {'num_classes': 5}])
def test_classes_that_contradict_the_weights_are_refused(folder, asked):
    """Catches a classifier of random values in a model that counts as trained, because a file says other classes."""
    change(folder, num_classes=7, label_names=None, pretrained_cfg__label_names=None)
    with pytest.raises(InputError, match=r'num_classes of the configuration must be 10, as in fc\.weight of .*, got 7'):
        timm.create_model(f'local-dir:{folder}', pretrained=True, **asked)


def test_weights_given_in_python_go_before_those_of_the_configuration(folder):
    """Catches a state dict that is passed over for the weights beside the configuration, and one that is printed."""
    bundled = timm.create_model('ddnn_resnet20', pretrained=True).pretrained_cfg
    for cfg in (bundled, read_config(f'local-dir:{folder}')):
        weights = timm.create_model('ddnn_resnet20').state_dict()
        cfg = dict(cfg, state_dict=weights)
        model = timm.create_model('ddnn_resnet20', pretrained=True, pretrained_cfg=cfg)
        assert torch.equal(model.conv1.weight, weights['conv1.weight'])
        assert 'state_dict' not in model.pretrained_cfg
        assert saved_results(model) == []


def test_a_configuration_of_millions_of_names_takes_no_memory(folder):
    """Catches a file that is parsed before anything limits it."""
    with open(folder / 'config.json', 'a') as file:
        file.write(' ' * 2 ** 25)
    tracemalloc.start()
    with pytest.raises(InputError, match='must have at most 16777216 bytes'):
        timm.create_model(f'local-dir:{folder}')
    assert tracemalloc.get_traced_memory()[1] < 2 ** 26
    tracemalloc.stop()
