"""Folders of images: nothing vanishes, nothing appears and nothing changes its meaning in silence."""
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
import timm
from helpers.image_files import CLASS_NAMES, DIGITS, digit, png, write_images, write_parquet
from helpers.training import FAST, MODEL, error_lines, read, run
from timm.data import create_dataset

from timm_ddnn.data.content import fingerprint
from timm_ddnn.data.datasets import load_image_data, match_classes
from timm_ddnn.utils.errors import InputError

pytestmark = pytest.mark.usefixtures('surroundings')


@pytest.fixture
def folder(tmp_path):
    """Images of all digits, in train and val."""
    write_images(tmp_path / 'set' / 'train', range(40))
    write_images(tmp_path / 'set' / 'val', range(40, 80))
    return tmp_path / 'set'


def labels(data, split='train'):
    """Class name by file name."""
    rows = getattr(data, split).cast_column('image', datasets.Image(decode=False))
    return {Path(row['image']['path']).name: data.class_names[row['label']] for row in rows}


# The order of classes

NUMBERED = ['11', '0', '2', '10', '1', 'b', 'A', 'c 10', 'c 9', '01']


def write_numbered(folder):
    """Images of ten classes whose order by text is not the natural one; the file is called as its class."""
    for split in ('train', 'val'):
        for index, name in enumerate(NUMBERED):
            path = folder / split / name / f'{name}.png'
            path.parent.mkdir(parents=True)
            path.write_bytes(png(index))


def test_classes_are_in_the_order_of_timm(tmp_path):
    """Catches labels of 10 for what is 2 to a model that timm's scripts trained on the same folders."""
    write_numbered(tmp_path / 'set')
    shutil.rmtree(tmp_path / 'set/train/01')  # timm's order of 1 and 01 is that of chance
    shutil.rmtree(tmp_path / 'set/val/01')
    reader = create_dataset('', root=str(tmp_path / 'set/train')).reader
    data = load_image_data(str(tmp_path / 'set'))
    assert data.class_names == sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    assert data.class_names == ['0', '1', '2', '10', '11', 'A', 'b', 'c 9', 'c 10']
    expected = {Path(path).name: data.class_names[index] for path, index in reader.samples}
    assert labels(data) == labels(data, 'validation') == expected == {f'{n}.png': n for n in NUMBERED if n != '01'}


def test_names_that_were_saved_with_weights_win(tmp_path):
    """Catches weights of an old run, in another order, that are trained or evaluated with the labels of this one."""
    write_numbered(tmp_path / 'set')
    options = [*FAST, '--dataset', 'set', '-b', 5, '--epochs', 1, '--lr', 0, '--sched', 'constant']
    run(*options, '--output', 'old')
    config = read('old', 'config.json')
    assert config['label_names'] == ['0', '01', '1', '2', '10', '11', 'A', 'b', 'c 9', 'c 10']
    by_text = sorted(NUMBERED)
    Path('old/config.json').write_text(json.dumps(config | {'label_names': by_text}))
    named = ['--model', 'old', '--pretrained'], ['--initial-checkpoint', 'old/model.safetensors'], ['--teacher', 'old']
    for number, given in enumerate(named):
        model = [] if '--model' in given else MODEL
        run('--dataset', 'set', '-b', 5, '-j', 0, '--epochs', 1, *model, *given, '--output', f'out{number}')
        assert read(f'out{number}', 'config.json')['label_names'] == by_text, given
    data = match_classes(load_image_data('set'), timm.create_model('local-dir:old', pretrained=True))
    assert data.class_names == by_text and labels(data) == {f'{name}.png': name for name in NUMBERED}


# What vanishes, and what appears

def test_nothing_vanishes(folder, tmp_path):
    """Catches classes and images that are passed over: links, extensions in capitals, of new formats or none at all."""
    shutil.move(folder / 'train/3', tmp_path / 'elsewhere')
    (folder / 'train/3').symlink_to(tmp_path / 'elsewhere')
    image = next((folder / 'train/4').iterdir())
    shutil.move(image, tmp_path / 'image.png')
    image.symlink_to(tmp_path / 'image.png')
    for name in ('.net', '__background__'):
        for split in ('train', 'val'):
            (folder / split / name).mkdir()
            for file in ('no extension', 'x.PNG', 'y.jfif.part'):
                (folder / split / name / file).write_bytes(png(0))
            digit(1).convert('RGB').save(folder / split / name / 'new.avif')
    data = load_image_data(str(folder))
    assert data.class_names == [*CLASS_NAMES, '.net', '__background__']
    assert len(data.train) == 40 + 8
    assert {'no extension', 'x.PNG', 'y.jfif.part', 'new.avif'} < labels(data).keys()
    assert data.train[len(data.train) - 1]['image'].size == (8, 8)
    assert labels(data)[image.name] == '4'


def test_what_systems_leave_behind_is_passed_over(folder):
    """Catches a refusal of folders that a file manager or a notebook has been in."""
    before = fingerprint(load_image_data(str(folder)))
    for name in (
        '.ipynb_checkpoints/3-checkpoint.png', '@eaDir/x', '3/.ipynb_checkpoints/x.png', '3/@eaDir/x.png',
        'System Volume Information/x', '.Trash-1000/x.png',
    ):
        (folder / 'train' / name).parent.mkdir(exist_ok=True)
        (folder / 'train' / name).write_bytes(png(0))
    for name in ('.DS_Store', 'train/.DS_Store', 'train/Thumbs.db', 'train/3/Desktop.ini', 'train/3/._0.png'):
        (folder / name).write_bytes(b'nothing')
    assert fingerprint(load_image_data(str(folder))) == before


def spoil(folder, case):
    train = folder / 'train'
    if case == 'image in the split':
        (train / 'x.png').write_bytes(png(0))
    elif case == 'zip':
        shutil.make_archive(str(train / '3' / 'more'), 'zip', train / '4')
    elif case == 'folder in a class':
        (train / '3' / 'sub').mkdir()
        (train / '3' / 'sub' / 'x.png').write_bytes(png(0))
    elif case == 'link to nothing':
        (train / '3' / 'x.png').symlink_to('nowhere')
    elif case == 'links to nothing':
        for name in ('b.heic', 'a.heic'):
            (train / '3' / name).write_bytes(b'\0\0\0\x18ftypheic')
    elif case == 'class without images':
        (train / 'empty').mkdir()
    elif case == 'link of a class to nothing':
        (train / 'gone').symlink_to('nowhere')
    elif case == 'not UTF-8':
        (train / '3' / os.fsdecode(b'caf\xe9.png')).write_bytes(png(0))
    elif case == 'data set not UTF-8':
        folder.rename(folder.with_name(os.fsdecode(b'caf\xe9')))
        folder.symlink_to(os.fsdecode(b'caf\xe9'))
        return folder.resolve()
    elif case == 'folder and file':
        write_parquet(folder / 'train.parquet', range(10))
    return folder


@pytest.mark.parametrize('case, message', [
    ('image in the split', r'images must lie in SPLIT/CLASS/ or CLASS/, got .*train/x\.png'),
    ('zip', r"1 files in .*train/3 are not images that can be read here, the first is 'more\.zip'"),
    ('folder in a class', r'images must lie in SPLIT/CLASS/ or CLASS/, got .*train/3/sub/x\.png'),
    ('link to nothing', r"1 files in .*train/3 are not images .*, the first is 'x\.png'"),
    ('links to nothing', r"2 files in .*train/3 are not images .*, the first is 'a\.heic'"),
    ('class without images', "1 folders of classes have no image in any split, the first is 'empty'"),
    ('link of a class to nothing', 'images must lie in SPLIT/CLASS/ or CLASS/, got .*train/gone'),
    ('not UTF-8', r"file names must be UTF-8, got b'.*train/3/caf\\xe9\.png'"),
    ('data set not UTF-8', r"file names must be UTF-8, got b'.*/caf\\xe9'"),
    ('folder and file', "split 'train' in .* must be parquet files or a folder, got both"),
])
def test_what_cannot_be_read_is_named(case, message, folder, capfd):
    """Catches images and classes that disappear, and classes that appear, with status 0."""
    folder = spoil(folder, case)
    with pytest.raises(InputError, match=message):
        load_image_data(str(folder))
    with pytest.raises(SystemExit) as exit_info:
        run(*FAST, '--dataset', folder, '--output', 'out')
    assert exit_info.value.code == 2
    assert len(error_lines(capfd)) == 1


# Resume on other data

def move(file, target):
    target.parent.mkdir(exist_ok=True)
    file.rename(target)


CHANGES = {
    'added': lambda train: (train / '3' / 'new.png').write_bytes(png(3)),
    'removed': lambda train: (train / '3' / '3.png').unlink(),
    'changed': lambda train: (train / '3' / '3.png').write_bytes(png(13)),
    'moved': lambda train: move(train / '3' / '3.png', train / '4' / '3.png'),
    'renamed': lambda train: move(train / '3' / '3.png', train / '3' / 'other.png'),
    'class renamed': lambda train: [(split / '3').rename(split / 'three') for split in train.parent.iterdir()],
    'validation': lambda train: (train.parent / 'val' / '3' / 'new.png').write_bytes(png(3)),
}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder of images, and a run on it that was left at its first epoch."""
    place = tmp_path_factory.mktemp('saved')
    write_images(place / 'set' / 'train', range(40))
    write_images(place / 'set' / 'val', range(40, 80))
    options = [*FAST, '-b', 8, '--epochs', 2, '--checkpoint-interval', 3, '--checkpoint-hist', 9]
    run(*options, '--dataset', place / 'set', '--output', place / 'run')
    for name in ('step-00000005', 'step-00000006', 'step-00000009', 'step-00000010'):
        shutil.rmtree(place / 'run' / 'checkpoints' / name, ignore_errors=True)
    return place, options


@pytest.mark.parametrize('change', CHANGES)
def test_a_run_does_not_resume_on_other_data(change, saved, tmp_path, capfd):
    """Catches a resume that ends with status 0 and other weights, or with a traceback."""
    place, options = saved
    original = place / 'set'
    shutil.copytree(original, place / 'other')
    try:
        CHANGES[change](original / 'train')
        with pytest.raises(SystemExit) as exit_info:
            run(*options, '--dataset', original, '--output', place / 'run', '--resume', 'auto')
    finally:
        shutil.rmtree(original)
        shutil.move(place / 'other', original)
    assert exit_info.value.code == 2
    line, = error_lines(capfd)
    assert line.startswith("error: --resume needs the arguments of the run that was saved: data was {'sha256': ")


def test_a_position_beyond_the_data(saved, capfd):
    """Catches a run that resumes in an epoch that is over."""
    place, options = saved
    shutil.copytree(place / 'set', 'few')
    for folder in Path('few/train').iterdir():
        for file in sorted(folder.iterdir())[2:]:
            file.unlink()
    shutil.copytree(place / 'run', 'run')
    with pytest.raises(SystemExit) as exit_info:
        run(*options, '--dataset', 'few', '--output', 'run', '--resume', 'auto')
    assert exit_info.value.code == 2
    line, = error_lines(capfd)
    assert line == 'error: --resume run/checkpoints/step-00000003 is at batch 3 of an epoch, of which the data have 2'


def test_the_fingerprint_is_of_the_content(tmp_path):
    """Catches a copy of the data that is taken for other data, and other bytes or labels that are not noticed."""
    write_parquet(tmp_path / 'a' / 'train.parquet', range(20))
    write_parquet(tmp_path / 'a' / 'test.parquet', range(20))
    first = fingerprint(load_image_data(str(tmp_path / 'a')))
    shutil.copytree(tmp_path / 'a', tmp_path / 'copy')
    os.utime(tmp_path / 'copy' / 'train.parquet', (0, 0))
    assert fingerprint(load_image_data(str(tmp_path / 'copy'))) == first
    assert (first['training_images'], first['validation_images']) == (20, 20)
    others = [first['sha256']]
    changed = DIGITS.target[:20].tolist()[::-1]
    other_names = datasets.ClassLabel(names=list('abcdefghij'))
    for kwargs in (dict(labels=changed), dict(files=[png(0)] * 20), dict(target=other_names)):
        write_parquet(tmp_path / f'b{len(others)}' / 'train.parquet', range(20), **kwargs)
        write_parquet(tmp_path / f'b{len(others)}' / 'test.parquet', range(20), target=kwargs.get('target'))
        others.append(fingerprint(load_image_data(str(tmp_path / f'b{len(others)}')))['sha256'])
    assert len(set(others)) == 4


def test_files_that_changed_are_converted_again(tmp_path):
    """Catches images of an older file that are taken from the cache of `datasets`, and names taken for patterns."""
    sums = set()
    for start in (0, 20):
        for split in ('train', 'test'):
            path = tmp_path / 'set [1] *' / f'{split}.parquet'
            write_parquet(path, range(start, start + 20))
            os.utime(path, (0, 0))
        sums.add(fingerprint(load_image_data(str(tmp_path / 'set [1] *')))['sha256'])
    assert len(sums) == 2


def test_a_run_resumes_on_a_copy_of_the_data(saved):
    """Catches a fingerprint that depends on the place or time of files."""
    place, options = saved
    shutil.copytree(place / 'run', 'run')
    data = place / 'set'
    for file in data.rglob('*.png'):
        os.utime(file, (0, 0))
    run(*options, '--dataset', data, '--output', 'run', '--resume', 'auto')
    assert read('run')['training_images'] == 40
