"""A model of another family than ResNets through every tool: training, evaluation, export, publication."""
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import onnx
import pytest
import timm
import torch
from helpers import hub_server
from helpers.killed_run import plant
from helpers.training import assert_same_run, few_digits, fork, history, join
from PIL import Image

import timm_ddnn
from timm_ddnn.deploy.calibrate import calibrate_model
from timm_ddnn.deploy.export import export_model
from timm_ddnn.deploy.formats import open_onnx
from timm_ddnn.models.load import load_model
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.main import main

pytestmark = pytest.mark.usefixtures('surroundings')
hub, client = hub_server.hub, hub_server.client

COMMON = [
    *few_digits(), '--img-size', 32, '-b', 32, '--opt', 'adamw', '--weight-decay', 0.05, '--epochs', 2,
    '--warmup-epochs', 0, '-j', 0, '--drop-path', 0.1]
OPTIONS = {
    'convnext': [
        '--model', 'convnext_atto', '--subnets', '1,2,2,1', '1,1,1,1', '--lr', 0.004,
        '--model-kwargs', 'depths=1,2,3,1', 'dims=8,16,24,32', 'patch_size=2', 'ls_init_value=0.1'],
    'vit': [
        '--model', 'vit_tiny_patch16_224', '--subnets', '8', '4', '--lr', 0.002,
        '--model-kwargs', 'embed_dim=24', 'patch_size=8'],
    'efficientnet': ['--model', 'efficientnet_b0', '--lr', 0.002],
}
FAMILIES = ['convnext', *(pytest.param(name, marks=pytest.mark.slow) for name in ('vit', 'efficientnet'))]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Plots take longer than most of these runs; other tests look at them."""
    for name in ('plot_accuracy', 'plot_curves'):
        monkeypatch.setattr(f'timm_ddnn.train.output.{name}', lambda *args: None)


@pytest.fixture(scope='module', params=FAMILIES)
def trained(request, tmp_path_factory):
    """Name of the family, and the folder of a run of it."""
    folder = tmp_path_factory.mktemp(request.param)
    # in a fork as those that are compared with it: of one thread, by which sums are rounded alike
    log = folder / 'log'
    (status,), output = join(fork(*OPTIONS[request.param], *COMMON, '--output', folder, log=log), log)
    assert status == 0, output
    return request.param, folder


def call(capsys, *args):
    """Run a command; return the JSON that it prints."""
    capsys.readouterr()
    main([*map(str, args), '--json'])
    return json.loads(capsys.readouterr().out)


def test_a_run_is_killed_and_resumes_bit_by_bit(trained, tmp_path):
    name, folder = trained
    losses = [record['train_loss'] for record in history(folder)]
    assert losses[1] < losses[0]
    args = [*OPTIONS[name], *COMMON, '--checkpoint-interval', 3, '--output', 'out', '--resume', 'auto']
    (status,), _ = join(fork(*args, before=partial(plant, 'events', 'save', 0)))
    assert status == -signal.SIGKILL
    for path in Path('out').glob('checkpoints/step-*'):  # whether or not the first was complete when it was killed
        assert path.name == 'step-00000003'
    (status,), output = join(fork(*args))
    assert status == 0, output
    assert_same_run('out', folder)


def test_all_depths_are_measured_and_predicted(trained, capsys):
    folder = trained[1]
    data = few_digits()[1]
    depths = list(load_model(str(folder)).depths)
    result = call(
        capsys, 'evaluate', folder, '--data', data, '--cascade', *depths[::-1], '--workers', 0, '--speed-images', 0)
    assert [row['depth'] for row in result['depths']] == depths
    saved = json.loads((folder / 'config.json').read_text())['depths']
    assert [row['top1'] for row in result['depths']] == [row['top1'] for row in saved]
    assert result['cascade']
    Image.linear_gradient('L').save('gradient.png')
    rows = call(capsys, 'predict', folder, 'gradient.png', '--depth', 'all', '--workers', 0)
    assert [row['depth'] for row in rows] == depths


@pytest.mark.slow
def test_costs_are_profiled(trained, capsys):
    rows = call(capsys, 'profile', trained[1], '--rounds', 1)['depths']
    assert [row['depth'] for row in rows] == list(load_model(str(trained[1])).depths)


def test_a_depth_is_calibrated_where_there_are_statistics(trained, tmp_path):
    name, folder = trained
    blocks = {'convnext': (1, 1, 2, 1), 'vit': (6,), 'efficientnet': (1, 2, 2, 2, 2, 2, 1)}[name]
    if name == 'efficientnet':
        result = calibrate_model(str(folder), blocks, few_digits()[1], tmp_path / 'more', num_workers=0)
        assert load_model(str(tmp_path / 'more')).blocks(result['depth']) == blocks
        return
    with pytest.raises(InputError, match='has no batch-norm statistics'):
        calibrate_model(str(folder), blocks, few_digits()[1], tmp_path / 'more', num_workers=0)
    assert not (tmp_path / 'more').exists()


@pytest.mark.slow
def test_exports(trained, tmp_path):
    name, folder = trained
    model = load_model(str(folder)).eval()
    rows = export_model(str(folder), 'all', 'onnx', tmp_path)
    assert len({row['file'] for row in rows}) == 1 and [row['depth'] for row in rows] == list(model.depths)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert weights < rows[0]['bytes'] < 1.2 * weights + 300_000, 'what depths share stands once'
    x = torch.randn(3, 3, 32, 32)
    compute = open_onnx(rows[0]['file'])
    for depth in model.depths:
        with torch.no_grad():
            torch.testing.assert_close(compute(x, depth), model(x, depth=depth), atol=1e-4, rtol=1e-4)
    one, = export_model(str(folder), model.depths[-1], 'torch-export', tmp_path)
    assert one['depth'] == model.depths[-1]
    int8 = dict(int8=True, data=few_digits()[1], max_loss=100)
    if name == 'efficientnet':
        rows = export_model(str(folder), 'all', 'onnx', tmp_path, **int8)
        integers = [t for t in onnx.load(rows[0]['file']).graph.initializer if len(t.dims) == 4]
        assert {t.data_type for t in integers} == {onnx.TensorProto.INT8}
    else:
        with pytest.raises(InputError, match=r'int8 needs batch norms .*, got .*Normalization'):
            export_model(str(folder), 'all', 'onnx', tmp_path, **int8)


def test_a_depth_is_extracted_and_published(trained, tmp_path, capsys, hub, client):
    """Through the Hub, whole and as a plain net, for which timm alone is enough where it has the argument."""
    name, folder = trained
    model = load_model(str(folder)).eval()
    depth = model.depths[-1]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = {d: model(x, depth=d) for d in model.depths}
    result = call(capsys, 'extract', folder, '--depth', depth, '--output', tmp_path / 'plain')
    assert result['imports'] == (['timm', 'timm_ddnn'] if name == 'efficientnet' else ['timm'])
    dry = call(capsys, 'push', folder, 'tests/net', '--dry-run')
    assert {'config.json', 'model.safetensors', 'README.md'} <= dry['files'].keys()
    timm_ddnn.push_to_hub(folder, 'tests/net')
    timm_ddnn.push_to_hub(folder, 'tests/plain', depth=depth)
    shutil.rmtree(Path('output'), ignore_errors=True)
    again = timm.create_model('hf-hub:tests/net', pretrained=True).eval()
    with torch.no_grad():
        for d, logits in expected.items():
            assert torch.equal(again(x, depth=d), logits)
        for source in 'hf-hub:tests/plain', f'local-dir:{tmp_path / "plain"}':
            assert torch.equal(timm.create_model(source, pretrained=True).eval()(x), expected[depth])
    assert again.trained_depths == again.depths
