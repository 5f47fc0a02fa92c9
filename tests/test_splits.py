"""Images without splits, classes of few images, and images in both splits. Each test says which fault it catches."""
import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.image_files import DIGITS, png, write_images, write_parquet
from helpers.training import FAST, assert_same_run, read, run, top1
from torch import nn

from timm_ddnn import EKDLoss
from timm_ddnn.data.content import count_duplicates, fingerprint
from timm_ddnn.data.datasets import count_classes, load_image_data
from timm_ddnn.evaluation.evaluate import evaluate_model
from timm_ddnn.utils.errors import InputError

pytestmark = pytest.mark.usefixtures('surroundings')


def files(split):
    return [Path(row['image']['path']).name for row in split.cast_column('image', datasets.Image(decode=False))]


def test_images_without_splits(tmp_path):
    """Catches images that are trained and validated on, or neither, classes that are not, and other images in the next
    call.
    """
    write_images(tmp_path / 'set', range(200))
    Path(tmp_path / 'set' / '.DS_Store').touch()
    data = load_image_data(str(tmp_path / 'set'), val_fraction=0.1)
    train, validation = files(data.train), files(data.validation)
    assert sorted(train + validation) == sorted(f'{i}.png' for i in range(200))
    counts = Counter(DIGITS.target[:200].tolist())
    held_out = Counter(DIGITS.target[int(file[:-4])] for file in validation)
    assert held_out == {label: round(0.1 * count) for label, count in counts.items()}
    assert count_classes(data, 12).tolist() == [*(counts[label] - held_out[label] for label in range(10)), 0, 0]
    again = load_image_data(str(tmp_path / 'set'), val_fraction=0.1, training=False)
    assert again.train is None and files(again.validation) == validation
    other = load_image_data(str(tmp_path / 'set'), val_fraction=0.2)
    assert set(validation) < set(files(other.validation))
    assert fingerprint(other) != fingerprint(data)


def test_few_images_of_a_class(tmp_path):
    """Catches a class that loses its only image, and one of two that is never validated."""
    write_images(tmp_path / 'set', [0, 10, 1, 2, 12, 22])  # digits 0, 0, 1, 2, 2, 2
    data = load_image_data(str(tmp_path / 'set'), val_fraction=0.1)
    assert Counter(data.train['label']) == {0: 1, 1: 1, 2: 2}
    assert Counter(data.validation['label']) == {0: 1, 2: 1}
    for image in (10, 12, 22):
        (tmp_path / 'set' / str(image % 10) / f'{image}.png').unlink()
    with pytest.raises(InputError, match=r'--val-fraction 0\.1 needs a class of at least 2 images'):
        load_image_data(str(tmp_path / 'set'), val_fraction=0.1)


@pytest.mark.parametrize('write', [write_images, lambda folder, rows: write_parquet(folder / 'train.parquet', rows)])
def test_a_split_is_asked_for(tmp_path, write):
    """Catches images to train on that are validated on because nobody said which, and a message that does not help."""
    write(tmp_path / 'set', range(30))
    with pytest.raises(InputError, match=r"--val-split .* splits \['train'\], .*CLASS/IMAGE with --val-fraction"):
        load_image_data(str(tmp_path / 'set'))
    assert len(load_image_data(str(tmp_path / 'set'), val_split='train', training=False).validation) == 30
    assert len(load_image_data(str(tmp_path / 'set'), val_fraction=0.3).validation) == 10


def test_folders_that_are_too_deep_are_explained(tmp_path):
    """Catches a message about splits to somebody who has none."""
    write_images(tmp_path / 'set' / 'photos', range(30))
    with pytest.raises(InputError, match=r"splits \['photos'\], none is called train: a folder must hold SPLIT/CLASS"):
        load_image_data(str(tmp_path / 'set'), val_fraction=0.1)


def test_equal_files_in_both_splits_are_counted(tmp_path, monkeypatch):
    """Catches an image that is trained and validated on and not found, one that is and is not, and a costly search."""
    write_images(tmp_path / 'set' / 'train', range(40))
    write_images(tmp_path / 'set' / 'val', range(40, 80))
    assert count_duplicates(load_image_data(str(tmp_path / 'set'))) == 0
    shutil.copy(tmp_path / 'set/train/3/3.png', tmp_path / 'set/val/4/elsewhere.png')
    for name in ('one', 'two'):
        (tmp_path / 'set' / 'val' / '5' / name).write_bytes(png(15))
    data = load_image_data(str(tmp_path / 'set'))
    assert count_duplicates(data) == 3
    monkeypatch.setattr('timm_ddnn.data.content.MOST_HASHED_BYTES', 100)
    assert count_duplicates(data) is None
    for split, rows in (('train', range(20)), ('validation', range(15, 30))):
        write_parquet(tmp_path / f'rows/{split}.parquet', rows)
    monkeypatch.undo()
    assert count_duplicates(load_image_data(str(tmp_path / 'rows'))) == 5


def test_a_run_on_images_without_splits(monkeypatch):
    """Catches weights of classes that do not reach the loss or change at a resume, an evaluation of other images, and
    what is not recorded.
    """
    criteria = []

    def init(loss, *args, original=EKDLoss.__init__, **kwargs):
        original(loss, *args, **kwargs)
        criteria.append(loss.criterion)

    monkeypatch.setattr(EKDLoss, '__init__', init)
    write_images(Path('set'), [i for i in range(300) if DIGITS.target[i] != 3 or i < 60])
    options = [*FAST, '--dataset', 'set', '--val-fraction', 0.2, '--class-weights', '--smoothing', 0.1, '-b', 16,
               '--epochs', 2, '--checkpoint-interval', 5, '--checkpoint-hist', 9]
    run(*options, '--output', 'expected')
    counts = count_classes(load_image_data('set', val_fraction=0.2), 10)
    assert isinstance(criteria[0], nn.CrossEntropyLoss) and criteria[0].label_smoothing == 0.1
    weight = criteria[0].weight.numpy()
    np.testing.assert_allclose(weight * counts, np.full(10, counts.sum() / 10), rtol=1e-6)
    assert weight[3] > 3 * weight[4]
    logits, target = torch.randn(4, 10), torch.tensor([3, 3, 4, 5])
    assert criteria[0](logits, target) != nn.CrossEntropyLoss(label_smoothing=0.1)(logits, target)
    shutil.copytree('expected/checkpoints/step-00000010', 'out/checkpoints/step-00000010')
    run(*options, '--output', 'out', '--resume', 'auto')
    assert_same_run('out', 'expected')
    summary = read('out')
    assert summary['arguments']['val_fraction'] == 0.2 and summary['validation_split'] == '0.2 of train'
    assert summary['duplicates'] == 0
    result = evaluate_model('out', 'set', num_workers=0, val_fraction=0.2)
    assert result['split'] == '0.2 of train'
    assert {row['depth']: row['top1'] for row in result['depths']} == top1(summary)
    with pytest.raises(SystemExit, match='2'):
        run(*options, '--val-fraction', 0.1, '--output', 'out', '--resume', 'auto')
