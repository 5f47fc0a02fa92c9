"""`timm-ddnn calibrate`: the new depth is added, and nothing else changes."""
import json
import shutil

import datasets
import pytest
import timm
import torch
from helpers.image_files import DAMAGED, png, write_parquet
from helpers.models import create
from helpers.saved_model import TRANSFORM, failing, files, save

from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.data.images import Images
from timm_ddnn.deploy import calibrate
from timm_ddnn.deploy.calibrate import calibrate_model
from timm_ddnn.models.load import load_model, save_temperatures
from timm_ddnn_cli.main import main


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


def test_calibrated_depth_is_added_and_no_other_changes(saved, digits, tmp_path, capsys, monkeypatch):
    """Catches another depth that changes, statistics of augmented or validation images, and wrong accuracies."""
    model, folder = saved
    batches, original = [], calibrate.calibrate_bn

    def record(model, loader, depth):
        loaded = list(loader)
        batches.extend(images for images, _ in loaded)
        return original(model, loaded, depth=depth)

    monkeypatch.setattr(calibrate, 'calibrate_bn', record)
    args = ['--blocks', '1,2,2', '--data', str(digits), '--output', str(tmp_path / 'out'), '-j', '0']
    main(['calibrate', str(folder), *args, '--images', '50', '-b', '20', '--json'])
    result = json.loads(capsys.readouterr().out)
    assert (result['depth'], result['images'], result['validation_images']) == (12, 40, 40)
    data = load_image_data(str(digits))
    train = Images(data, 'train', TRANSFORM)
    known = torch.stack([train[0, i][0] for i in range(70)])
    nearest = [(known - image).abs().amax((1, 2, 3)).min(0) for batch in batches for image in batch]
    assert max(difference for difference, _ in nearest) < 1e-5
    assert len(batches) == 2 and len({int(index) for _, index in nearest}) == 40

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


@pytest.mark.parametrize(('top1', 'warned'), [({8: 50.0, 12: 50.0}, True), ({8: 50.0, 12: 50.1}, False)])
def test_a_depth_that_is_not_worth_its_cost_is_named(top1, warned, saved, digits, tmp_path, monkeypatch, caplog):
    """Catches a depth that costs more than one which is as accurate, and nobody says so."""
    top1 = {20: 90.0, 14: 90.0} | top1
    rows = [{'depth': depth, 'top1': top1[depth], 'top5': 100.0} for depth in (20, 14, 12, 8)]
    monkeypatch.setattr(calibrate, 'depth_metrics', lambda predictions: rows)
    calibrate_model(str(saved[1]), (1, 2, 2), str(digits), tmp_path / 'out', num_workers=0)
    assert ('depth 12 is no more accurate than depths [8]' in caplog.text) is warned


def test_temperatures_of_the_other_depths_stay(saved, digits, tmp_path):
    """Catches temperatures that are lost with a depth that is added, or that the new depth takes over."""
    model = shutil.copytree(saved[1], tmp_path / 'model')
    path = model / 'config.json'
    save_temperatures(path, {20: 1.5, 8: 2.0}, path.read_bytes())
    calibrate_model(str(model), (1, 2, 2), str(digits), tmp_path / 'out', num_workers=0)
    loaded = load_model(str(tmp_path / 'out'))
    assert {depth: loaded.temperature(depth) for depth in loaded.depths} == {20: 1.5, 14: 1.0, 12: 1.0, 8: 2.0}


def test_calibration_of_few_images(saved, digits, tmp_path):
    """Catches a batch larger than the data that leaves no batch at all, and a pass that shows no progress."""
    shown = []
    result = calibrate_model(
        str(saved[1]), (1, 2, 2), str(digits), tmp_path / 'out', batch_size=512, num_workers=0,
        progress=lambda loader: shown.append(len(loader)) or loader)
    assert result['images'] == 70 and shown == [1, 1]


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
