"""`timm-ddnn evaluate`: metrics against plain loops, the cascade against the model, files, messages, exit statuses."""
import json
import logging
import math
import shutil
from contextlib import nullcontext

import datasets
import pytest
import timm
import torch
from helpers.fitted_model import save_fitted
from helpers.image_files import write_images
from helpers.models import create, images
from helpers.training import read, run
from PIL import Image

from timm_ddnn.cascade import Cascade
from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.evaluation import plots
from timm_ddnn.evaluation.batches import load_batches
from timm_ddnn.evaluation.evaluate import CascadeOptions, evaluate_model
from timm_ddnn.evaluation.metrics import calibration_bins, class_rows, depth_metrics, split_images, wilson_interval
from timm_ddnn.evaluation.predict import evaluate, predict
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.commands.evaluate import FILES
from timm_ddnn_cli.main import main
from timm_ddnn_cli.tables import format_count

DEPTHS = (14, 8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model of depths 14 and 8 that knows digits, and not all."""
    return save_fitted(tmp_path_factory.mktemp('evaluate') / 'fitted')


@pytest.fixture(scope='module')
def digits(folder):
    """The model, and all images and labels of the validation split."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval().to(memory_format=torch.channels_last)
    batches = list(load_batches(load_image_data('digits'), 'validation', model, 64))
    return model, torch.cat([x for x, _ in batches]), torch.cat([target for _, target in batches])


@pytest.fixture(scope='module')
def logits(digits):
    model, x, _ = digits
    with torch.no_grad():  # in the command's batches: a threshold is the confidence of an image, to the last bit
        return {depth: torch.cat([model(part, depth=depth) for part in x.split(64)]) for depth in model.depths}


def probabilities(z):
    most = max(z)
    total = sum(math.exp(value - most) for value in z)
    return [math.exp(value - most) / total for value in z]


def expected_metrics(logits, full, labels):
    """The metrics of one depth, image by image."""
    hits = top5 = equal = 0
    bins = [[] for _ in range(15)]
    for z, z0, label in zip(logits.tolist(), full.tolist(), labels.tolist(), strict=True):
        best = sorted(range(len(z)), key=lambda c: -z[c])
        hits += best[0] == label
        top5 += label in best[:5]
        equal += best[0] == max(range(len(z0)), key=lambda c: z0[c])
        sureness = max(probabilities(z))
        place = next(m for m in range(15) if sureness <= (m + 1) / 15 or m == 14)
        bins[place].append((sureness, best[0] == label))
    error = sum(abs(sum(hit for _, hit in b) - sum(sure for sure, _ in b)) for b in bins)
    count = len(labels)
    return {'top1': 100 * hits / count, 'top5': 100 * top5 / count, 'ece': 100 * error / count,
            'agreement': 100 * equal / count}


def invoke(capsys, *args):
    """Run the command: its exit status, stdout and stderr."""
    status = 0
    try:
        main(['evaluate', *map(str, args)])
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


# Metrics

def test_metrics_are_those_of_plain_loops(small):
    """Catches a wrong metric, depths mixed up, and images at the edges of batches left out."""
    x, labels = images(small, batch=50), torch.randint(10, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small.fc.weight.mul_(10)
        logits = {depth: small(x, depth=depth) for depth in small.depths}
    batches = zip(x.split(16), labels.split(16), strict=True)
    rows = depth_metrics(predict(small.train(), batches))
    assert not small.training
    assert [row['depth'] for row in rows] == [20, 14, 8]
    assert rows[0]['agreement'] == 100 > rows[2]['agreement']
    for row in rows:
        assert row['top1_interval'] == [*wilson_interval(round(row['top1'] / 2), 50)]
        expected = expected_metrics(logits[row['depth']], logits[20], labels)
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-3)


def test_one_pass_for_all_depths(small):
    """Catches a pass per depth: what depths share must run once."""
    stems = []
    small.conv1.register_forward_hook(lambda *_: stems.append(1))
    predict(small, [(images(small, batch=3), torch.zeros(3, dtype=torch.long))] * 2)
    assert len(stems) == 2


def test_no_point_of_the_calibration_stands_for_a_few_images():
    """Catches points of single images, images that are left out, and accuracies that are not those of their images."""
    for counts in ([0, 1, 5, 0, 15, 3, 40, 0, 19, 1, 0, 0, 2, 0, 1], [3], [0, 30, 0]):
        bins = {'images': counts, 'confidence': [0.5 * bool(n) for n in counts], 'accuracy': [0.25] * len(counts)}
        joined = plots._join_bins(bins)
        assert all(n >= min(20, sum(counts)) for n, _, _ in joined)
        assert [sum(column) for column in zip(*joined, strict=True)] == pytest.approx(
            [sum(counts), sum(counts) / 2, sum(counts) / 4])
    bins = {'images': [19, 1, 20, 5], 'confidence': [1] * 4, 'accuracy': [0] * 4}
    assert [n for n, _, _ in plots._join_bins(bins)] == [20, 25]


def test_top5_of_few_classes():
    """Catches an error where there are fewer than five classes: then the label is always among the best."""
    model = create('ddnn_resnet20', num_classes=3)
    rows = depth_metrics(predict(model, [(images(model, batch=8), torch.zeros(8, dtype=torch.long))]))
    assert [row['top5'] for row in rows] == [100, 100, 100]


def test_confidences_on_edges_fall_into_the_bin_below():
    """Catches a bin of its own for a confidence of 1, which nets that are sure of all reach, and an index beyond."""
    sure = torch.tensor([1.0, 0.95, 1.0, 0.2], dtype=torch.float64)
    bins = calibration_bins(sure, torch.tensor([True, True, False, False]))
    assert bins['images'] == [0, 0, 1] + [0] * 11 + [3]
    assert bins['confidence'][14] == pytest.approx(2.95 / 3)
    assert bins['accuracy'][14] == pytest.approx(2 / 3)
    assert bins['accuracy'][0] is None


@pytest.mark.parametrize(('correct', 'total'), [(0, 10), (7, 10), (10, 10), (1, 1), (9_512, 10_000)])
def test_ends_of_an_interval_are_the_accuracies_that_are_just_possible(correct, total):
    """Catches another rule, and another confidence: the ends p solve |x / n - p| = z sqrt(p (1 - p) / n)."""
    for confidence, z in ((0.95, 1.959964), (0.99, 2.575829)):
        low, high = wilson_interval(correct, total, confidence)
        assert 0 <= low <= 100 * correct / total <= high <= 100 and low < high
        for p in (low / 100, high / 100):
            if 0 < p < 1:
                assert abs(correct / total - p) == pytest.approx(z * math.sqrt(p * (1 - p) / total), abs=1e-5)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 100


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_metrics_of_a_diverged_model_are_refused(value, small):
    """Catches accuracies of a model whose logits are not numbers, also where a softmax would hide it."""
    small.fc.register_forward_hook(
        lambda module, inputs, output: output.index_fill(1, torch.tensor([3]), value) if len(calls) == 3 else None)
    calls = []
    small.fc.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    with pytest.raises(InputError, match='logits at depth 8 that are not finite'):
        predict(small, [(images(small), torch.tensor([0, 1]))])


class Processes:
    """Two processes in one: an accelerator that gathers what another one, whose images are others, gathers too."""

    def __init__(self, others=None):
        self.others, self.gathered = others, []

    def autocast(self):
        return nullcontext()

    def gather_for_metrics(self, tensors):
        self.gathered.append(tensors)
        if self.others is None:
            return tensors
        return [torch.cat(pair) for pair in zip(tensors, self.others[len(self.gathered) - 1], strict=True)]


def test_training_evaluates_the_images_of_all_processes(small):
    """Catches accuracies of one process alone, and tensors that are gathered along depths."""
    x, labels = images(small, batch=24), torch.randint(10, (24,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        small.fc.weight.mul_(10)
    mine, theirs = ([(x[i:i + 4], labels[i:i + 4]) for i in range(start, 24, 8)] for start in (0, 4))
    other = Processes()
    evaluate(other, small, theirs)
    found = evaluate(Processes(other.gathered), small, mine)
    rows = depth_metrics(predict(small, [(x, labels)]))
    assert found == {f'{name}_{row["depth"]}': row[name] for row in rows for name in ('top1', 'top5')}
    assert list(found) == [f'{name}_{depth}' for name in ('top1', 'top5') for depth in small.depths]


def test_classes(small):
    """Catches hits counted for another class, and a division by zero where a class has no image."""
    x, labels = images(small, batch=30), torch.arange(30) % 9
    predictions = predict(small, [(x, labels)])
    names = [f'class {i}' for i in range(10)]
    rows = class_rows(predictions, names)
    assert [row['class'] for row in rows] == names
    assert rows[9] == {'class': 'class 9', 'images': 0, 'top1_20': None, 'top1_14': None, 'top1_8': None}
    for label, row in enumerate(rows[:9]):
        for i, depth in enumerate(small.depths):
            mine = [n for n in range(30) if labels[n] == label]
            hits = sum(int(predictions.classes[i][n]) == label for n in mine)
            assert row['images'] == len(mine)
            assert row[f'top1_{depth}'] == pytest.approx(100 * hits / len(mine), abs=1e-3)


def test_halves_are_always_the_same_and_apart():
    """Catches a threshold that is reported on the images it was chosen on, and halves sorted by class."""
    held_out, reported = split_images(100, 0.3)
    assert len(held_out) == 30
    assert sorted([*held_out.tolist(), *reported.tolist()]) == list(range(100))
    assert torch.equal(split_images(100, 0.3)[0], held_out)
    assert 20 < held_out.double().mean() < 80
    for share in (0.001, 1.0):
        with pytest.raises(ValueError, match='some in both parts of 100, got'):
            split_images(100, share)


# The command

def test_accuracies_are_those_of_the_training_script(folder, tmp_path):
    """Catches other images, another normalization or another precision than that of the training script."""
    run('--evaluate', '--pretrained', '--model', f'local-dir:{folder}', '--output', tmp_path, '-j', '0')
    shown = []
    result = evaluate_model(str(folder), 'digits', progress=lambda loader: shown.append(len(loader)) or loader)
    assert shown == [15]
    keys = ('depth', 'blocks', 'parameters', 'macs', 'top1', 'top5')
    assert [{key: row[key] for key in keys} for row in result['depths']] == read(tmp_path, 'evaluation.json')['depths']
    assert result['images'] == 899
    assert len({row['top1'] for row in result['depths']}) == 2


def test_command(folder, logits, digits, tmp_path, capsys):
    """Catches numbers in the file that are not those of the model, files that others cannot read, and lost lines."""
    output = tmp_path / 'new' / 'folder'
    status, out, err = invoke(
        capsys, folder, '--data', 'digits', '-j', 0, '--per-class', '--json', '--output', output)
    assert status == 0 and 'error' not in err
    result = json.loads(out)
    assert result == read(output, 'evaluation.json')
    assert {path.name for path in output.iterdir()} == {*FILES}
    for name in FILES:
        if name.endswith('.png'):
            with Image.open(output / name) as picture:
                assert picture.format == 'PNG'
                assert len(picture.convert('L').getcolors()) > 10
    for row in result['depths']:
        expected = expected_metrics(logits[row['depth']], logits[14], digits[2])
        assert {name: row[name] for name in expected} == pytest.approx(expected, abs=1e-3)
    assert sum(row['images'] for row in result['per_class']) == result['images'] == 899
    for i, depth in enumerate(DEPTHS):
        total = sum(row['images'] * row[f'top1_{depth}'] for row in result['per_class'])
        assert total / 899 == pytest.approx(result['depths'][i]['top1'], abs=1e-3)
    assert result['cascade'] is None
    assert result['versions']['timm'] == timm.__version__

    status, out, err = invoke(capsys, folder, '--data', 'digits', '-j', 0, '--output', output)
    assert status == 0 and 'error' not in err
    assert '899 images' in out
    for row in result['depths']:
        assert f'{row["top1"]:.2f}' in out and f'{row["ece"]:.2f}' in out
        assert '{:.2f} - {:.2f}'.format(*row['top1_interval']) in out
    assert out.splitlines()[-1] == f'{output}: {" ".join(FILES)}'
    assert 'by class' not in out


@pytest.mark.parametrize('wish', [
    [], ['--budget-macs', '2.2e6'],
    *(pytest.param(wish, marks=pytest.mark.slow) for wish in (['--target-top1', '60'], ['--threshold', '0.5']))])
def test_cascade(folder, logits, digits, capsys, wish):
    """Catches a threshold chosen on the wrong images or by the wrong rule, and a result that is not the cascade's."""
    speed_images = 0 if wish else 50
    status, out, err = invoke(
        capsys, folder, '--data', 'digits', '-j', 0, '--cascade', 8, 14, *wish, '--json',
        '--speed-images', speed_images)
    assert status == 0 and 'error' not in err
    result = json.loads(out)
    cascade = result['cascade']
    model, x, labels = digits
    held_out, reported = split_images(899, 0.5)
    if '--threshold' in wish:
        reported = torch.arange(899)
    first, second = (cost['macs'] for cost in cascade['steps'])
    sure = logits[8].softmax(-1).amax(-1)
    hits = {depth: z.argmax(-1) == labels for depth, z in logits.items()}

    def outcome(part, threshold):
        own = [hits[14][n] if sure[n] <= threshold else hits[8][n] for n in part.tolist()]
        onward = sum(bool(sure[n] <= threshold) for n in part.tolist())
        return 100 * sum(map(int, own)) / len(part), first + second * onward / len(part)

    threshold = cascade['threshold']
    assert (cascade['top1'], cascade['macs']) == pytest.approx(outcome(reported, threshold), abs=1e-3)
    assert cascade['images'] == len(reported)
    assert cascade['top1_interval'] == [*wilson_interval(round(cascade['top1'] * len(reported) / 100), len(reported))]
    for step, depth in zip(cascade['steps'], (8, 14), strict=True):
        assert step['top1_alone'] == pytest.approx(100 * hits[depth][reported].double().mean().item(), abs=1e-3)
        assert step['macs_alone'] == next(row['macs'] for row in result['depths'] if row['depth'] == depth)
    assert sum(step['ends'] for step in cascade['steps']) == pytest.approx(100, abs=1e-3)
    got, steps = Cascade(model, (8, 14), threshold)(x[reported])
    right = (got.argmax(-1) == labels[reported]).double().mean()
    image = 100 / len(reported) + 1e-3  # in other batches, the image that the threshold is of may go the other way
    assert 100 * right.item() == pytest.approx(cascade['top1'], abs=image)
    assert 100 * steps.double().mean().item() == pytest.approx(cascade['steps'][1]['ends'], abs=image)

    points = [outcome(held_out, t) for t in (0.0, *sure[held_out].tolist())]
    if '--threshold' in wish:
        assert threshold == 0.5 and cascade['chosen'] is None
    else:
        chosen = cascade['chosen']
        assert (chosen['top1'], chosen['macs']) == pytest.approx(outcome(held_out, threshold), abs=1e-3)
        if '--budget-macs' in wish:
            assert chosen['top1'] == pytest.approx(max(top1 for top1, macs in points if macs <= 2.2e6), abs=1e-3)
        else:
            least = 60 if wish else 100 * hits[14][held_out].double().mean().item()
            best = min(macs for top1, macs in points if top1 >= least - 1e-9)
            assert chosen['macs'] == pytest.approx(best, abs=1e-3)
    curve = list(zip(*cascade['curve'].values(), strict=True))
    assert len(curve) <= 200
    for t, top1, macs in curve:
        assert (top1, macs) == pytest.approx(outcome(reported, t), abs=1e-3)
    better = [cost['depth'] for cost in cascade['steps']
              if cost['top1_alone'] >= cascade['top1'] and cost['macs_alone'] <= cascade['macs']]
    assert cascade['beaten_by'] in better or (cascade['beaten_by'] is None and not better)
    speed = cascade['speed']
    assert bool(speed) is bool(speed_images)
    for row in (*speed['depths'], speed['cascade']) if speed else ():
        assert speed['images'] == 50 and 0 < row['low'] <= row['median'] <= row['high']


@pytest.mark.slow
def test_cascade_for_people(folder, tmp_path, capsys):
    """Catches a table without the speed or the reuse, or that fails where there is no speed."""
    args = [folder, '--data', 'digits', '-j', 0, '--cascade', '8', '14', '--output', tmp_path]
    _, out, _ = invoke(capsys, *args, '--speed-images', 20)
    cascade = read(tmp_path, 'evaluation.json')['cascade']
    assert f'threshold {cascade["threshold"]:.4f}, 449 images' in out
    assert f'{cascade["speed"]["cascade"]["median"]:.0f}' in out
    step = cascade['steps'][1]
    assert f'depth 14 reuses {format_count(step["reused"])} MACs of depth 8: stem and blocks 1 to 1' in out
    assert 'chosen on 450 other images' in out
    status, out, err = invoke(capsys, *args, '--speed-images', 0)
    assert status == 0 and 'error' not in err and 'rounds' not in out


def test_bfloat16(folder):
    """Catches a precision without effect, and one that the cascade does not take over."""
    exact = evaluate_model(str(folder), 'digits')
    rounded = evaluate_model(str(folder), 'digits', precision='bf16', cascade=CascadeOptions((8, 14), speed_images=20))
    assert rounded['precision'] == 'bf16'
    assert rounded['depths'][0]['ece'] != exact['depths'][0]['ece']
    assert rounded['depths'][0]['top1'] == pytest.approx(exact['depths'][0]['top1'], abs=3)


def test_confidence_is_calibrated_on_other_images(folder, logits, digits, tmp_path, capsys):
    """Catches temperatures of the images that are reported on, errors of others, and a model that lacks them after."""
    model = shutil.copytree(folder, tmp_path / 'model')
    args = [model, '--data', 'digits', '-j', 0, '--cascade', 8, 14, '--budget-macs', 2.2e6, '--speed-images', 0]
    status, out, err = invoke(capsys, *args, '--calibrate-confidence', '--holdout', 0.4, '--output', tmp_path / 'out')
    assert status == 0 and 'error' not in err
    result = read(tmp_path / 'out', 'evaluation.json')
    held_out, reported = split_images(899, 0.4)
    labels, kept = digits[2], {row['depth']: row['temperature'] for row in read(model, 'config.json')['depths']}
    for row in result['depths']:
        z, temperature = logits[row['depth']], row['temperature']
        assert kept[row['depth']] == temperature != 1
        loss = {scale: torch.nn.functional.cross_entropy(z[held_out] / (scale * temperature), labels[held_out])
                for scale in (0.98, 1, 1.02)}
        assert min(loss, key=loss.get) == 1
        for found, scaled in ((row, z / temperature), (row['uncalibrated'], z)):
            expected = expected_metrics(scaled[reported], z[reported], labels[reported])
            assert found['ece'] == pytest.approx(expected['ece'], abs=1e-3)
        assert row['top1'] == pytest.approx(expected['top1'], abs=1e-3)
        assert f'{temperature:.3f}  {row["uncalibrated"]["ece"]:14.2f}' in out
    assert (result['temperature_images'], result['images'], result['cascade']['images']) == (360, 539, 539)
    assert {mistake['row'] for mistake in result['mistakes']} <= set(reported.tolist())
    sure = (logits[8] / kept[8]).softmax(1).amax(1)[held_out]
    threshold = result['cascade']['threshold']
    assert threshold > 0 and (sure - threshold).abs().min() < 1e-5

    again = evaluate_model(str(model), 'digits')
    assert [row['temperature'] for row in again['depths']] == [kept[14], kept[8]]
    assert again['temperature_images'] is None and again['images'] == 899
    status, out, err = invoke(capsys, 'ddnn_resnet20', '--data', 'digits', '--calibrate-confidence')
    assert status == 2 and 'must be a folder with a config.json to store temperatures in' in err


@pytest.mark.parametrize(('args', 'message'), [
    (['--cascade', '8', '50'], 'two or more of the depths (8, 14), the shallowest first, got (8, 50)'),
    (['--cascade', '14', '8'], 'the shallowest first, got (14, 8)'),
    (['--cascade', '8,14'], "argument --cascade: invalid int value: '8,14'"),
    (['--cascade', '8', '14', '--threshold', '1.5'], "must be 'auto' or a number from 0 to 1, got '1.5'"),
    (['--cascade', '8', '14', '--threshold', 'high'], "must be 'auto' or a number from 0 to 1, got 'high'"),
    (['--cascade', '8', '14', '--holdout', '1'], 'some in both parts of 899, got 1.0'),
    (['--threshold', '0.5'], 'are for a cascade, got no --cascade'),
    (['--cascade', '8', '14', '--target-top1', '50', '--budget-macs', '1e6'],
     'argument --budget-macs: not allowed with argument --target-top1'),
    (['--device', 'tpu9'], 'device must be cpu'),
    (['--device', 'meta'], "on this machine, got 'meta'"),
    (['--val-split', 'nowhere'], "--val-split must be one of the splits ['train', 'validation'], got 'nowhere'"),
    (['--data', 'no/such/folder'], "no data set 'no/such/folder'"),
])
def test_wrong_arguments_are_one_line(folder, surroundings, tmp_path, capsys, args, message):
    """Catches tracebacks, statuses other than 2, and folders that an error leaves behind."""
    status, out, err = invoke(capsys, folder, '--data', 'digits', '-j', 0, *args, '--output', tmp_path / 'output')
    assert (status, out) == (2, '')
    assert err.startswith('error: ') and len(err.splitlines()) == 1 and message in err
    assert not (tmp_path / 'output').exists()


@pytest.mark.parametrize(('name', 'message'), [
    ('ddnn_resnet21', 'must be a dynamic-depth model such as ddnn_resnet'),
    ('levit_128', 'nets of several depths are made of'),
    ('nope', 'such as ddnn_resnet50, ddnn_convnext_tiny (`timm-ddnn list`)'),
    ('ddnn_resnet110', 'cannot be created'),
    ('local-dir:nowhere', 'cannot be created'),
])
def test_wrong_models_are_one_line(surroundings, capsys, name, message):
    """Catches tracebacks for models that there are not, and a model without weights that is evaluated all the same."""
    status, out, err = invoke(capsys, name, '--data', 'digits', '-j', 0)
    assert (status, out) == (2, '')
    assert len(err.splitlines()) == 1 and message in err


def test_what_no_threshold_fulfils_ends_with_3(folder, tmp_path, capsys):
    """Catches the status of wrong input for a wish that was right and cannot be fulfilled, and files in spite of it."""
    args = [folder, '--data', 'digits', '-j', 0, '--cascade', '8', '14', '--output', tmp_path / 'output']
    status, out, err = invoke(capsys, *args, '--target-top1', 100)
    assert (status, out) == (3, '')
    assert len(err.splitlines()) == 1 and 'no threshold has a top-1 accuracy of 100.0 %' in err
    assert not (tmp_path / 'output').exists()


def test_other_classes_are_refused_or_said(folder, tmp_path, capsys, caplog):
    """Catches accuracies by the index of classes that are other ones."""
    write_images(tmp_path / 'three/test', range(30), [*'aaaabbbccc'])
    with pytest.raises(ValueError, match='the 10 classes of the model, or some of them by the same names, got 3'):
        evaluate_model(str(folder), str(tmp_path / 'three'))
    other = shutil.copytree(folder, tmp_path / 'other', ignore=shutil.ignore_patterns('checkpoints'))
    config = read(other, 'config.json')
    config['label_names'] = [*'01234567', 'eight', '9']
    (other / 'config.json').write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        evaluate_model(str(folder), 'digits')
        assert not caplog.records
        evaluate_model(str(other), 'digits')
    assert "1 classes are called otherwise in the data than in the model, the first '8' and 'eight'" in caplog.text


@pytest.mark.parametrize('kind', ['folder', 'integers'])
def test_a_split_may_lack_classes(kind, folder, digits, logits, tmp_path, monkeypatch):
    """Catches labels that count the classes of the validation split, where the model has more."""
    labels = digits[2]
    chosen = (labels == 3) | (labels == 7) | (labels == 8)
    rows = load_image_data('digits').validation.select(chosen.nonzero().flatten().tolist())
    if kind == 'folder':
        for i, row in enumerate(rows):
            path = tmp_path / 'set/val' / str(row['label']) / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            row['image'].save(path)
    else:
        (tmp_path / 'set').mkdir()
        rows.cast_column('label', datasets.Value('int64')).to_parquet(tmp_path / 'set/val.parquet')
    expected = 100 * (logits[14].argmax(1) == labels)[chosen].float().mean().item()
    result = evaluate_model(str(folder), str(tmp_path / 'set'))
    assert result['images'] == len(rows) and result['classes'] == 10
    assert result['depths'][0]['top1'] == pytest.approx(expected, abs=1e-3)
    assert [row['class'] for row in result['per_class'] if row['images']] == ['3', '7', '8']
    monkeypatch.chdir(tmp_path)
    run('--evaluate', '--pretrained', '--model', f'local-dir:{folder}', '--dataset', 'set', '--output', 'out', '-j', 0)
    assert read('out', 'evaluation.json')['depths'][0]['top1'] == pytest.approx(expected, abs=1e-3)
    assert read('out', 'evaluation.json')['validation_split'] == 'val'
