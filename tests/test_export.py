"""`timm-ddnn export`: its files are read by programs that do not know this library."""
import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers.image_files import DAMAGED, png, write_parquet
from helpers.models import create
from helpers.saved_model import CONFIG, TRANSFORM, arrays, child, failing, files, photograph, save
from PIL import Image

from timm_ddnn.deploy import export as exporting
from timm_ddnn.deploy import formats
from timm_ddnn.deploy.export import export_model
from timm_ddnn.models.load import load_model
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.main import main


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A model of three depths that differ, as it was saved and as it lies in a folder."""
    folder = tmp_path_factory.mktemp('saved') / 'model'
    return save(folder, channels=(4, 8, 16)), folder


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

for depth in {depths}:
    switch = {{'depth': np.array(depth)}} if {one_file} else {{}}
    y = [session.run(None, {{'images': x[i:j], **switch}})[0] for i, j in ((0, 1), (1, 6))]
    np.save(f'y{{depth}}.npy', np.concatenate(y))
np.save('image.npy', image)
print(json.dumps([meta, [(put.name, put.shape) for put in (*session.get_inputs(), *session.get_outputs())]]))
"""
TORCH = """
import torch
x, found = torch.from_numpy(x), []
for file in {files}:
    extra = {{'metadata.json': ''}}
    if file.endswith('.pt2'):
        net = torch.export.load(file, extra_files=extra).module()
    else:
        net = torch.jit.load(file, _extra_files=extra)
    with torch.no_grad():
        np.save(file + '.npy', torch.cat([net(x[:1]), net(x[1:])]).numpy())
    found.append(json.loads(extra['metadata.json']))
print(json.dumps(found))
"""


def wrap_writer(monkeypatch, format, wrap):
    """Let a format write another net than it is given: wrap(file, net)."""
    kind = formats.FORMATS[format]

    def write(file, nets, *args):
        kind.write(file, {depth: wrap(file, net).eval() for depth, net in nets.items()}, *args)
    monkeypatch.setitem(formats.FORMATS, format, kind._replace(write=write))


TEXT = ('input', 'output', 'interpolation', 'crop_mode', 'model', 'library')


def check_description(about, depths):
    assert {key: about[key] for key in CONFIG} == json.loads(json.dumps(CONFIG))
    assert about['model'] == 'ddnn_resnet20'
    for depth, row in zip(depths, about.get('depths', [about]), strict=True):
        assert (row['depth'], row['blocks'], row['macs'] > 0) == (depth, [(depth - 2) // 6] * 3, True)
        assert (row['top1'], row['top5']) == (depth + 0.5, depth + 1.5)
    assert about['label_names'] == [f'class {i}' for i in range(10)]
    assert about['dynamic_batch'] is True
    assert 'before the softmax' in about['output']
    assert f'torch {torch.__version__}' in about['library']


@pytest.mark.parametrize('depth', ['all', 8])
def test_onnx_is_read_without_torch(depth, tmp_path, capsys):
    """Catches logits of another depth or after a softmax, a batch that is not free, and preprocessing wrongly stated.

    A process with onnxruntime alone prepares a photograph by the metadata. Of all depths there is one file, which runs
    the deepest net that is not deeper than asked, or the shallowest.
    """
    model = save(tmp_path / 'model', layers=(2, 2, 2), subnets=((1, 1, 1),), channels=(4, 8, 16))
    args = ['--depth', str(depth), '--format', 'onnx', '--dynamic-batch', '--json']
    main(['export', str(tmp_path / 'model'), *args, '--output', str(tmp_path / 'out')])
    rows = json.loads(capsys.readouterr().out)
    file = str(tmp_path / 'out' / ('ddnn_resnet20.onnx' if depth == 'all' else 'ddnn_resnet20-8.onnx'))
    depths, run_by = ((14, 8), {99: 14, 14: 14, 13: 8, 8: 8, 1: 8}) if depth == 'all' else ((8,), {8: 8})
    assert [(row['file'], row['depth']) for row in rows] == [(file, d) for d in depths]
    assert files(tmp_path / 'out').keys() == {Path(file)}
    onnx.checker.check_model(file, full_check=True)
    photograph().save(tmp_path / 'photograph.png')
    code = ONNX.format(file=file, depths=[*run_by], one_file=depth == 'all')
    meta, puts = child(tmp_path, code, 'torch', 'timm', 'timm_ddnn')
    switch = [['depth', []]] * (depth == 'all')
    assert puts == [['images', ['batch', 3, 24, 24]], *switch, ['logits', ['batch', 10]]]
    check_description({k: v if k in TEXT else json.loads(v) for k, v in meta.items()}, depths)
    assert np.abs(np.load(tmp_path / 'image.npy') - TRANSFORM(photograph()).numpy()).max() < 1e-6
    for row in rows:
        assert (row['images'], row['batch_sizes'], row['top1_agreement']) == (4, [1, 4], 100)
        assert row['bytes'] == Path(file).stat().st_size
        assert 0 < row['max_difference'] < row['allowed'] < 1e-2
    logits = {}
    for asked, ran in run_by.items():
        logits[ran], expected = arrays(tmp_path, model, ran, f'y{asked}.npy')
        assert np.abs(logits[ran] - expected).max() < 1e-4
    assert depth == 8 or np.abs(logits[14] - logits[8]).max() > 0.05


@pytest.mark.slow
def test_formats_of_torch_are_read_without_timm(saved, tmp_path, caplog):
    """Catches files that need this library or timm, and a batch that is not free."""
    model, folder = saved
    rows = []
    for format in ('torch-export', 'torchscript'):
        rows += export_model(str(folder), 14, format, tmp_path, dynamic_batch=format == 'torch-export')
        assert ('deprecated' in caplog.text) is (format == 'torchscript')
    paths = [row['file'] for row in rows]
    for row, about in zip(rows, child(tmp_path, TORCH.format(files=paths), 'timm', 'timm_ddnn'), strict=True):
        check_description(about, (14,))
        mine, expected = arrays(tmp_path, model, 14, f'{row["file"]}.npy')
        assert np.abs(mine - expected).max() < row['allowed'] < 1e-2


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
    ('onnx', 'depth'), ('torch-export', 'nan'), ('torchscript', 'nan'), ('torchscript', 'softmax'),
])
def test_file_that_computes_something_else_is_removed(format, fault, saved, tmp_path, monkeypatch):
    """Catches a comparison that compares nothing, one that NaN passes, and a wrong file that stays."""
    def wrap(file, net):
        if not file.stem.endswith('-8'):
            return net
        other = saved[0].extract(14) if fault == 'depth' else net
        if fault == 'nan':
            other.fc.bias.data[3] = torch.nan
        return torch.nn.Sequential(other, torch.nn.Softmax(-1)) if fault == 'softmax' else other

    wrap_writer(monkeypatch, format, wrap)
    (tmp_path / f'ddnn_resnet20-8{formats.FORMATS[format].suffix}').write_bytes(b'of an earlier run')
    before = files(tmp_path)
    model, images = load_model(str(saved[1])), exporting.load_images(load_model(str(saved[1])))
    with pytest.raises(exporting.ExportMismatchError, match=r'ddnn_resnet20-8.* differs from depth 8') as error:
        depth = 8 if format == 'onnx' else (20, 8)
        exporting.export(model, depth, tmp_path, format=format, images=images, overwrite=True)
    assert ('nan' in str(error.value)) is (fault == 'nan')
    assert files(tmp_path) == before


def test_a_file_that_is_wrong_ends_with_status_1(saved, tmp_path, capsys, monkeypatch):
    """Catches the status of wrong input for a fault of the export."""
    wrap_writer(monkeypatch, 'torchscript', lambda file, net: torch.nn.Sequential(net, torch.nn.Softmax(-1)))
    args = ['export', saved[1], '--depth', 8, '--format', 'torchscript', '--output', tmp_path]
    assert 'differs from depth 8' in failing(capsys, *args, status=1)
    assert not files(tmp_path)


def test_files_are_replaced_only_when_that_is_wanted(saved, tmp_path, capsys):
    """Catches an earlier export that is lost without a word, and one that cannot be replaced."""
    model, images = saved[0], exporting.load_images(saved[0])
    args = dict(format='torchscript', images=images)
    exporting.export(model, 8, tmp_path, **args)
    before = files(tmp_path)
    cli = ['export', saved[1], '--depth', 'all', '--format', 'torchscript', '--output', tmp_path]
    assert 'files must be new' in failing(capsys, *cli)
    assert files(tmp_path) == before
    main([*map(str, cli), '--overwrite'])
    assert files(tmp_path)[tmp_path / 'ddnn_resnet20-8.pt'] != before[tmp_path / 'ddnn_resnet20-8.pt']
    assert f'{tmp_path}: ddnn_resnet20-20.pt ddnn_resnet20-14.pt ddnn_resnet20-8.pt\n' in capsys.readouterr().out


def test_an_untrained_net_has_no_published_accuracy(tmp_path):
    """Catches results of the weights that come with the library in a file with other weights."""
    model = create('ddnn_resnet20', num_classes=7)
    about = exporting.describe_net(model, 8)
    assert about['num_classes'] == 7 and not about.keys() & {'top1', 'top5', 'label_names'}
    rows = [{'depth': 20, 'top1': 1.0}, {'depth': 8, 'top1': 2.0, 'top5': 3.0}]
    assert exporting.describe_net(model, 8, rows).items() >= {'top1': 2.0, 'top5': 3.0}.items()


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

    wrap_writer(monkeypatch, 'torchscript', lambda file, net: Mixing(net))
    wrap_writer(monkeypatch, 'torch-export', lambda file, net: Mixing(net))
    images = exporting.load_images(saved[0])
    with pytest.raises(exporting.ExportMismatchError, match='differs from depth 8'):
        exporting.export(saved[0], 8, tmp_path, format='torchscript', images=images)
    assert not files(tmp_path)
    # of one image, which it is right for
    assert exporting.export(saved[0], 8, tmp_path, format='torch-export', images=images)


@pytest.mark.parametrize('shape', [(0, 3, 32, 32), (2, 3, 24, 24), (2, 1, 32, 32)])
def test_images_of_another_size_are_refused(shape, saved, tmp_path):
    """Catches a file of another size than its metadata says."""
    with pytest.raises(InputError, match=r'images must be \[N, 3, 32, 32\], got \['):
        exporting.export(saved[0], 8, tmp_path, format='torchscript', images=torch.zeros(shape))


@pytest.fixture
def digits(tmp_path, surroundings):
    """A data set of 40 digits to validate with."""
    write_parquet(tmp_path / 'data' / 'validation.parquet', list(range(70, 110)))
    return tmp_path / 'data'


def test_images_are_of_the_data_set(saved, digits):
    """Catches images of another split or preparation, and all of them from its beginning."""
    model = load_model(str(saved[1]))
    images = exporting.load_images(model, str(digits), num=4)
    expected = [TRANSFORM(Image.open(io.BytesIO(png(70 + row))).convert('RGB')) for row in (0, 13, 26, 39)]
    torch.testing.assert_close(images, torch.stack(expected))
    assert len(exporting.load_images(model, str(digits), num=100)) == 40


def test_grey_photographs():
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
    (['{m}', '--depth', '14', '--format', 'onnx', '--data', '{t}/empty'], 'holds no data set'),
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
    monkeypatch.setattr(formats, 'find_spec', lambda name: None if name == 'onnxruntime' else name)
    line = failing(capsys, 'export', saved[1], '--depth', 8, '--format', 'onnx', '--output', tmp_path)
    assert "onnxruntime: pip install 'timm-ddnn[export]'" in line
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    line = failing(capsys, 'export', saved[1], '--depth', 8, '--format', 'torchscript', '--output', tmp_path)
    assert 'data must be given' in line
    assert not files(tmp_path)
