"""Finding data sets, and images and batches that are a function of seed, epoch and index."""
import random
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from helpers.image_files import CLASS_NAMES, DAMAGED, DIGITS, digit, png, write_images, write_parquet
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import to_tensor

from timm_ddnn.data.datasets import load_image_data, match_classes
from timm_ddnn.data.images import ImageReadError, Images, convert_image, create_train_transform, seeded
from timm_ddnn.data.loader import EpochSampler, create_loader, loading, normalize
from timm_ddnn.train.build import choose_augmentation
from timm_ddnn.utils.errors import InputError

CONFIG = dict(input_size=(3, 32, 32), interpolation='bicubic', mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), crop_pct=1.0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def pairs(data, split='validation'):
    """Grey values and class name of every image."""
    return [
        (np.asarray(row[data.input_key]).tolist(), data.class_names[row[data.target_key]])
        for row in getattr(data, split)
    ]


def expected(indices):
    return [(np.asarray(digit(i)).tolist(), str(DIGITS.target[i])) for i in indices]


def test_digits_are_split_without_overlap(tmp_path, monkeypatch, caplog):
    """Catches a split that leaks, that forgets a class, or labels in another order than the images; a hidden folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits').mkdir()
    data = load_image_data('digits')
    assert "'digits' names a folder and digits of scikit-learn, which are loaded" in caplog.text
    train, validation = pairs(data, 'train'), pairs(data, 'validation')
    assert (len(train), len(validation)) == (898, 899)
    assert sorted(train + validation) == sorted(expected(range(1797)))
    assert min(np.unique([name for _, name in validation], return_counts=True)[1]) >= 34


@pytest.mark.parametrize('files', [
    ('train.parquet', 'validation.parquet'),
    ('train-00000-of-00002.parquet', 'train-00001-of-00002.parquet', 'test-00000-of-00001.parquet'),
    ('data/train-00000-of-00001.parquet', 'data/valid-00000-of-00001-0123abcd.PARQUET', 'data/extra.parquet'),
])
def test_parquet_files(tmp_path, files):
    """Catches shards left out or out of order, and splits or columns named as on the Hub that are not found."""
    for i, file in enumerate(files):
        write_parquet(tmp_path / 'set' / file, range(20 * i, 20 * i + 20), image='img', label='fine_label')
    data = load_image_data(str(tmp_path / 'set'))
    count = sum('train' in file for file in files)
    assert pairs(data, 'train') == expected(range(20 * count))
    assert pairs(data, 'validation') == expected(range(20 * count, 20 * count + 20))
    assert (data.input_key, data.target_key, data.class_names) == ('img', 'fine_label', CLASS_NAMES)


def test_image_folder_with_a_class_called_train(tmp_path):
    """Catches validation images in the training split: 'train' in a path is also a class, of CIFAR-100 for instance."""
    names = ['train', 'test', *CLASS_NAMES[2:]]
    write_images(tmp_path / 'set [1]' / 'train', range(0, 40), names)
    write_images(tmp_path / 'set [1]' / 'val', range(40, 60), names)
    data = load_image_data(str(tmp_path / 'set [1]'))
    assert data.class_names == sorted(names)
    assert sorted(pairs(data, 'train')) == sorted((x, names[int(y)]) for x, y in expected(range(0, 40)))
    assert sorted(pairs(data, 'validation')) == sorted((x, names[int(y)]) for x, y in expected(range(40, 60)))


def test_evaluation_needs_no_training_split(tmp_path):
    """Catches --evaluate on a folder with a validation split alone being refused."""
    write_parquet(tmp_path / 'set' / 'test.parquet', range(10))
    data = load_image_data(str(tmp_path / 'set'), training=False)
    assert data.train is None
    assert pairs(data) == expected(range(10))


def test_splits_whose_names_begin_alike(tmp_path):
    """Catches files of another split that are taken for shards of this one, and hide that one is missing."""
    for i, file in enumerate(['train-00000-of-00001', 'trainval-00000-of-00001', 'test-00000-of-00001']):
        write_parquet(tmp_path / f'set/{file}.parquet', range(20 * i, 20 * i + 20))
    data = load_image_data(str(tmp_path / 'set'))
    assert (pairs(data, 'train'), pairs(data)) == (expected(range(20)), expected(range(40, 60)))
    for file in ('test-00000-of-00002', 'test_mini-00000-of-00002'):
        write_parquet(tmp_path / f'half/{file}.parquet', range(20))
    with pytest.raises(ValueError, match=r"'test' in .* must have the 2 files .* got 1"):
        load_image_data(str(tmp_path / 'half'), training=False)


def trained_on(class_names, count=None):
    """What says of a model which classes it was trained on."""
    return SimpleNamespace(num_classes=count or len(class_names), pretrained_cfg={'label_names': class_names})


@pytest.mark.parametrize('class_names', [[*'9876543210'], ['none', *CLASS_NAMES]])
def test_labels_get_the_indices_of_a_model(class_names):
    """Catches labels that keep the order of the data where the model has another."""
    data = load_image_data('digits')
    aligned = match_classes(data, trained_on(class_names), same_names=True)
    assert aligned.class_names == class_names
    for split in ('train', 'validation'):
        assert pairs(aligned, split) == pairs(data, split)
        assert getattr(aligned, split).features['label'].names == class_names


def test_other_classes_are_matched_by_index_or_refused(caplog):
    """Catches other classes that pass without a word, and a model of as many classes without names that is refused."""
    data, others = load_image_data('digits'), [f'class {i}' for i in range(10)]
    for model in (trained_on(CLASS_NAMES), trained_on(None, 10), trained_on(others[:7], 10)):
        assert match_classes(data, model, same_names=True) is data
    assert not caplog.text
    assert match_classes(data, trained_on(others)) is data
    assert "10 classes are called otherwise in the data than in the model, the first '0' and 'class 0'" in caplog.text
    with pytest.raises(InputError, match="the first '0' and 'class 0'"):
        match_classes(data, trained_on(others), same_names=True)
    with pytest.raises(InputError, match="the first '0' and '9'"):  # two classes of one name are not told by it
        match_classes(data, trained_on([*CLASS_NAMES[::-1], '9']), more=True, same_names=True)
    for count in (9, 11):
        with pytest.raises(InputError, match=f'must have the {count} classes of the model.* got 10'):
            match_classes(data, trained_on(None, count))
    assert match_classes(data, trained_on(None, 11), more=True) is data
    with pytest.raises(InputError, match='must have the 9 classes'):
        match_classes(data, trained_on(None, 9), more=True)


def test_columns_without_types_are_found_by_name(tmp_path):
    """Catches a refusal of files that other programs wrote: bytes and integers without the metadata of `datasets`."""
    for split in ('train', 'validation'):
        write_parquet(tmp_path / 'set' / f'{split}.parquet', range(30), target=datasets.Value('int64'))
    data = load_image_data(str(tmp_path / 'set'))
    assert pairs(data) == expected(range(30))
    plain = datasets.Dataset.from_dict({'image': [png(i) for i in range(30)], 'label': DIGITS.target[:30].tolist()})
    for split in ('train', 'validation'):
        plain.to_parquet(tmp_path / 'plain' / f'{split}.parquet')
    assert pairs(load_image_data(str(tmp_path / 'plain'))) == expected(range(30))


def test_folders_are_classes(tmp_path):
    """Catches a message about columns where there is one class or a folder too many, and a class nobody trains."""
    write_images(tmp_path / 'train', [0, 10])  # twice a zero
    write_images(tmp_path / 'val', [0, 10, 20])
    assert load_image_data(str(tmp_path), training=False).class_names == ['0']
    with pytest.raises(ValueError, match=r"must name at least 2 classes, got \['0'\]"):
        load_image_data(str(tmp_path))
    write_images(tmp_path / 'val', [1])
    assert load_image_data(str(tmp_path), training=False).class_names == ['0', '1']
    with pytest.raises(InputError, match=r"images to train on: 1 of 2 classes have no image in split 'train', .* '1'"):
        load_image_data(str(tmp_path))
    write_images(tmp_path / 'train', [1])
    write_images(tmp_path / 'other' / '0', [1])  # a folder beside the splits is nobody's business
    assert load_image_data(str(tmp_path)).class_names == ['0', '1']
    write_images(tmp_path / 'train' / '0', [1])
    with pytest.raises(ValueError, match=r'must lie in SPLIT/CLASS/ or CLASS/, got .*train/0/1/1\.png'):
        load_image_data(str(tmp_path))


@pytest.mark.parametrize('write, options, message', [
    (dict(labels=[0, 1, 10, 2]), {}, r"0\.\.9 for 10 classes, got 10 in row 2 of split 'train'"),
    (dict(labels=[0, -1, 3, 2]), {}, r"got -1 in row 1 of split 'train'"),
    (dict(labels=[0, 1, None, 2]), {}, r"integers 0\.\.C-1, got nothing in row 2 in split 'train'"),
    (dict(labels=list('abcd'), target=datasets.Value('string')), {}, r'integers 0\.\.C-1, got string'),
    (dict(labels=[1, 2, 3, 4], target=datasets.Value('int64')), {}, r'0\.\.3 for 4 classes, got 4 in row 3'),
    (dict(labels=[0] * 4, target=datasets.Value('int64')), {}, 'at least 2 classes'),
    (dict(image='picture', label='kind'), {'input_key': 'foo'}, r"--input-key .*\['picture', 'kind'\], got 'foo'"),
    (dict(label='a', target=datasets.Value('int64')), {}, r"--target-key must name one of .*\['image', 'a'\]"),
    ({}, {'target_key': 'image'}, 'integers 0..C-1, got struct'),
    ({}, {'input_key': 'label'}, "'label' holds no images"),
    ({}, {'val_split': 'foo'}, r"--val-split must be one of the splits \['train', 'validation'\], got 'foo'"),
])
def test_wrong_data_is_named(tmp_path, write, options, message):
    """Catches labels, columns and splits that are wrong and pass, or are refused without saying what is right."""
    for split in ('train', 'validation'):
        write_parquet(tmp_path / 'set' / f'{split}.parquet', range(4), **write)
    with pytest.raises(ValueError, match=message):
        load_image_data(str(tmp_path / 'set'), **options)


@pytest.mark.parametrize('files, error, message', [
    ([], FileNotFoundError, 'a folder must hold SPLIT/CLASS/IMAGE or .*, or CLASS/IMAGE with --val-fraction'),
    (['train.parquet'], ValueError, r"--val-split must name one of the splits \['train'\]"),
    (['train-00000-of-00003.parquet', 'train-00002-of-00003.parquet', 'test.parquet'], ValueError, 'the 3 .* got 2'),
    (['train-00000-of-00001.parquet', 'train.parquet', 'test.parquet'], ValueError, 'the 1 .* got 2'),
])
def test_incomplete_folders_are_named(tmp_path, files, error, message):
    """Catches a training on part of a data set of which a shard was not copied."""
    (tmp_path / 'set').mkdir()
    for file in files:
        write_parquet(tmp_path / 'set' / file, range(10))
    with pytest.raises(error, match=message):
        load_image_data(str(tmp_path / 'set'))


def test_files_that_name_classes_otherwise_are_refused(tmp_path):
    """Catches labels of one file that are read by the names of another."""
    write_parquet(tmp_path / 'train.parquet', range(20))
    write_parquet(tmp_path / 'test.parquet', range(20), target=datasets.ClassLabel(names=CLASS_NAMES[::-1]))
    with pytest.raises(ValueError, match=r'same names of classes .* got others in .*test\.parquet than in .*train'):
        load_image_data(str(tmp_path))


def test_two_label_columns_are_not_guessed_between(tmp_path):
    """Catches a training on coarse classes because they came first."""
    features = datasets.Features(image=datasets.Image(), a=datasets.ClassLabel(2), b=datasets.ClassLabel(2))
    rows = {'image': [digit(i) for i in range(4)], 'a': [0, 1, 0, 1], 'b': [1, 1, 0, 0]}
    for split in ('train', 'validation'):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / 'set' / f'{split}.parquet')
    with pytest.raises(ValueError, match=r"--target-key must name one of the columns \['image', 'a', 'b'\]"):
        load_image_data(str(tmp_path / 'set'))
    assert load_image_data(str(tmp_path / 'set'), target_key='b').target_key == 'b'


@pytest.fixture(scope='module')
def augmented():
    """Digits with augmentation that draws from the generators of Python, NumPy and PyTorch."""
    transform = create_train_transform(
        CONFIG, crop_mode='pad', hflip=0.5, color_jitter=0.3, auto_augment='rand-m9-mstd0.5', re_prob=0.5)
    return Images(load_image_data('digits'), 'train', transform, seed=3)


def test_an_item_is_a_function_of_seed_epoch_and_index(augmented):
    """Catches augmentation that depends on what was drawn before, or that is the same in every epoch."""
    first, label = augmented[1, 5]
    torch.rand(3), np.random.rand(3), random.random()
    again, _ = augmented[1, 5]
    assert torch.equal(first, again)
    assert label == augmented.data[5]['label']
    assert not torch.equal(first, augmented[2, 5][0])
    other = Images(load_image_data('digits'), 'train', augmented.transform, seed=4)
    assert not torch.equal(first, other[1, 5][0])
    unseeded = Images(load_image_data('digits'), 'train', augmented.transform, seed=None)
    assert not torch.equal(unseeded[1, 5][0], unseeded[1, 5][0])


def test_global_generators_are_left_alone(augmented):
    """Catches reading an image that changes the random numbers of a program that uses it."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    plain = random.random(), np.random.rand(), float(torch.rand(()))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    augmented[0, 0]
    with pytest.raises(KeyError), seeded(1, 2):
        raise KeyError
    assert plain == (random.random(), np.random.rand(), float(torch.rand(())))


def test_batches_do_not_depend_on_workers(augmented):
    """Catches augmentation or order that changes with the number of workers, or that workers repeat in each epoch."""
    epochs, state = {}, torch.get_rng_state()
    for workers in (0, 2):
        loader = create_loader(augmented, 100, training=True, num_workers=workers)
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == 8  # the last one, not full, is left out
            epochs[workers, epoch] = torch.cat([images for images, _ in batches])
    assert torch.equal(epochs[0, 0], epochs[2, 0])
    assert torch.equal(epochs[0, 1], epochs[2, 1])
    assert not torch.equal(epochs[0, 0], epochs[0, 1])
    assert torch.equal(state, torch.get_rng_state())  # a model's dropout would depend on the workers otherwise


def test_sampler_gives_each_image_once():
    """Catches an order that repeats or drops images, is the same in two epochs, or ignores the seed."""
    sampler = EpochSampler(50, shuffle=True, seed=7)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == [(epoch, i) for i in range(50)]
        orders.append([i for _, i in sampler])
    other = [i for _, i in EpochSampler(50, shuffle=True, seed=8)]
    assert len({tuple(order) for order in (*orders, other, range(50))}) == 4
    assert list(EpochSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGBA', 'P', '1', 'RGB'])
def test_every_kind_of_image_is_converted(tmp_path, mode):
    """Catches grey, transparent or palette images that break a batch of RGB images."""
    for split in ('train', 'validation'):
        write_parquet(tmp_path / 'set' / f'{split}.parquet', [0, 1], files=[png(0, mode), png(1, mode)])
    data = load_image_data(str(tmp_path / 'set'))
    rgb, _ = Images(data, 'validation', to_tensor)[0, 0]
    grey, _ = Images(data, 'validation', to_tensor, in_chans=1)[0, 0]
    assert (rgb.shape, grey.shape) == ((3, 8, 8), (1, 8, 8))
    torch.testing.assert_close(rgb, grey.expand(3, -1, -1))
    assert mode == '1' or torch.equal(grey[0], to_tensor(digit(0))[0])


def test_in_chans_of_no_image_mode_is_refused():
    """Catches images of three channels given to a model of five."""
    with pytest.raises(ValueError, match='1 or 3, got 5'):
        Images(load_image_data('digits'), 'train', to_tensor, in_chans=5)


def test_splits_are_those_asked_for(tmp_path):
    """Catches accuracies of another split, and `test` taken for validation where there is a validation split."""
    sizes = {'train': 11, 'extra': 12, 'validation': 13, 'test': 14}
    for split, size in sizes.items():
        write_parquet(tmp_path / f'{split}.parquet', list(range(size)))
    for options, expected in (
        ({}, ('train', 'validation')), ({'val_split': 'test'}, ('train', 'test')),
        ({'train_split': 'extra'}, ('extra', 'validation')),
    ):
        data = load_image_data(str(tmp_path), **options)
        assert (len(data.train), len(data.validation)) == tuple(sizes[split] for split in expected)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path, workers):
    """Catches a damaged file that ends a training without saying which, in a worker process above all."""
    write_images(tmp_path / 'set' / 'train', range(12))
    write_images(tmp_path / 'set' / 'val', range(12))
    (tmp_path / 'set' / 'train' / '3' / '3.png').write_bytes(DAMAGED)
    loader = create_loader(Images(load_image_data(str(tmp_path / 'set')), 'train', to_tensor), 4, training=True,
                           num_workers=workers)
    message = r"row \d+ of split 'train' \(.*/train/3/3.png\) cannot be read"
    with pytest.raises(ImageReadError, match=message), loading():
        list(loader)


@pytest.mark.parametrize('mode', ['I;16', 'I', 'F'])
def test_pixels_of_more_than_8_bits_are_refused(mode):
    """Catches medical or satellite images that PIL makes white without a word."""
    with pytest.raises(ValueError, match=f'must be of 8 bits, got mode .{mode}'):
        convert_image(Image.new(mode, (8, 8)), 'RGB')
    assert convert_image(Image.new('1', (8, 8), 1), 'L').getpixel((0, 0)) == 255


def test_pad_crop_shifts_by_at_most_an_eighth():
    """Catches a crop that scales the image, never moves it, or moves it further than its padding."""
    transform = create_train_transform(CONFIG, crop_mode='pad', hflip=0.0, color_jitter=None)
    white = Image.new('RGB', (32, 32), 'white')
    shifts = set()
    for i in range(300):
        with seeded(0, i):
            image = transform(white)
        inside = (image == 255).all(dim=0)
        rows, columns = inside.any(dim=1), inside.any(dim=0)
        assert torch.equal(inside, rows[:, None] & columns[None, :])
        shifts |= {32 - int(rows.sum()), 32 - int(columns.sum())}
    assert shifts == {0, 1, 2, 3, 4}


def test_train_transform_is_timms_above_64_px():
    """Catches the small-image crop on photographs."""
    options = dict.fromkeys(('train_crop_mode', 'scale', 'ratio', 'hflip', 'color_jitter', 'aa'))
    args = SimpleNamespace(**options, reprob=0.0, dataset='digits')
    assert choose_augmentation(args, CONFIG)['crop_mode'] == 'pad'
    config = dict(CONFIG, input_size=(3, 96, 96))
    chosen = choose_augmentation(args, config)
    image = Image.effect_noise((120, 100), 60).convert('RGB')
    ours, timms = (
        make(config) for make in (
            lambda c: create_train_transform(c, **dict(chosen, hflip=0.5)),
            lambda c: create_transform(
                c['input_size'], is_training=True, color_jitter=None, interpolation=c['interpolation'],
                normalize=False),
        )
    )
    with seeded(1):
        x = ours(image)
    with seeded(1):
        y = timms(image)
    assert torch.equal(x, y)


@pytest.mark.parametrize('in_chans', [1, 3])
def test_images_that_were_normalized_by_the_device_are_timms(in_chans):
    """Catches another normalization than the one by which timm's models are run, and erasing that leaves a trace."""
    config = CONFIG | dict(input_size=(in_chans, 32, 32), mean=CONFIG['mean'][:in_chans], std=CONFIG['std'][:in_chans])
    data = load_image_data('digits')
    augmentation = dict(hflip=0.5, re_prob=0.7, color_jitter=None)
    for split, options in ('train', augmentation), ('validation', {}):
        if options:
            make = partial(create_train_transform, crop_mode='pad')
            timms = create_transform(**config, is_training=True, **options)
            timms.transforms[0] = make(config, **options).transforms[0]
        else:
            make, timms = (lambda c: create_transform(**c, normalize=False)), create_transform(**config)
        loaders = [
            create_loader(Images(data, split, transform, in_chans=in_chans, seed=5), 50, training=False)
            for transform in (make(config, **options), timms)
        ]
        images, target = next(normalize(loaders[0], config, 'cpu'))
        expected, labels = next(iter(loaders[1]))
        assert next(iter(loaders[0]))[0].dtype == torch.uint8
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
        assert torch.equal(target, labels)
        erased = (images == 0).all(dim=1).flatten(1).any(dim=1)
        assert (0 < int(erased.sum()) < 50) == bool(options)


@pytest.mark.slow
def test_processes_of_the_host_program_end_as_they_would(tmp_path):
    """Catches an exit that kills daemons which are no workers of a loader, before they have cleaned up."""
    (tmp_path / 'host.py').write_text(textwrap.dedent("""
        import multiprocessing, pathlib, signal, sys, time
        import timm_ddnn.data.images

        def work():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path('cleaned').touch()))
            pathlib.Path('ready').touch()
            time.sleep(60)

        if __name__ == '__main__':
            multiprocessing.Process(target=work, daemon=True).start()
            while not pathlib.Path('ready').exists():
                time.sleep(0.01)
    """))
    subprocess.run([sys.executable, 'host.py'], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / 'cleaned').exists()
