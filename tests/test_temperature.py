"""Temperatures: the best one by a search over many, where they are kept, and that every probability is at one."""
import json

import pytest
import torch
from helpers.models import create, images
from timm.data import resolve_input_data_config

import timm_ddnn
from timm_ddnn.cascade import Cascade, confidence
from timm_ddnn.evaluation.predict import collect_logits, predict
from timm_ddnn.evaluation.temperature import fit_temperature
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.load import add_temperatures, create_ddnn, load_model, save_temperatures
from timm_ddnn.utils.errors import InputError

TEMPERATURES = {20: 1.5, 14: 0.5, 8: 3.0}


@pytest.fixture
def model():
    model = create('ddnn_resnet20', num_classes=3, channels=(4, 8, 16))
    model.mark_trained(model.depths)
    with torch.no_grad():
        model.fc.weight.mul_(10)
    return model


@pytest.mark.parametrize('true', [0.3, 1.0, 4.0])
def test_the_temperature_is_that_of_the_least_negative_log_likelihood(true):
    """Catches another optimum than that of a search over all temperatures, and one that is far from the true one."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2000, 5, generator=generator)
    target = logits.softmax(1).multinomial(1, generator=generator)[:, 0]
    found = fit_temperature(true * logits, target)
    loss = {t: float(torch.nn.functional.cross_entropy(true * logits.double() / t, target))
            for t in torch.linspace(0.1, 10, 1000, dtype=torch.float64).tolist()}
    assert found == pytest.approx(min(loss, key=loss.get), abs=0.01)
    assert found == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize(('target', 'top1'), [([0, 1, 2], '100.00'), ([1, 2, 0], '0.00')])
def test_images_that_no_temperature_fits_are_refused(target, top1):
    """Catches a temperature at the end of the range, where all images are right or the labels are of other classes."""
    with pytest.raises(InputError, match=f'some of them mistaken .* got 3 with top-1 {top1} %'):
        fit_temperature(5 * torch.eye(3), torch.tensor(target))


def test_temperatures_are_kept_with_the_weights(model, tmp_path):
    """Catches temperatures that are lost or of other weights, and a config.json in which anything else has changed."""
    rows = [{'depth': 20, 'top1': 90.0}, {'depth': 8, 'top1': 80.0}]
    save_model(model, tmp_path, data_config=resolve_input_data_config(model), class_names='abc', rows=rows)
    assert [load_model(str(tmp_path)).temperature(depth) for depth in model.depths] == [1, 1, 1]
    path = tmp_path / 'config.json'
    before = path.read_bytes()
    save_temperatures(path, TEMPERATURES, before)
    loaded = load_model(str(tmp_path))
    assert {depth: loaded.temperature(depth) for depth in loaded.depths} == TEMPERATURES
    assert loaded.temperature(None) == 1.5
    config = json.loads(path.read_bytes())
    assert config['depths'] == [{**row, 'temperature': TEMPERATURES[row['depth']]} for row in rows] + [
        {'depth': 14, 'temperature': 0.5}]
    assert {**config, 'depths': rows} == json.loads(before)
    with pytest.raises(InputError, match=r'depth must be one of \(20, 14, 8\)'):
        loaded.temperature(50)

    for other in (
        create_ddnn(str(tmp_path)),
        create_ddnn(str(tmp_path), pretrained=True, num_classes=2),
        create_ddnn(str(tmp_path), checkpoint_path=f'{tmp_path}/model.safetensors', pretrained=True),
    ):
        assert other.temperature(20) == 1


def test_temperatures_are_not_given_to_other_weights(model, tmp_path):
    """Catches temperatures in the configuration of a model that was saved while another one was measured."""
    path = tmp_path / 'config.json'
    save_model(model, tmp_path, data_config=resolve_input_data_config(model), class_names='abc', rows=[])
    before = path.read_bytes()
    with torch.no_grad():
        model.fc.bias.add_(1)
    save_model(model, tmp_path, data_config=resolve_input_data_config(model), class_names='abc', rows=[])
    after = path.read_bytes()
    with pytest.raises(InputError, match='another model was saved in'):
        save_temperatures(path, TEMPERATURES, before)
    for wrong in (0, float('nan'), 1e9):
        with pytest.raises(InputError, match=r'temperature in .* must be a number from 0\.01 to 100'):
            save_temperatures(path, {20: wrong}, after)
    assert path.read_bytes() == after


def test_every_probability_is_at_the_temperature_of_its_depth(model):
    """Catches confidences of another temperature, classes that a temperature changes, and depths mixed up."""
    model.saved_results = add_temperatures([], TEMPERATURES)
    x, target = images(model, batch=12), torch.zeros(12, dtype=torch.long)
    with torch.no_grad():
        logits = {depth: model(x, depth=depth) for depth in model.depths}
    scaled = {depth: z / TEMPERATURES[depth] for depth, z in logits.items()}

    predictions = predict(model, [(x[:7], target[:7]), (x[7:], target[7:])])
    for i, depth in enumerate(model.depths):
        torch.testing.assert_close(predictions.confidences[i], confidence(scaled[depth]))
        torch.testing.assert_close(predictions.uncalibrated[i], confidence(logits[depth]))
        assert torch.equal(predictions.classes[i], logits[depth].argmax(1))
    collected, labels = collect_logits(model, [(x[:7], target[:7]), (x[7:], target[7:])])
    torch.testing.assert_close(collected, torch.stack([*logits.values()]))
    assert torch.equal(labels, target)

    threshold = float(confidence(scaled[8]).median())
    got, steps = Cascade(model, (8, 20), threshold)(x)
    assert torch.equal(steps.bool(), confidence(scaled[8]) <= threshold) and len(steps.unique()) == 2
    torch.testing.assert_close(got, torch.where(steps.bool()[:, None], scaled[20], scaled[8]))


def test_predict_gives_calibrated_probabilities(model, tmp_path):
    """Catches raw probabilities for images at a depth, and another scale for those of a cascade."""
    from PIL import Image
    image = Image.effect_noise((40, 40), 100).convert('RGB')
    raw = {row.depth: row for row in timm_ddnn.predict(model, image, depth='all')}
    model.saved_results = add_temperatures([], TEMPERATURES)
    rows = timm_ddnn.predict(model, image, depth='all')
    for row in (*rows, *timm_ddnn.predict(model, image, cascade=(8, 20), threshold=1)):
        expected = torch.tensor(raw[row.depth].probabilities).log().div(TEMPERATURES[row.depth]).softmax(0)
        assert row.classes == raw[row.depth].classes
        assert row.probabilities == pytest.approx(expected.tolist(), abs=1e-5)
