"""Configurations and weights from elsewhere, in a folder: what is refused, and what is loaded as timm loads it."""
import json
import math

import pytest
import timm
import torch
from helpers.small_models import make_model, save

import timm_ddnn
from timm_ddnn.models.load import create_ddnn
from timm_ddnn.weights import config_checks


@pytest.fixture
def folder(tmp_path):
    return save(make_model(), tmp_path / 'net')


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
    (dict(model_args__layers=[10 ** 9, 1, 1]), 'layers in config.json must be at most 1000000, got 1000000000'),
    (dict(model_args__layers=[900, 900, 900]), 'must be of at most 1000 blocks'),
    (dict(model_args__layers=[100] * 3, model_args__subnets=[[i] * 3 for i in (1, 2, 3)]),
     'at most 1000 blocks, got 1200'),
    (dict(model_args__layers=[1] * 10_000), 'at most 1000 entries, got 10000'),
    (dict(model_args__layers='many'), "numbers of blocks per stage, got 'many'"),
    (dict(model_args__layers=[3, 3]), 'make no DynamicDepthCifarResNet: layers and channels must be of three stages'),
    (dict(model_args__subnets=[[9, 9, 9]]), 'blocks of a sub-net must be 3 integers'),
    (dict(model_args__channels=[4, 8, 900_000]), r'at most \d+ values, got \d+, the weights hold \d+'),
    (dict(model_args__global_pool='x'), 'make no DynamicDepthCifarResNet'),
    (dict(model_args__surprise=1), r"model_args in config.json must be of .* got \['surprise'\]"),
    (dict(model_args__device='meta'), r"got \['device'\]"),
    (dict(model_args__pretrained_strict=False), r"got \['pretrained_strict'\]"),
    (dict(model_args__subnets=5), "subnets in config.json must be a list, got '5'"),
    (dict(pretrained_cfg__first_conv=5), "first_conv in config.json must be text, got '5'"),
    (dict(pretrained_cfg__std=[0, 0, 0]), 'std in config.json must be 3 numbers'),
    (dict(pretrained_cfg__std=[1, 1, -1]), r'std in config.json must be 3 numbers above 0, got .\[1, 1, -1\]'),
    (dict(pretrained_cfg__std=[1, 1]), 'std in config.json must be 3 numbers'),
    (dict(pretrained_cfg__crop_pct=0), "crop_pct in config.json must be a number above 0, at most 2, got '0'"),
    (dict(pretrained_cfg__test_crop_pct=2.1), 'test_crop_pct in config.json must be a number above 0, at most 2'),
    (dict(pretrained_cfg__license=5), "license in config.json must be text, got '5'"),
    (dict(pretrained_cfg__hf_hub_id='me/other'), "got hf_hub_id='me/other'"),
    (dict(pretrained_cfg__crop_pct='x'), "crop_pct in config.json must be a number above 0, at most 2, got 'x'"),
    (dict(pretrained_cfg__hf_hub_filename='../../other.bin'), "got hf_hub_filename='../../other.bin'"),
    (dict(pretrained_cfg__url='http://127.0.0.1/x.pth'), "got url='http://127.0.0.1/x.pth'"),
    (dict(pretrained_cfg__custom_load=True), 'got custom_load=True'),
    (dict(pretrained_cfg__surprise=1), r"got \['surprise'\]"),
    (dict(model_args__in_chans=None, pretrained_cfg__input_size=None),
     r"input_size in config.json must be .* pixels, got 'None'"),
    (dict(num_classes=None), "num_classes .* got 'None'"),
    (dict(pretrained_cfg__input_size=[3, 32]), r'input_size .* got .\(3, 32\).'),
    (dict(pretrained_cfg__input_size=[3, 32, 4097]), 'channels, height and width, of at most 4096 pixels'),
    (dict(pretrained_cfg__test_input_size=[3, 0, 32]), 'test_input_size in config.json must be'),
    (dict(pretrained_cfg__mean=[0, 0, math.inf]), 'mean in config.json must be 3 numbers'),
    (dict(pretrained_cfg__mean=['a', 'b', 'c']), 'mean in config.json must be 3 numbers'),
    (dict(num_classes=-1), "num_classes in config.json must be an integer from 0 to 1000000, got '-1'"),
    (dict(num_classes=1_000_001), "num_classes .* got '1000001'"),
    (dict(num_classes='ten'), "num_classes .* got 'ten'"),
    (dict(weights_sha256=5), "weights_sha256 in .* must be 64 hexadecimal digits, got '5'"),
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
    with pytest.raises(ValueError, match=message):
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert set(built) <= {'meta'}


def test_a_configuration_without_weights_is_limited_too(folder, monkeypatch):
    """Catches a check that only weights set off."""
    monkeypatch.setattr(config_checks, 'MAX_PARAMETERS', 1_000)
    with pytest.raises(ValueError, match='a model of at most 1000 values, got'):
        timm.create_model(f'local-dir:{folder}')


def test_weights_that_do_not_fit_are_named(folder):
    """Catches an error that does not say which tensor differs."""
    change(folder, model_args__channels=[4, 8, 32])
    with pytest.raises(RuntimeError, match=r'layer3\.0\.conv1\.weight'):
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
    with pytest.raises(ValueError, match=r'config\.json of|in config\.json'):
        create_ddnn(f'local-dir:{folder}', pretrained=True)
