"""`timm-ddnn extract`, `export` and `calibrate`: what they write is read by programs that do not know this library."""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import onnx
import pytest
import timm
import torch
from conftest import create
from helpers.image_files import DAMAGED, png, write_parquet
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform

from timm_ddnn import calibration
from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.data.images import Images
from timm_ddnn.deploy import export as exporting
from timm_ddnn.deploy.calibrate import calibrate_model
from timm_ddnn.deploy.export import export_model
from timm_ddnn.deploy.extract import extract_model
from timm_ddnn.hub.save import save_model
from timm_ddnn.models import load as load_module
from timm_ddnn.models.load import load_model, saved_results
from timm_ddnn_cli.commands import calibrate
from timm_ddnn_cli.main import main

CONFIG = dict(
    input_size=(3, 24, 24), interpolation='bilinear', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.8,
    crop_mode='center',
)
TRANSFORM = create_transform(**CONFIG)


def save(folder, name='ddnn_resnet20', **kwargs):
    """Write a model folder as a training run does; return its model."""
    model = create(name, **kwargs)
    model.mark_trained(model.depths)
    folder.mkdir(exist_ok=True, parents=True)
    rows = [{'depth': d, 'blocks': list(model.blocks(d)), 'top1': d + 0.5, 'top5': d + 1.5} for d in model.depths]
    names = [f'class {i}' for i in range(model.num_classes)]
    save_model(model, folder, data_config=CONFIG, class_names=names, rows=rows)
    return model


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model of three depths that differ, as it was saved and as it lies in a folder."""
    folder = tmp_path_factory.mktemp('saved') / 'model'
    return save(folder, channels=(4, 8, 16)), folder


@pytest.fixture
def digits(tmp_path, surroundings):
    """A data set of 70 and 40 digits."""
    write_parquet(tmp_path / 'data' / 'train.parquet', list(range(70)))
    write_parquet(tmp_path / 'data' / 'validation.parquet', list(range(70, 110)))
    return tmp_path / 'data'


def photograph():
    return Image.fromarray(load_sample_image('flower.jpg'))


def child(folder, code, *forbidden):
    """Run code in a process that cannot import some packages, from x.npy to y.npy; what it prints is JSON."""
    np.save(folder / 'x.npy', torch.stack([TRANSFORM(photograph()), TRANSFORM(photograph()).flip(-1)] * 3).numpy())
    head = f'import json, sys\nimport numpy as np\nx = np.load("x.npy")\nsys.modules |= dict.fromkeys({forbidden!r})\n'
    environment = dict(os.environ, PYTHONPATH='', OMP_NUM_THREADS=str(torch.get_num_threads()))
    run = subprocess.run(
        [sys.executable, '-c', head + code], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def arrays(folder, model, depth):
    """What the child process computed, and what the model computes."""
    with torch.no_grad():
        return np.load(folder / 'y.npy'), model(torch.from_numpy(np.load(folder / 'x.npy')), depth=depth).numpy()


def failing(capsys, *args, status=2):
    """Run a command that must end with one line; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([str(arg) for arg in args])
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith('error: ')]  # others may warn besides
    assert (error.value.code, captured.out, len(errors)) == (status, '', 1), captured.err
    assert 'Traceback' not in captured.err
    return errors[0]


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob('*'))}


# extract

LOAD = """
import timm, torch
net = timm.create_model('local-dir:out', pretrained=True).eval()
with torch.no_grad():
    np.save('y.npy', net(torch.from_numpy(x)).numpy())
cfg = net.pretrained_cfg
print(json.dumps([type(net).__module__, timm.data.resolve_data_config(model=net), cfg['label_names']]))
"""


@pytest.mark.parametrize(('name', 'depth', 'architecture', 'args'), [
    ('ddnn_resnet34', 18, 'resnet18', {}),
    ('ddnn_resnet18', 10, 'resnet18', {'layers': [1, 1, 1, 1]}),
])
def test_extracted_model_is_timms_without_this_library(name, depth, architecture, args, tmp_path, capsys):
    """Catches a folder that only this library loads, other weights, and lost preprocessing, names or results."""
    model = save(tmp_path / 'model', name, num_classes=6)
    main(['extract', str(tmp_path / 'model'), '--depth', str(depth), '--output', str(tmp_path / 'out'), '--json'])
    result = json.loads(capsys.readouterr().out)
    assert (result['architecture'], result['depth'], result['top1'], result['imports']) == (
        architecture, depth, depth + 0.5, ['timm'])
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']

    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == architecture
    assert {key: config['model_args'][key] for key in args} == args
    assert 'num_classes' not in config['model_args']
    assert [(row['depth'], row['top1']) for row in config['depths']] == [(depth, depth + 0.5)]
    module, preprocessing, names = child(tmp_path, LOAD, 'timm_ddnn')
    assert module == 'timm.models.resnet'
    assert preprocessing == json.loads(json.dumps(CONFIG))
    assert names == [f'class {i}' for i in range(6)]
    mine, expected = arrays(tmp_path, model, depth)
    assert np.array_equal(mine, expected)
    assert not np.allclose(mine, arrays(tmp_path, model, model.depths[0])[1], atol=1e-2)


def test_extracted_cifar_model_says_what_it_needs(saved, tmp_path, capsys):
    """Catches a folder that timm alone is said to load and does not."""
    model, folder = saved
    main(['extract', str(folder), '--depth', '14', '--output', str(tmp_path / 'out')])
    printed = capsys.readouterr().out
    assert 'import timm, timm_ddnn' in printed
    assert 'cifar_resnet14' in printed
    assert 'top-1 14.50 %' in printed
    child(tmp_path, 'import timm_ddnn' + LOAD)
    assert np.array_equal(*arrays(tmp_path, model, 14))


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
    (['{m}', '--depth', '26', '--output', '{t}/out'], 'depth must be of (20, 14, 8)'),
    (['{m}', '--depth', 'x', '--output', '{t}/out'], "invalid int value: 'x'"),
    (['{m}', '--depth', '14', '--output', '{m}'], 'a new or an empty folder'),
    (['{m}', '--depth', '14', '--output', '{m}/config.json/out'], 'must be a folder'),
    (['{t}', '--depth', '14', '--output', '{t}/out'], 'cannot be created'),
    (['{t}/damaged', '--depth', '14', '--output', '{t}/out'], 'cannot be created'),
    (['resnet50', '--depth', '14', '--output', '{t}/out'], 'must be a dynamic-depth model'),
])
def test_wrong_input_of_extract(args, message, saved, tmp_path, capsys):
    """Catches tracebacks, and a folder that stays behind."""
    save(tmp_path / 'damaged', channels=(4, 8, 16))
    (tmp_path / 'damaged' / 'model.safetensors').write_bytes(b'nothing')
    before = files(tmp_path), files(saved[1])
    args = [arg.format(m=saved[1], t=tmp_path) for arg in args]
    assert message in failing(capsys, 'extract', *args)
    assert (files(tmp_path), files(saved[1])) == before


# export

ONNX = """
from PIL import Image
import onnxruntime
session = onnxruntime.InferenceSession({file!r}, providers=['CPUExecutionProvider'])
meta = session.get_modelmeta().custom_metadata_map
about = {{key: json.loads(meta[key]) for key in ('input_size', 'crop_pct', 'mean', 'std')}}

# from the photograph by what the file says, with nothing but PIL and NumPy
photograph = Image.open('photograph.png')
_, height, width = about['input_size']
shorter = int(height / about['crop_pct'])
size = [int(shorter * side / min(photograph.size)) for side in photograph.size]
photograph = photograph.resize(size, getattr(Image.Resampling, meta['interpolation'].upper()))
left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
pixels = np.asarray(photograph.crop((left, top, left + width, top + height)))
image = ((pixels / 255 - about['mean']) / about['std']).astype(np.float32).transpose(2, 0, 1)[None]

np.save('y.npy', np.concatenate([session.run(None, {{'images': x[i:j]}})[0] for i, j in ((0, 1), (1, 6))]))
np.save('image.npy', image)
print(json.dumps([meta, session.get_inputs()[0].shape, session.get_outputs()[0].shape]))
"""
TORCH = """
import torch
extra = {{'metadata.json': ''}}
if {file!r}.endswith('.pt2'):
    net = torch.export.load({file!r}, extra_files=extra).module()
else:
    net = torch.jit.load({file!r}, _extra_files=extra)
x = torch.from_numpy(x)
with torch.no_grad():
    np.save('y.npy', torch.cat([net(x[:1]), net(x[1:])]).numpy())
print(json.dumps(json.loads(extra['metadata.json'])))
"""


def check_description(about, depth):
    assert {key: about[key] for key in CONFIG} == json.loads(json.dumps(CONFIG))
    assert (about['model'], about['depth'], about['blocks']) == ('ddnn_resnet20', depth, [(depth - 2) // 6] * 3)
    assert about['label_names'] == [f'class {i}' for i in range(10)]
    assert (about['top1'], about['top5']) == (depth + 0.5, depth + 1.5)
    assert about['dynamic_batch'] is True
    assert 'before the softmax' in about['output']
    assert f'torch {torch.__version__}' in about['library']


def test_onnx_is_read_without_torch(saved, tmp_path, capsys):
    """Catches logits of another depth or after a softmax, a batch that is not free, and preprocessing wrongly stated.

    A process with onnxruntime alone prepares a photograph by the metadata.
    """
    model, folder = saved
    args = ['--depth', 'all', '--format', 'onnx', '--dynamic-batch', '--json']
    main(['export', str(folder), *args, '--output', str(tmp_path / 'out')])
    rows = json.loads(capsys.readouterr().out)
    assert [Path(row['file']) for row in rows] == [tmp_path / 'out' / f'ddnn_resnet20-{d}.onnx' for d in (20, 14, 8)]
    assert files(tmp_path / 'out').keys() == {Path(row['file']) for row in rows}
    photograph().save(tmp_path / 'photograph.png')
    logits = {}
    for row in rows:
        depth = row['depth']
        assert (row['images'], row['batch_sizes'], row['top1_agreement']) == (4, [1, 4], 100)
        assert 0 < row['max_difference'] < row['allowed'] < 1e-2
        onnx.checker.check_model(row['file'], full_check=True)
        meta, inputs, outputs = child(tmp_path, ONNX.format(file=row['file']), 'torch', 'timm', 'timm_ddnn')
        assert (inputs, outputs) == (['batch', 3, 24, 24], ['batch', 10])
        text = ('input', 'output', 'interpolation', 'crop_mode', 'model', 'library')
        check_description({k: v if k in text else json.loads(v) for k, v in meta.items()}, depth)
        assert np.abs(np.load(tmp_path / 'image.npy') - TRANSFORM(photograph()).numpy()).max() < 1e-6
        logits[depth], expected = arrays(tmp_path, model, depth)
        assert np.abs(logits[depth] - expected).max() < row['allowed']
    assert np.abs(logits[20] - logits[14]).max() > 0.05 < np.abs(logits[14] - logits[8]).max()


@pytest.mark.parametrize('format', ['torch-export', 'torchscript'])
def test_formats_of_torch_are_read_without_timm(format, saved, tmp_path, caplog):
    """Catches files that need this library or timm, and a batch that is not free."""
    model, folder = saved
    row, = export_model(str(folder), 14, format, tmp_path, dynamic_batch=format == 'torch-export')
    check_description(child(tmp_path, TORCH.format(file=row['file']), 'timm', 'timm_ddnn'), 14)
    mine, expected = arrays(tmp_path, model, 14)
    assert np.abs(mine - expected).max() < row['allowed'] < 1e-2
    assert ('deprecated' in caplog.text) is (format == 'torchscript')


def test_fixed_batch_is_of_one_image(saved, tmp_path):
    """Catches a file that is said to take one image and was compared with others, or takes any."""
    folder = str(saved[1])
    export_model(folder, 8, 'torch-export', tmp_path)
    row, = export_model(folder, 8, 'onnx', tmp_path)
    assert row['batch_sizes'] == [1]
    graph = onnx.load(row['file']).graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [1, 3, 24, 24]
    net = torch.export.load(tmp_path / 'ddnn_resnet20-8.pt2').module()
    assert net(torch.zeros(1, 3, 24, 24)).shape == (1, 10)
    with pytest.raises(AssertionError, match='size'):
        net(torch.zeros(2, 3, 24, 24))


@pytest.mark.parametrize(('format', 'fault'), [
    ('onnx', 'depth'), ('torch-export', 'depth'), ('torch-export', 'nan'), ('torchscript', 'nan'),
    ('torchscript', 'softmax'),
])
def test_file_that_computes_something_else_is_removed(format, fault, saved, tmp_path, capsys, monkeypatch):
    """Catches a comparison that compares nothing, one that NaN passes, and a wrong file that stays."""
    write = exporting._write

    def write_wrong(file, format, net, *args):
        if file.stem.endswith('-8'):
            other = saved[0].extract(14) if fault == 'depth' else net
            if fault == 'nan':
                other.fc.bias.data[3] = torch.nan
            net = torch.nn.Sequential(other, torch.nn.Softmax(-1)) if fault == 'softmax' else other
        write(file, format, net, *args)

    monkeypatch.setattr(exporting, '_write', write_wrong)
    (tmp_path / 'ddnn_resnet20-8.onnx').write_bytes(b'of an earlier run')
    before = files(tmp_path)
    args = ['export', saved[1], '--depth', 'all', '--format', format, '--output', tmp_path]
    line = failing(capsys, *args, status=1)
    assert 'ddnn_resnet20-8' in line and 'differs from depth 8' in line
    assert ('nan' in line) is (fault == 'nan')
    assert files(tmp_path) == before


def test_tolerance_is_kept(saved, tmp_path):
    """Catches a tolerance that nobody looks at."""
    images = exporting.load_images(saved[0])
    with pytest.raises(exporting.ExportMismatchError, match='where 0 is allowed'):
        exporting.export(saved[0], 14, tmp_path, format='onnx', images=images, tolerance=0.0)
    assert not files(tmp_path)


def test_export_changes_nothing_in_the_model(saved, tmp_path):
    """Catches a model in training that comes back in eval mode, and files in its mode or type."""
    model = create('ddnn_resnet20', channels=(4, 8, 16)).double().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row, = exporting.export(model, 8, tmp_path, format='torch-export', images=torch.randn(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    net = torch.export.load(row['file']).module()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(net(x), model.eval()(x.double(), depth=8).float(), atol=1e-4, rtol=1e-4)


def test_file_that_does_not_run_on_several_images_is_removed(saved, tmp_path, monkeypatch):
    """Catches a batch that is said to be free and is not: a traceback, or a file that stays."""
    export = torch.export.export
    monkeypatch.setattr(torch.export, 'export', lambda net, args, dynamic_shapes: export(net, args))
    images = exporting.load_images(saved[0])
    with pytest.raises(exporting.ExportMismatchError, match='does not run on 1 images'):
        exporting.export(saved[0], 8, tmp_path, format='torch-export', images=images, dynamic_batch=True)
    assert not files(tmp_path)


def test_file_that_is_wrong_for_several_images_is_removed(saved, tmp_path, monkeypatch):
    """Catches a comparison of one image at a time, where a file with a free batch mixes its images."""
    class Mixing(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            logits = self.net(x)
            return logits + (logits - logits.mean(0))

    write = exporting._write
    monkeypatch.setattr(
        exporting, '_write', lambda file, format, net, *args: write(file, format, Mixing(net).eval(), *args))
    images = exporting.load_images(saved[0])
    with pytest.raises(exporting.ExportMismatchError, match='differs from depth 8'):
        exporting.export(saved[0], 8, tmp_path, format='torchscript', images=images)
    assert not files(tmp_path)
    assert exporting.export(saved[0], 8, tmp_path, format='onnx', images=images)  # of one image, which it is right for


@pytest.mark.parametrize('shape', [(0, 3, 32, 32), (2, 3, 24, 24), (2, 1, 32, 32)])
def test_images_of_another_size_are_refused(shape, saved, tmp_path):
    """Catches a file of another size than its metadata says."""
    with pytest.raises(ValueError, match=r'images must be \[N, 3, 32, 32\], got \['):
        exporting.export(saved[0], 8, tmp_path, format='torchscript', images=torch.zeros(shape))


def test_images_are_of_the_data_set(saved, digits):
    """Catches images of another split or preparation, and all of them from its beginning."""
    model = load_model(str(saved[1]))
    images = exporting.load_images(model, str(digits), num=4)
    expected = [TRANSFORM(Image.open(io.BytesIO(png(70 + row))).convert('RGB')) for row in (0, 13, 26, 39)]
    assert torch.equal(images, torch.stack(expected))
    assert len(exporting.load_images(model, str(digits), num=100)) == 40


def test_grey_photographs(tmp_path):
    """Catches a model of grey images that cannot be exported without data."""
    model = create('ddnn_resnet20', channels=(4, 8, 16), in_chans=1)
    images = exporting.load_images(model)
    assert images.shape == (4, 1, 32, 32)
    assert 'grey' in exporting.describe_net(model, 8)['input']
    assert 'label_names' not in exporting.describe_net(model, 8)


@pytest.mark.parametrize(('args', 'message'), [
    (['{m}', '--depth', '26', '--format', 'onnx'], 'depth must be of (20, 14, 8)'),
    (['{m}', '--depth', 'every', '--format', 'onnx'], "must be a depth such as 26, or 'all', got 'every'"),
    (['{m}', '--depth', '14', '--format', 'tflite'], "invalid choice: 'tflite'"),
    (['{m}', '--depth', '14', '--format', 'onnx', '--tolerance', '-1'], 'must be a number of at least 0'),
    (['{m}', '--depth', '14', '--format', 'onnx', '--data', '{t}/empty'], 'has neither'),
    (['{m}', '--depth', '14', '--format', 'onnx', '--data', '{t}/damaged'], 'cannot be read'),
    (['{m}', '--depth', '14', '--format', 'onnx', '--output', '{m}/config.json'], 'must be a folder'),
    (['{t}/none', '--depth', '14', '--format', 'onnx'], "must be a folder of a model, 'hf-hub:OWNER/NAME' or a name"),
])
def test_wrong_input_of_export(args, message, saved, tmp_path, capsys, surroundings):
    """Catches tracebacks, and files that stay behind."""
    (tmp_path / 'empty').mkdir()
    write_parquet(tmp_path / 'damaged' / 'validation.parquet', [0, 1], files=[png(0), DAMAGED])
    before = {path.name for path in tmp_path.iterdir()} | {'cache'}, files(saved[1])
    assert message in failing(capsys, 'export', *(arg.format(m=saved[1], t=tmp_path) for arg in args))
    assert ({path.name for path in tmp_path.iterdir()} | {'cache'}, files(saved[1])) == before


def test_missing_packages_are_named(saved, tmp_path, capsys, monkeypatch):
    """Catches a traceback where onnxruntime or scikit-learn is not installed."""
    monkeypatch.setattr(exporting, 'find_spec', lambda name: None if name == 'onnxruntime' else name)
    line = failing(capsys, 'export', saved[1], '--depth', 8, '--format', 'onnx', '--output', tmp_path)
    assert "onnxruntime: pip install 'timm-ddnn[export]'" in line
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    line = failing(capsys, 'export', saved[1], '--depth', 8, '--format', 'torchscript', '--output', tmp_path)
    assert 'data must be given' in line
    assert not files(tmp_path)


def test_saved_results_are_those_of_the_models_own_config(saved, tmp_path, monkeypatch):
    """Catches accuracies of another model or revision, and an error where there are none."""
    model = load_model(str(saved[1]))
    assert [row['top1'] for row in saved_results(model)] == [20.5, 14.5, 8.5]
    asked = []

    def fetch(repo_id, filename, revision=None):
        asked.append((repo_id, filename, revision))
        return saved[1] / filename

    monkeypatch.setattr(load_module, 'fetch', fetch)
    model.pretrained_cfg = {'hf_hub_id': 'owner/name@v1', 'source': 'hf-hub'}
    assert [row['top1'] for row in saved_results(model)] == [20.5, 14.5, 8.5]
    assert asked == [('owner/name', 'config.json', 'v1')]
    for content in ('{}', '{"depths": 3}', '{"depths": [{"depth": 101}]}', 'nothing'):
        (tmp_path / 'config.json').write_text(content)
        model.pretrained_cfg = {'file': str(tmp_path / 'model.safetensors')}
        assert saved_results(model) == []


# calibrate

def test_calibrated_depth_is_added_and_no_other_changes(saved, digits, tmp_path, capsys, monkeypatch):
    """Catches another depth that changes, statistics of augmented or validation images, and wrong accuracies."""
    model, folder = saved
    batches = []

    def record(model, loader, depth):
        batches.extend(images for images, _ in loader)
        return calibration.calibrate_bn(model, loader, depth=depth)

    monkeypatch.setattr(calibrate, 'calibrate_bn', record)
    args = ['--blocks', '1,2,2', '--data', str(digits), '--output', str(tmp_path / 'out'), '-j', '0']
    main(['calibrate', str(folder), *args, '--images', '50', '-b', '20', '--json'])
    result = json.loads(capsys.readouterr().out)
    assert (result['depth'], result['images'], result['validation_images']) == (12, 40, 40)
    data = load_image_data(str(digits))
    train = Images(data, 'train', TRANSFORM)
    known = {train[0, i][0].numpy().tobytes() for i in range(70)}
    seen = [image.numpy().tobytes() for batch in batches for image in batch]
    assert len(batches) == 2 and len(set(seen)) == 40 and set(seen) <= known

    again = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert again.depths == again.trained_depths == (20, 14, 12, 8)
    x = torch.randn(4, 3, 24, 24)
    fresh = create('ddnn_resnet20', channels=(4, 8, 16))
    fresh.add_subnet((1, 2, 2))
    with torch.no_grad():
        for depth in model.depths:
            assert torch.equal(again(x, depth=depth), model(x, depth=depth))
        assert not torch.allclose(again(x, depth=12), fresh(x, depth=12), atol=1e-2)

    validation = Images(data, 'validation', TRANSFORM)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['depths'] == result['depths']
    assert config['label_names'] == [f'class {i}' for i in range(10)]
    right = dict.fromkeys(again.depths, 0)
    for i in range(40):
        image, label = validation[0, i]
        for depth in again.depths:
            with torch.no_grad():
                right[depth] += int(again.extract(depth)(image[None]).argmax()) == label
    assert {row['depth']: row['top1'] for row in result['depths']} == {d: 100 * n / 40 for d, n in right.items()}


def test_calibration_of_few_images(saved, digits, tmp_path):
    """Catches a batch larger than the data that leaves no batch at all."""
    result = calibrate_model(str(saved[1]), (1, 2, 2), str(digits), tmp_path / 'out', batch_size=512, num_workers=0)
    assert result['images'] == 70


@pytest.mark.parametrize(('args', 'message'), [
    (['--blocks', '4,3,3'], 'blocks of a sub-net must be 3 integers, from 1 up to (3, 3, 3)'),
    (['--blocks', '2,2,2'], 'has depth 14, which names the net'),
    (['--blocks', '2,x'], "must be blocks per stage such as '2,2,2,2', got '2,x'"),
    (['--data', '{t}/none'], 'no data set'),
    (['--data', '{t}/many'], 'the 10 classes of the model'),
    (['--data', '{t}/damaged'], 'in row 1 of split'),
    (['--output', '{m}'], 'a new or an empty folder'),
    (['--images', '1'], 'must be an integer of at least 2'),
])
def test_wrong_input_of_calibrate(args, message, saved, digits, tmp_path, capsys):
    """Catches tracebacks, and a folder that stays behind, also where the error comes after the calibration."""
    many = datasets.ClassLabel(names=[str(i) for i in range(12)])
    for split in ('train', 'validation'):
        write_parquet(tmp_path / 'many' / f'{split}.parquet', [0, 1], target=many)
        damaged = [png(0), DAMAGED] if split == 'validation' else None
        write_parquet(tmp_path / 'damaged' / f'{split}.parquet', [0, 1], files=damaged)
    given = {'--blocks': '1,2,2', '--data': str(digits), '--output': str(tmp_path / 'out')}
    given |= {args[0]: args[1].format(m=saved[1], t=tmp_path)}
    before = {path.name for path in tmp_path.iterdir()} | {'cache'}, files(saved[1])
    line = failing(capsys, 'calibrate', saved[1], '-j', '0', *(word for pair in given.items() for word in pair))
    assert message in line
    assert ({path.name for path in tmp_path.iterdir()} | {'cache'}, files(saved[1])) == before
