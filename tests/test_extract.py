"""`timm-ddnn extract`: its folders are loaded by timm alone."""
import json

import numpy as np
import pytest
from helpers.models import create
from helpers.saved_model import CONFIG, arrays, child, failing, files, save

from timm_ddnn.deploy.extract import extract_model
from timm_ddnn.hub.save import save_model
from timm_ddnn_cli.main import main


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model of three depths that differ, as it was saved and as it lies in a folder."""
    folder = tmp_path_factory.mktemp('saved') / 'model'
    return save(folder, channels=(4, 8, 16)), folder


LOAD = """
import timm, torch
found = []
for name in {names}:
    net = timm.create_model(f'local-dir:{{name}}', pretrained=True).eval()
    with torch.no_grad():
        np.save(f'{{name}}.npy', net(torch.from_numpy(x)).numpy())
    cfg = net.pretrained_cfg
    found.append([type(net).__module__, timm.data.resolve_data_config(model=net), cfg['label_names']])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_extracted_models_are_timms_without_this_library(tmp_path, capsys):
    """Catches a folder that only this library loads, other weights, and lost preprocessing, names or results."""
    cases = {
        'out18': ('ddnn_resnet34', 18, 'resnet18', {}),
        'out10': ('ddnn_resnet18', 10, 'resnet18', {'layers': [1, 1, 1, 1]}),
    }
    models = {}
    for out, (name, depth, architecture, args) in cases.items():
        models[out] = save(tmp_path / name, name, num_classes=6)
        main(['extract', str(tmp_path / name), '--depth', str(depth), '--output', str(tmp_path / out), '--json'])
        result = json.loads(capsys.readouterr().out)
        assert (result['architecture'], result['depth'], result['top1'], result['imports']) == (
            architecture, depth, depth + 0.5, ['timm'])
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == ['config.json', 'model.safetensors']
        config = json.loads((tmp_path / out / 'config.json').read_text())
        assert config['architecture'] == architecture
        assert {key: config['model_args'][key] for key in args} == args
        assert 'num_classes' not in config['model_args']
        assert [(row['depth'], row['top1']) for row in config['depths']] == [(depth, depth + 0.5)]
    loaded = child(tmp_path, LOAD.format(names=[*cases]), 'timm_ddnn')
    for (out, (_, depth, _, _)), (module, preprocessing, names) in zip(cases.items(), loaded, strict=True):
        assert module == 'timm.models.resnet'
        assert preprocessing == json.loads(json.dumps(CONFIG))
        assert names == [f'class {i}' for i in range(6)]
        mine, expected = arrays(tmp_path, models[out], depth, f'{out}.npy')
        assert np.array_equal(mine, expected)
        assert not np.allclose(mine, arrays(tmp_path, models[out], models[out].depths[0], f'{out}.npy')[1], atol=1e-2)


@pytest.mark.slow
def test_extracted_cifar_model_says_what_it_needs(saved, tmp_path, capsys):
    """Catches a folder that timm alone is said to load and does not."""
    model, folder = saved
    main(['extract', str(folder), '--depth', '14', '--output', str(tmp_path / 'out')])
    printed = capsys.readouterr().out
    assert 'import timm, timm_ddnn' in printed
    assert 'cifar_resnet14' in printed
    assert '14.50 %' in printed
    child(tmp_path, 'import timm_ddnn' + LOAD.format(names=['out']))
    assert np.array_equal(*arrays(tmp_path, model, 14, 'out.npy'))


def test_depth_that_was_not_trained_is_extracted_with_a_warning(tmp_path, caplog):
    """Catches weights at random that pass for a model."""
    model = create('ddnn_resnet20', channels=(4, 8, 16))
    model.mark_trained([20])
    save_model(model, tmp_path, data_config=CONFIG, class_names=[], rows=[])
    assert extract_model(str(tmp_path), 8, tmp_path / '8')['trained'] is False
    assert 'not trained' in caplog.text
    caplog.clear()
    assert extract_model(f'local-dir:{tmp_path}', 20, tmp_path / '20')['trained'] is True
    assert 'not trained' not in caplog.text


@pytest.mark.parametrize(('args', 'message'), [
    (['{m}', '--depth', '26', '--output', '{t}/out'], 'depth must be one of (20, 14, 8)'),
    (['{m}', '--depth', 'x', '--output', '{t}/out'], "invalid int value: 'x'"),
    (['{m}', '--depth', '14', '--output', '{m}'], 'a new or an empty folder'),
    (['{m}', '--depth', '14', '--output', '{m}/config.json/out'], 'must be a folder'),
    (['{t}', '--depth', '14', '--output', '{t}/out'], 'cannot be created'),
    (['{t}/damaged', '--depth', '14', '--output', '{t}/out'], 'cannot be created'),
    (['vgg11', '--depth', '14', '--output', '{t}/out'], 'nets of several depths are made of'),
])
def test_wrong_input_of_extract(args, message, saved, tmp_path, capsys):
    """Catches tracebacks, and a folder that stays behind."""
    save(tmp_path / 'damaged', channels=(4, 8, 16))
    (tmp_path / 'damaged' / 'model.safetensors').write_bytes(b'nothing')
    before = files(tmp_path), files(saved[1])
    args = [arg.format(m=saved[1], t=tmp_path) for arg in args]
    assert message in failing(capsys, 'extract', *args)
    assert (files(tmp_path), files(saved[1])) == before
