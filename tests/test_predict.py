"""`timm-ddnn predict` and `timm_ddnn.predict`: images of all kinds against the model, rows, files, exit statuses."""
import csv
import json
import os

import numpy as np
import pytest
import torch
from helpers.image_files import DAMAGED
from helpers.models import create
from helpers.saved_model import failing
from PIL import Image
from timm.data import create_transform, resolve_input_data_config

import timm_ddnn
from timm_ddnn.evaluation.predict_images import find_images
from timm_ddnn.hub.save import save_model
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.main import main

NAMES = ['cat, tabby', 'Hündin "Ж"', 'frog']


@pytest.fixture(scope='module')
def model():
    return create('ddnn_resnet20', num_classes=3, channels=(4, 8, 16))


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    """The model saved with names of its classes."""
    folder = tmp_path_factory.mktemp('predict') / 'RUN'
    folder.mkdir()
    model.mark_trained(model.depths)
    save_model(model, folder, data_config=resolve_input_data_config(model), class_names=NAMES, rows=[])
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def picture(seed=0, size=(48, 40), mode='RGB'):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@torch.no_grad()
def probabilities(model, image, depth):
    transform = create_transform(**resolve_input_data_config(model))
    return model(transform(image.convert('RGB'))[None], depth=depth).softmax(-1)[0]


def check(row, model, image):
    """Compare a row with the model, the image being prepared by timm."""
    expected, order = probabilities(model, image, row.depth).topk(len(row.classes))
    assert row.classes == tuple(order.tolist())
    assert row.probabilities == pytest.approx(expected.tolist(), abs=1e-5)


def invoke(capsys, *args):
    """Run the command in this process; -> stdout, stderr."""
    capsys.readouterr()
    main(['predict', *map(str, args), '-j', '0'])
    return capsys.readouterr()


# Images

@pytest.mark.parametrize('mode', ['RGB', 'L', '1', 'P', 'RGBA', 'LA'])
def test_a_file_of_any_mode_is_what_the_model_says(mode, model, place):
    """Catches channels that are not converted, and another preparation than timm's."""
    write(place / 'x.png', picture(mode=mode))
    [row] = timm_ddnn.predict(model, 'x.png')
    assert (row.image, row.depth, row.error, row.labels) == ('x.png', 20, None, tuple(map(str, row.classes)))
    check(row, model, Image.open('x.png'))
    assert sum(row.probabilities) == pytest.approx(1)


def test_an_image_is_turned_upright(model, place):
    """Catches a photograph of a phone that is classified lying on its side."""
    exif = Image.Exif()
    exif[0x112] = 6
    write(place / 'x.png', picture(), exif=exif)
    [row] = timm_ddnn.predict(model, place / 'x.png', save='labelled')
    check(row, model, picture().rotate(-90, expand=True))
    saved = Image.open('labelled/0_x.jpg')
    assert saved.size[0] >= 40 and saved.size[1] > 48


def test_grey_models_take_colour(place):
    """Catches images with three channels for a model of one."""
    model = create('ddnn_resnet20', num_classes=3, in_chans=1, channels=(4, 8, 16))
    model.pretrained_cfg.update(input_size=(1, 32, 32), mean=(0.5,), std=(0.25,))
    assert timm_ddnn.predict(model, picture()) == timm_ddnn.predict(model, [picture().convert('L')])


def test_pil_images_depths_and_batches(model):
    """Catches rows out of order, of another depth, and an image that is lost at the edge of a batch."""
    images = [picture(seed) for seed in range(5)]
    model.train()
    rows = timm_ddnn.predict(model, images, depth='all', batch_size=2, top_k=9)
    assert model.training and not model.eval().training
    assert [(row.image, row.depth) for row in rows] == [(i, depth) for i in range(5) for depth in (20, 14, 8)]
    for row in rows:
        check(row, model, images[row.image])
        assert len(row.labels) == 3
    assert timm_ddnn.predict(model, images, depth=(8,), top_k=1)[4].depth == 8


def test_a_cascade_says_where_an_image_ended(model):
    """Catches a depth that did not answer, and logits of another one."""
    images = [picture(seed) for seed in range(6)]
    sure = [probabilities(model, image, 8).max().item() for image in images]
    threshold = sorted(sure)[2] + 1e-4
    rows = timm_ddnn.predict(model, images, cascade=(8, 20), threshold=threshold)
    assert [row.depth for row in rows] == [8 if value > threshold else 20 for value in sure]
    assert {row.depth for row in rows} == {8, 20}
    for row in rows:
        check(row, model, images[row.image])


@pytest.mark.parametrize('workers', [0, 1])
def test_a_broken_image_is_a_row(workers, model, place):
    """Catches an image that ends the command, and rows that move up where one is missing."""
    write(place / 'a.png', picture(1))
    (place / 'b.png').write_bytes(DAMAGED)
    write(place / 'c.png', Image.fromarray(np.zeros((9, 9), dtype=np.uint16)))
    (place / 'd.jpg').write_text('no image')
    write(place / 'e.png', picture(2))
    rows = timm_ddnn.predict(model, place, batch_size=2, num_workers=workers)
    assert [os.path.basename(row.image) for row in rows] == ['a.png', 'b.png', 'c.png', 'd.jpg', 'e.png']
    check(rows[0], model, picture(1))
    check(rows[4], model, picture(2))
    assert [row[1:5] for row in rows[1:4]] == [(None, (), (), ())] * 3
    assert rows[1].error and 'of 8 bits' in rows[2].error and rows[3].error == 'unknown format'


def test_paths(place):
    """Catches files that are left out, taken twice, or that are no images, and names that look like patterns."""
    for name in 'f/a.JPG', 'f/sub/deep/ü.png', 'f/._a.jpg', 'f/@eaDir/a.jpg', 'f/x [1].png', 'f/sub/b.webp':
        write(place / name, picture(), format='PNG')
    (place / 'f/notes.txt').write_text('x')
    inside = ['f/a.JPG', 'f/sub/b.webp', 'f/sub/deep/ü.png', 'f/x [1].png']
    assert find_images('f') == find_images('f/') == inside
    assert sorted(find_images('f/**')) == sorted([*inside, 'f/notes.txt', 'f/@eaDir/a.jpg'])
    assert find_images('f/**/*.png') == ['f/sub/deep/ü.png', 'f/x [1].png']
    assert find_images('f/x [1].png') == ['f/x [1].png']
    assert find_images('f/notes.txt') == ['f/notes.txt']


@pytest.mark.parametrize(('options', 'message'), [
    (dict(cascade=(8, 20)), 'together'), (dict(threshold=0.5), 'together'),
    (dict(cascade=(8, 20), threshold=0.5, depth=8), 'together'), (dict(cascade=(), threshold=0.5), 'two or more'),
    (dict(depth=9), 'depth must be'), (dict(top_k=0), 'top_k must be'), (dict(device='nowhere'), 'device must be'),
])
def test_wrong_arguments(options, message, model):
    with pytest.raises(InputError, match=message):
        timm_ddnn.predict(model, picture(), **options)


def test_logits_that_are_not_finite(model):
    """Catches a diverged model whose classes are told as if they were any."""
    wrong = create('ddnn_resnet20', num_classes=3, channels=(4, 8, 16))
    torch.nn.init.constant_(wrong.fc.bias, torch.nan)
    with pytest.raises(InputError, match='not finite'):
        timm_ddnn.predict(wrong, picture())


# The command

def test_csv_json_and_table(folder, model, place, capsys):
    """Catches a comma or a quote that parts a column, letters that are lost, and formats that differ."""
    write(place / 'f/ü, 1.png', picture())
    (place / 'f/ÿ.png').write_bytes(DAMAGED)
    args = folder, 'f', '--depth', 'all', '-k', 2
    out, err = invoke(capsys, *args, '--json')
    rows = json.loads(out)
    assert [(row['image'], row['depth']) for row in rows] == [
        *(('f/ü, 1.png', depth) for depth in (20, 14, 8)), ('f/ÿ.png', None)]
    assert err.splitlines()[-1] == 'images that could not be read: 1'
    for row in rows[:3]:
        order = probabilities(model, picture(), row['depth']).topk(2).indices.tolist()
        assert row['labels'] == [NAMES[i] for i in order]
    assert invoke(capsys, *args, '--csv', 'x.csv').out == 'x.csv: 4 rows\n'
    with open('x.csv', encoding='utf-8', newline='') as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ['image', 'depth', 'label_1', 'probability_1', 'label_2', 'probability_2', 'error']
    for line, row in zip(lines, rows, strict=True):
        assert (line['image'], line['depth']) == (row['image'], str(row['depth'] or ''))
        assert line['error'] == (row['error'] or '')
        assert [line['label_1'], line['label_2']] == (row['labels'] or ['', ''])
        expected = [f'{p:.6f}' for p in row['probabilities']] or ['', '']
        assert [line['probability_1'], line['probability_2']] == expected
    table = invoke(capsys, *args).out
    assert table.count('ü, 1.png') == 1 and table.count('ÿ.png') == 1
    assert f'{100 * rows[2]["probabilities"][1]:.1f}' in table.splitlines()[7]


def test_saved_images_do_not_replace_one_another(folder, place, capsys):
    """Catches two files of one name, originals that are overwritten, and a broken image that is drawn."""
    for i, name in enumerate(('a/x.png', 'b/x.png', 'b/y.webp')):
        write(place / name, Image.new('RGB', (400, 300), (60 * i, 0, 200)))
    (place / 'b/z.png').write_bytes(DAMAGED)
    invoke(capsys, folder, 'a', 'b', '--save', 'out')
    assert sorted(path.name for path in (place / 'out').iterdir()) == ['0_x.jpg', '1_x.jpg', '2_y.jpg']
    saved = Image.open('out/1_x.jpg').convert('RGB')
    assert saved.width == 400 and saved.height > 300
    difference = np.abs(np.asarray(saved.crop((0, 0, 400, 296)), int) - [60, 0, 200])
    strip = np.asarray(saved.convert('L').crop((0, 300, 400, saved.height)))
    assert difference.max() < 8 and (strip < 64).any() and (strip > 250).mean() > 0.5
    before = (place / 'a/x.png').read_bytes()
    assert 'new or an empty folder' in failing(capsys, 'predict', folder, 'a', '--save', 'a', '-j', 0)
    assert (place / 'a/x.png').read_bytes() == before


@pytest.mark.parametrize(('args', 'message'), [
    (['missing.jpg'], "'missing.jpg'"), (['empty'], "'empty'"), (['none*.png'], "'none*.png'"),
    (['broken.png', 'broken.png'], '2 in all'), (['x.png', '--csv', 'nowhere/x.csv'], 'nowhere'),
    (['x.png', '--csv', '.'], "--csv must be a file in a folder that is there, got '.'"),
    (['x.png', '--cascade', '8', '20'], 'together'), (['x.png', '--depth', '9'], 'depth must be'),
    (['x.png', '--depth', '8', '--cascade', '8', '20'], 'not allowed with'),
])
def test_what_is_wrong_is_one_line(args, message, folder, place, capsys):
    """Catches a traceback, a path that is left out in silence, and status 0 where no image was read."""
    (place / 'empty').mkdir()
    (place / 'broken.png').write_bytes(DAMAGED)
    write(place / 'x.png', picture())
    assert message in failing(capsys, 'predict', folder, *args, '-j', 0)
