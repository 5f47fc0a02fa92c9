"""Images that are decoded once: the same as those decoded one by one, augmented as a function of seed and epoch."""
import shutil
import weakref

import pytest
import torch
from helpers.training import FAST, assert_same_run, few_digits, read, run
from timm.data import create_transform

import timm_ddnn.data.cached
from timm_ddnn.data.cached import MemoryImages
from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.data.images import Images
from timm_ddnn.data.loader import create_loader, normalize

CONFIG = dict(input_size=(3, 16, 24), interpolation='bicubic', mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1), crop_pct=0.9)


@pytest.fixture(scope='module')
def data():
    return load_image_data('digits')


def one_epoch(images, epoch=0, config=CONFIG, **kwargs):
    loader = create_loader(images, 100, training=False, **kwargs)
    loader.sampler.set_epoch(epoch)
    batches = list(normalize(loader, config, 'cpu'))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_validation_images_are_those_decoded_one_by_one(data):
    """Catches another resize or mixed-up labels."""
    images, labels = one_epoch(MemoryImages(data, 'validation', CONFIG, num_workers=2))
    expected, targets = one_epoch(Images(data, 'validation', create_transform(**CONFIG, normalize=False)))
    assert images.shape == (899, 3, 16, 24)
    assert torch.equal(images, expected)
    assert torch.equal(labels, targets)


def test_decoded_batches_are_not_kept(data, monkeypatch):
    """Catches batches that are all held until the last: twice the memory, and those of workers are open files."""
    batches, alive = [], []

    def load(*args, **kwargs):
        for batch in create_loader(*args, **kwargs):
            batches.append(weakref.ref(batch[0]))
            alive.append(sum(ref() is not None for ref in batches))
            yield batch

    monkeypatch.setattr(timm_ddnn.data.cached, 'create_loader', load)
    memory = MemoryImages(data, 'train', CONFIG)
    assert memory.images.shape == (898, 3, 16, 24) and memory.images.dtype == torch.uint8
    assert len(batches) == 4 and max(alive) <= 2


def test_grey_images(data):
    """Catches images of three channels, or of another one, for a model of one."""
    config = CONFIG | dict(input_size=(1, 16, 24), mean=(0.4,), std=(0.2,))
    images, _ = one_epoch(MemoryImages(data, 'validation', config), config=config)
    one_by_one = Images(data, 'validation', create_transform(**config, normalize=False), in_chans=1)
    expected, _ = one_epoch(one_by_one, config=config)
    assert images.shape == (899, 1, 16, 24)
    assert torch.equal(images, expected)


def test_training_images_are_padded_crops_and_flips(data):
    """Catches crops beyond the padding or of one place only, flips of all or none, and images mixed in a batch."""
    memory = MemoryImages(data, 'train', CONFIG, hflip=0.5, seed=3)
    mean, std = (torch.tensor(CONFIG[key])[:, None, None] for key in ('mean', 'std'))
    images = (one_epoch(memory)[0] * std + mean) * 255
    seen = set()
    for number in range(200):
        original = torch.nn.functional.pad(memory.images[number].float(), (3, 3, 2, 2))
        found = {
            (y, x, flip)
            for flip in (False, True) for y in range(5) for x in range(7)
            if torch.allclose(images[number].flip(-1) if flip else images[number],
                              original[:, y:y + 16, x:x + 24], atol=1e-3)
        }
        assert found
        seen |= found
    assert {y for y, _, _ in seen} == set(range(5))
    assert {x for _, x, _ in seen} == set(range(7))
    assert {flip for _, _, flip in seen} == {False, True}


@pytest.mark.parametrize('hflip', [0, 0.1, 1])
def test_images_are_flipped_as_often_as_asked_for(data, hflip):
    """Catches a probability that is another one."""
    memory = MemoryImages(data, 'train', CONFIG, hflip=hflip, seed=3)
    memory.padding = [0, 0]
    flipped = one_epoch(memory)[0]
    memory.hflip, memory._epoch = 0, None
    same = (one_epoch(memory)[0] == flipped).flatten(1).all(1)
    assert abs(1 - same.float().mean() - hflip) < 0.03


def test_an_image_is_augmented_alike_in_any_batch(data):
    """Catches randomness that goes by the place in the batch."""
    memory = MemoryImages(data, 'train', CONFIG, hflip=0.5, seed=3)
    images, _ = memory.__getitems__([(0, index) for index in range(20)])
    others, _ = memory.__getitems__([(0, index) for index in reversed(range(5, 15))])
    assert torch.equal(others.flip(0), images[5:15])


def test_augmentation_is_a_function_of_seed_and_epoch(data):
    """Catches randomness that depends on workers, batches or what was drawn before."""
    memory = MemoryImages(data, 'train', CONFIG, hflip=0.5, seed=3)
    first = one_epoch(memory, epoch=1)[0]
    assert not torch.equal(one_epoch(memory, epoch=2)[0], first)
    assert torch.equal(one_epoch(memory, epoch=1, num_workers=2)[0], first)
    other = MemoryImages(data, 'train', CONFIG, hflip=0.5, seed=4)
    assert not torch.equal(one_epoch(other, epoch=1)[0], first)


def test_batches_are_made_where_the_images_are(data):
    """Catches batches that are made on the CPU, of other images on a GPU, or by workers, which cannot use it."""
    device = 'cuda' if torch.cuda.is_available() else 'meta'
    kwargs = dict(hflip=0.5, seed=3)
    loader = create_loader(
        MemoryImages(data, 'train', CONFIG, **kwargs, device=device), 100, training=True, num_workers=2)
    images, labels = next(iter(loader))
    assert images.shape == (100, 3, 16, 24)
    assert images.device.type == labels.device.type == device
    if device == 'cuda':
        expected, targets = next(iter(create_loader(MemoryImages(data, 'train', CONFIG, **kwargs), 100, training=True)))
        torch.testing.assert_close(images.cpu(), expected)  # a GPU divides by multiplying with the inverse
        assert torch.equal(labels.cpu(), targets)


def test_training_in_memory_resumes_exactly(tmp_path):
    """Catches an augmentation that a resumed run repeats otherwise, and an option without effect."""
    args = [*FAST, *few_digits(), '-b', 16, '--in-memory', '--epochs', '2', '--checkpoint-interval', '5']
    run(*args, '--output', tmp_path / 'whole')
    shutil.copytree(tmp_path / 'whole', tmp_path / 'parts')
    last = max((tmp_path / 'parts' / 'checkpoints').iterdir())
    shutil.rmtree(last)
    run(*args, '--output', tmp_path / 'parts', '--resume', 'auto')
    assert_same_run(tmp_path / 'parts', tmp_path / 'whole')
    assert read(tmp_path / 'whole')['arguments']['in_memory'] is True
