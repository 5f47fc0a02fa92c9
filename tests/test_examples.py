"""The examples run offline and show what they say."""
import random
import re
import runpy
import subprocess
import sys

import onnxruntime
import pytest
import torch
from helpers.models import create
from helpers.training import ROOT
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_input_data_config

from timm_ddnn.deploy.controller import DepthController
from timm_ddnn.deploy.export import export
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.load import load_model

CONFIG = dict(
    input_size=(3, 32, 32), interpolation='bicubic', mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0, crop_mode='center')
NAMES = [f'animal {i}' for i in range(10)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a model whose depths differ; the random state comes back after the test."""
    model = create('ddnn_resnet20', channels=(4, 8, 16))
    model.mark_trained(model.depths)
    (tmp_path / 'model').mkdir()
    save_model(model, tmp_path / 'model', data_config=CONFIG, class_names=NAMES, rows=[])
    monkeypatch.setenv('MPLBACKEND', 'agg')
    with torch.random.fork_rng():
        yield tmp_path


def run(monkeypatch, name, *args):
    monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
    return runpy.run_path(str(ROOT / 'examples' / name), run_name='__main__')


def test_photograph(folder, monkeypatch, capsys):
    """Catches an example that does not run, a table of another depth, and a picture that is none."""
    picture = folder / 'picture.png'
    args = ['--model', f'local-dir:{folder / "model"}', '--output', picture, '--repeats', 2]
    run(monkeypatch, 'photograph.py', *args)
    printed = capsys.readouterr().out
    assert 'has depths (20, 14, 8), trained are (20, 14, 8); 10 classes' in printed
    table = {line[:8]: line[8:].split() for line in printed.splitlines() if line.startswith('animal ')}
    assert len(table) == 5
    model, answers = load_model(str(folder / 'model')), set()
    transform = create_transform(**resolve_input_data_config(model))
    image = transform(Image.fromarray(load_sample_image('china.jpg')))[None]
    for column, depth in enumerate((20, 14, 8)):
        with torch.no_grad():
            expected = model.extract(depth)(image).softmax(-1)[0]
        for name, values in table.items():
            assert abs(float(values[column]) - 100 * expected[NAMES.index(name)].item()) < 0.06
        answers.add(tuple(expected.tolist()))
    assert len(answers) == 3
    assert len(re.findall(r'depth \d+: \d+\.\d ms', printed)) == 3
    with Image.open(picture) as image:
        assert image.format == 'PNG' and image.width > 500 and len(image.convert('RGB').getcolors(10 ** 7)) > 1000


def test_photograph_needs_nothing_but_the_library(folder, monkeypatch, capsys):
    """Catches a default model without weights, or weights that need a network."""
    run(monkeypatch, 'photograph.py', '--output', folder / 'default.png', '--repeats', 1)
    printed = capsys.readouterr().out
    assert 'has depths (20, 14, 8), trained are (20, 14, 8); 10 classes' in printed
    assert re.search(r'depth 20 says (airplane|automobile|bird|cat|deer|dog|frog|horse|ship|truck)', printed)


@pytest.mark.parametrize(('args', 'message'), [
    (['none.jpg'], 'none.jpg'),
    (['--output', 'none/picture.png'], 'none/picture.png'),
    (['--model', 'levit_128'], 'nets of several depths are made of'),
    (['--repeats', '0'], 'must be an integer of at least 1'),
])
def test_photograph_with_wrong_input(args, message, folder, monkeypatch, capsys):
    """Catches a traceback in the place of one line."""
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, 'photograph.py', '--model', f'local-dir:{folder / "model"}', '--repeats', 1, *args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_feature_pyramid(folder, monkeypatch, capsys):
    """Catches maps of other strides than a detector is built for, and training that does not lower the loss."""
    run(monkeypatch, 'feature_pyramid.py', '--model', 'ddnn_resnet18', '--depth', 10, '--steps', 11)
    printed = capsys.readouterr().out
    assert re.findall(r'stride (\d+): (.*)', printed) == [
        ('8', '[1, 128, 16, 24]'), ('16', '[1, 256, 8, 12]'), ('32', '[1, 512, 4, 6]')]
    losses = [float(loss) for loss in re.findall(r'loss (\S+)', printed)]
    assert len(losses) == 2 and losses[1] < 0.7 * losses[0]
    assert re.search(r'overlaps the flower by \d+ % on average', printed)


@pytest.mark.parametrize(('args', 'message'), [
    (['--depth', '17'], 'depth must be one of (34, 18, 10)'),
    (['--model', 'resnet18'], "invalid choice: 'resnet18'"),
    (['--steps', '0'], 'must be an integer of at least 1'),
])
def test_feature_pyramid_with_wrong_input(args, message, folder, monkeypatch, capsys):
    """Catches a traceback in the place of one line."""
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, 'feature_pyramid.py', *args)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_device(folder, monkeypatch, capsys):
    """Catches an example that needs the library, prepares images otherwise, or moves the depth by other rules."""
    model = load_model(str(folder / 'model'))
    file, = {row['file'] for row in export(model, 'all', folder, format='onnx', images=torch.randn(2, 3, 32, 32))}
    photograph = Image.fromarray(load_sample_image('china.jpg'))
    photograph.save(folder / 'photo.png')
    code = 'import sys, runpy; sys.modules |= dict.fromkeys(("torch", "timm", "timm_ddnn")); ' \
           'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'

    def device(*args):
        return subprocess.run(
            [sys.executable, '-c', code, ROOT / 'examples/device.py', *map(str, args)], capture_output=True, text=True)

    result = device(file, folder / 'photo.png', '--depth', 14)
    with torch.no_grad():
        image = create_transform(**resolve_input_data_config(model))(photograph)[None]
        probabilities = model(image, depth=14).softmax(-1)[0]
    best = probabilities.argmax().item()
    assert f'photo.png: {NAMES[best]} {100 * probabilities[best]:.1f} %, depth 14,' in result.stdout, result.stderr
    one = export(model, 14, folder, format='onnx', images=torch.randn(2, 3, 32, 32))[0]['file']
    for args in (
        [folder / 'none.onnx', folder / 'photo.png'], [file, folder / 'model/config.json'], [one, folder / 'photo.png'],
        [file, folder / 'photo.png', '--depth', 'x'], [file, folder / 'photo.png', '--budget-ms', 'nan'],
        [file, folder / 'photo.png', '--threads', '100000'],
    ):
        with pytest.raises(SystemExit) as error:
            run(monkeypatch, 'device.py', *args)
        assert error.value.code == 2
        assert sum('error: ' in line for line in capsys.readouterr().err.splitlines()) == 1
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(onnxruntime, '__version__', '1.28.0')
        run(monkeypatch, 'device.py', file, folder / 'photo.png')
    assert 'onnxruntime must be 1.29 or later, got 1.28.0' in capsys.readouterr().err
    run(monkeypatch, 'device.py', file, folder / 'photo.png', '--depth', '19')
    assert 'depth 14,' in capsys.readouterr().out

    example = runpy.run_path(str(ROOT / 'examples/device.py'))
    costs, depths = {20: 4.0, 14: 2.5, 8: 1.0}, set()
    options = dict(window=4, headroom=0.8, patience=6)
    controllers = example['Controller'](costs, 10, **options), DepthController(costs, 10, **options)
    generator = random.Random(0)
    for i in range(2000):
        load = generator.uniform(1, 3) if i // 200 % 2 else generator.uniform(2, 12)
        latency = load * costs[controllers[0].depth]
        for controller in controllers:
            controller.record(latency)
        assert controllers[0].depth == controllers[1].depth
        depths.add(controllers[0].depth)
    assert depths == {20, 14, 8}


@pytest.mark.slow
def test_server_with_wrong_input(folder, monkeypatch, capsys):
    """Catches a server that starts with a file, a depth or a budget that it cannot serve, and tracebacks."""
    model, x = load_model(str(folder / 'model')), torch.randn(2, 3, 32, 32)
    file, one = (export(model, depth, folder, format='onnx', images=x)[0]['file'] for depth in ('all', 14))
    monkeypatch.setattr('uvicorn.run', lambda app, **kwargs: print('serves'))
    for args, message in (
        ([file], None),
        ([file, '--depth', '15'], 'depth must be of [20, 14, 8], got 15'),
        ([file, '--budget-ms', 'nan'], 'argument --budget-ms: must be a number'),
        ([file, '--threads', '100000'], 'argument --threads: must be an integer from 1 to'),
        ([one], 'must be a file of several depths, got one of depth 14'),
        ([folder / 'none.onnx'], 'there must be an ONNX file'),
        ([folder / 'model/config.json'], 'must be an ONNX file'),
    ):
        if message is None:
            run(monkeypatch, 'server.py', *args, '--budget-ms', '100')
            assert 'serves' in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit) as error:
            run(monkeypatch, 'server.py', '--budget-ms', '100', *args)
        assert error.value.code == 2
        line, = capsys.readouterr().err.splitlines()
        assert message in line
