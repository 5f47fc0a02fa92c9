"""Confusions of classes and the most confident mistakes: against plain loops, and what their plots show."""
import csv
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_ddnn.data.datasets import ImageData
from timm_ddnn.evaluation import mistakes
from timm_ddnn.evaluation.predict import Predictions


def make_predictions(num_classes, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    target, *classes = torch.randint(num_classes, (3, count), generator=generator)
    classes = torch.stack(classes)
    sure = torch.rand(2, count, generator=generator)
    return Predictions((20, 8), target, classes, sure, sure, classes == target)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    found = []
    monkeypatch.setattr(mistakes, 'save_figure', lambda figure, path: found.append(figure) or figure.savefig(path))
    return found


def test_confusions_are_those_of_plain_loops(tmp_path):
    """Catches rows and columns that are exchanged, depths mixed up, and cells that are lost."""
    predictions = make_predictions(4, 50)
    confusions = mistakes.count_confusions(predictions)
    names = ['a', 'b, "c"', 'ü', 'd']
    mistakes.write_confusions(tmp_path / 'confusion.csv', confusions, names)
    with open(tmp_path / 'confusion.csv', encoding='utf-8', newline='') as file:
        rows = list(csv.reader(file))
    assert rows[0] == ['depth', 'true', 'predicted', 'images']
    written = {tuple(row[:3]): int(row[3]) for row in rows[1:]}
    expected = Counter(
        (str(depth), names[predictions.target[n]], names[predictions.classes[i, n]])
        for i, depth in enumerate((20, 8)) for n in range(50))
    assert written == expected and len(written) < 2 * 16 + 1


def test_of_many_classes_the_most_confused_are_shown():
    """Catches a plot of a thousand classes, classes without the other of their pair, and right images that count."""
    confusions = {20: Counter({(0, 0): 99, (7, 3): 5, (900, 7): 4, (5, 6): 3}), 8: Counter({(5, 6): 3, (1, 2): 2})}
    assert mistakes.most_confused(confusions, 1000, most=2) == [5, 6]
    assert mistakes.most_confused(confusions, 1000, most=4) == [3, 5, 6, 7]
    assert mistakes.most_confused(confusions, 1000, most=5) == [3, 5, 6, 7, 900]
    assert mistakes.most_confused(confusions, 1000) == [1, 2, 3, 5, 6, 7, 900]
    assert mistakes.most_confused(confusions, 20) == [*range(20)]


@pytest.mark.parametrize('num_classes', [3, 30])
def test_plot_of_confusions_shows_counts_and_shares(num_classes, figures, tmp_path):
    """Catches shares of the images shown in the place of all of a class, counts beside their cell, and formulas."""
    predictions = make_predictions(num_classes, 300)
    names = [f'$class_{{{i}' for i in range(num_classes)]
    confusions = mistakes.count_confusions(predictions)
    mistakes.plot_confusions(tmp_path / 'a.png', confusions, names, 'a title with $\\x')
    shown = mistakes.most_confused(confusions, num_classes)
    assert len(shown) == min(num_classes, 20)
    for i, axes in enumerate(figures[0].axes[:2]):
        assert [label.get_text() for label in axes.get_xticklabels()] == [names[k] for k in shown]
        image, = axes.images
        for (x, y), text in {t.get_position(): t.get_text() for t in axes.texts}.items():
            true = predictions.target == shown[y]
            count = int((true & (predictions.classes[i] == shown[x])).sum())
            assert int(text) == count
            if x != y:
                assert image.get_array()[y, x] == pytest.approx(100 * count / int(true.sum()))
        assert sum(int(text.get_text()) for text in axes.texts) == 300 or num_classes > 20
    assert ('the 20 of 30 classes' in figures[0].get_suptitle()) is (num_classes == 30)


def test_most_confident_mistakes_come_first(figures, tmp_path):
    """Catches right images among them, another order, another row than the image's, and a label beside its image."""
    predictions = make_predictions(4, 60)
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    values = np.zeros(60, int)
    values[rows] = np.arange(60)  # the image in a row has the position of its prediction as its colour
    pictures = [Image.new('RGB', (4, 300), (3 * int(value), 0, 0)) for value in values]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    split = datasets.Dataset.from_dict({'image': pictures, 'label': [0] * 60}, features)
    data = ImageData(None, split, 'image', 'label', ['a', 'b', '$c', 'd' * 99], 'val')
    found = mistakes.find_mistakes(predictions, data, rows)
    wrong = [n for n in range(60) if predictions.classes[0, n] != predictions.target[n]]
    wrong = sorted(wrong, key=lambda n: -predictions.confidences[0, n])[:24]
    assert [mistake['row'] for mistake in found] == rows[wrong].tolist() and len(found) == 24
    mistakes.plot_mistakes(tmp_path / 'a.png', found, data, 'title')
    assert len(figures[0].axes) == 24
    for axes, mistake, n in zip(figures[0].axes, found, wrong, strict=True):
        true, predicted = (data.class_names[labels[n]] for labels in (predictions.target, predictions.classes[0]))
        assert (mistake['depth'], mistake['true'], mistake['predicted']) == (20, true, predicted)
        assert mistake['confidence'] == pytest.approx(float(predictions.confidences[0, n]), abs=1e-6)
        lines = axes.get_title('left').split('\n')
        assert lines[0] == f'true: {true if len(true) < 9 else "d" * 23 + "…"}'
        assert lines[1].endswith(f', {100 * mistake["confidence"]:.1f} %')
        assert lines[2] == f'row {mistake["row"]}'
        assert axes.images[0].get_array()[0, 0].tolist() == [3 * n, 0, 0]


def test_a_model_without_mistakes(figures, tmp_path):
    """Catches a division by zero, or an empty grid, where everything is right."""
    target = torch.tensor([0, 1])
    predictions = Predictions((20,), target, target[None], *torch.ones(2, 1, 2), target[None] == target)
    data = ImageData(None, datasets.Dataset.from_dict(
        {'image': [None, None]}, datasets.Features(image=datasets.Image())), 'image', 'label', ['a', 'b'], 'val')
    assert mistakes.find_mistakes(predictions, data, torch.arange(2)) == []
    mistakes.plot_mistakes(tmp_path / 'a.png', [], data, 'title')
    mistakes.plot_confusions(tmp_path / 'b.png', mistakes.count_confusions(predictions), ['a', 'b'], 'title')
    assert len(figures) == 2
