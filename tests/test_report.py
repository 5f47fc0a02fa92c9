"""What a run writes: costs, the model in timm's format, descriptions and pictures."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from helpers.models import create, logits_by_depth
from PIL import Image
from rich.console import Console
from torch import nn

from timm_ddnn.evaluation import plots
from timm_ddnn.evaluation.metrics import wilson_interval
from timm_ddnn.hub import save
from timm_ddnn.train import output
from timm_ddnn.utils import costs, environment, files
from timm_ddnn_cli import tables

CONFIG = dict(
    input_size=(3, 24, 24), interpolation='bilinear', mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.9,
    crop_mode='center',
)
ROWS = [
    {'depth': 20, 'blocks': [3, 3, 3], 'parameters': 269722, 'macs': 40551040, 'top1': 97.5, 'top5': 100.0},
    {'depth': 8, 'blocks': [1, 1, 1], 'parameters': 75290, 'macs': 12239488, 'top1': 90.25, 'top5': 99.0},
]


@pytest.mark.parametrize('name, size', [('ddnn_resnet20', 32), ('ddnn_resnet20', 16), ('ddnn_resnet50', 64)])
def test_costs_are_those_of_the_plain_net(name, size):
    """Catches operations counted as multiply-accumulates twice or not at all, and costs of the full-net at every depth.

    The count by hand: output pixels times weights, of every convolution and of the classifier.
    """
    model = timm.create_model(name)
    model.train()
    rows = costs.count_costs(model, (3, size, size))
    assert model.training
    assert tuple(row['depth'] for row in rows) == model.depths
    for row in rows:
        plain = model.extract(row['depth']).eval()
        for module in plain.modules():
            module.register_forward_hook(lambda m, _, y: setattr(m, 'pixels', y[0, 0].numel()))
        plain(torch.zeros(1, 3, size, size))
        layers = [m for m in plain.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert row['macs'] == sum(m.pixels * m.weight.numel() for m in layers)
        assert row['parameters'] == sum(p.numel() for p in plain.parameters())
        assert tuple(row['blocks']) == model.blocks(row['depth'])


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_saved_model_is_rebuilt_by_timm(tmp_path, memory_format):
    """Catches weights of a depth or arguments that do not come back, a pickle, or a model that cannot be saved."""
    kwargs = dict(subnets=((2, 2, 1), (1, 2, 1)), num_classes=4, in_chans=1)
    model = create('ddnn_resnet20', **kwargs).to(memory_format=memory_format)
    config = dict(CONFIG, input_size=(1, 24, 24), mean=(0.3,), std=(0.5,))
    save.save_model(model, tmp_path, data_config=config, class_names=list('abcd'), rows=ROWS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.json', 'model.safetensors']
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # readable by the same people

    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert [loaded.blocks(d) for d in loaded.depths] == [(3, 3, 3), (2, 2, 1), (1, 2, 1)]
    x = torch.randn(2, 1, 24, 24)
    for depth, logits in logits_by_depth(model, x).items():
        torch.testing.assert_close(loaded(x, depth=depth), logits)
    assert tuple(loaded.pretrained_cfg['input_size']) == (1, 24, 24)
    assert (loaded.pretrained_cfg['crop_pct'], loaded.pretrained_cfg['label_names']) == (0.9, list('abcd'))
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7).fc.out_features == 7


def test_config_holds_results_and_no_second_num_classes(tmp_path):
    """Catches a `num_classes` in `model_args`, on which transformers fails, and names for another number of classes."""
    model = create('ddnn_resnet20')
    save.save_model(model, tmp_path, data_config=CONFIG, class_names=list('abcd'), rows=ROWS)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['depths'] == ROWS
    assert config['num_classes'] == 10
    assert 'num_classes' not in config['model_args']
    assert 'label_names' not in config
    assert model._model_args == create('ddnn_resnet20')._model_args


def test_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    """Catches a run whose last good model is gone because the disk was full at the next epoch."""
    save.save_model(create('ddnn_resnet20'), tmp_path, data_config=CONFIG, class_names=[], rows=ROWS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(model, folder, **kwargs):
        (Path(folder) / 'model.safetensors').write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(save, 'save_for_hf', fail)
    with pytest.raises(OSError, match='disk full'):
        save.save_model(create('ddnn_resnet20', seed=1), tmp_path, data_config=CONFIG, class_names=[], rows=ROWS)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_json_is_whole_or_absent(tmp_path):
    """Catches half a file after an error, and NaN, which no other JSON reader takes."""
    files.write_json(tmp_path / 'a.json', {'x': 1})
    with pytest.raises(ValueError, match='JSON'):
        files.write_json(tmp_path / 'a.json', {'x': float('nan')})
    assert json.loads((tmp_path / 'a.json').read_text()) == {'x': 1}
    assert [p.name for p in tmp_path.iterdir()] == ['a.json']
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / 'a.json', '\ud800')
    assert json.loads((tmp_path / 'a.json').read_text()) == {'x': 1}


def test_text_is_utf8_whatever_the_locale(tmp_path):
    """Catches names that come out in the encoding of the locale, or that it cannot hold."""
    code = (
        'import sys, types\n'
        'package = sys.modules["u"] = types.ModuleType("u")\n'  # the module alone, without torch
        f'package.__path__ = [{str(Path(files.__file__).parent)!r}]\n'
        'from pathlib import Path\n'
        'from u.files import write_section, write_text\n'
        'from u.schema import items, read_json, text\n'
        'write_text(Path("a.md"), "cr\\u00e8me\\n<!-- x -->\\n<!-- end of x -->")\n'
        'write_section(Path("a.md"), "x", "\\u0416\\n")\n'
        'Path("a.json").write_bytes("[\\"\\u0416\\"]".encode())\n'
        'assert read_json("a.json", items(text())) == ["\\u0416"]\n')
    environment = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    run = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / 'a.md').read_bytes() == 'crème\n<!-- x -->\nЖ\n<!-- end of x -->'.encode()


def test_run_is_described():
    """Catches a summary that cannot be written, or that lacks what a number in a table must carry."""
    run = json.loads(json.dumps(output.describe_run(Accelerator(cpu=True), {'output': Path('x'), 'seed': 3})))
    assert run['arguments'] == {'output': 'x', 'seed': 3}
    assert run['versions'].keys() >= {'timm_ddnn', 'python', 'torch', 'timm', 'accelerate', 'datasets'}
    assert (run['versions']['torch'], run['versions']['timm']) == (torch.__version__, timm.__version__)
    assert run['hardware']['cpu_cores'] >= 1
    assert 0.5 < run['hardware']['memory_gib'] < 1e5
    assert (run['processes'], run['device'], run['mixed_precision']) == (1, 'cpu', 'no')


def test_git_state_is_that_of_the_checkout_with_the_file(tmp_path):
    """Catches the commit of somebody's own project, in which the library is merely installed, taken for its own."""
    def git(*args):
        command = ('git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a@b', *args)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    own, installed = tmp_path / 'own.py', tmp_path / 'installed.py'
    own.write_text('1')
    installed.write_text('1')
    assert environment._git_state(own) is None
    git('init')
    git('add', 'own.py')
    git('commit', '-m', 'x')
    assert environment._git_state(own) == {'commit': git('rev-parse', 'HEAD').strip(), 'dirty': False}
    assert environment._git_state(installed) is None
    own.write_text('2')
    assert environment._git_state(own)['dirty']


def test_table_shows_every_depth():
    """Catches columns in the wrong order."""
    console = Console(width=120, record=True)
    console.print(tables.result_table(ROWS, 'model-[set]', 269722))
    text = console.export_text()
    assert 'model-[set]' in text  # no markup of rich
    assert [word for word in text.split() if word[0].isdigit()] == [
        '20', '3-3-3', '270', '40.6', '97.50', '100.00', '8', '1-1-1', '75.3', '12.2', '90.25', '99.00', '270']


def colours(path):
    image = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
    return {tuple(int(c) for c in colour) for colour in np.unique(image, axis=0)}


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_accuracy_picture(tmp_path):
    """Catches an empty picture, and one depth alone, or a title with dollar signs, as an error."""
    rows = [row | {'top1_interval': (row['top1'] - 1, row['top1'] + 1)} for row in ROWS]
    plots.plot_accuracy(tmp_path / 'a.png', rows, 'a $x^{ $ b')
    plots.plot_accuracy(tmp_path / 'b.png', rows[:1], 'title')
    assert BLUE in colours(tmp_path / 'a.png')
    assert BLUE in colours(tmp_path / 'b.png')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.png', 'b.png']


@pytest.mark.parametrize('tops', [(99.1, 99.4), (40.0, 95.0)])
def test_axes_show_no_difference_larger_than_its_error(tmp_path, monkeypatch, tops):
    """Catches a plot in which 99.1 and 99.4 % of 360 images are as far apart as the axis is long."""
    figures = []
    monkeypatch.setattr(plots, 'save_figure', lambda figure, path: figures.append(figure))
    rows = [
        row | {'top1': top1, 'top1_interval': wilson_interval(round(3.6 * top1), 360)}
        for row, top1 in zip(ROWS, tops, strict=True)]
    plots.plot_accuracy(tmp_path, rows, 'title')
    history = [{'epoch': 0, 'train_ce_20': 1.0, 'top1_20': tops[0], 'top1_8': tops[1]}]
    plots.plot_curves(tmp_path, history, rows, 'title')
    for axes in (figures[0].axes[0], figures[1].axes[1]):
        low, high = axes.get_ylim()
        assert high - low >= 3 * max(top - bottom for bottom, top in (row['top1_interval'] for row in rows))
        assert low < min(tops) and high > max(tops)


@pytest.mark.parametrize(('ema', 'epochs'), [(False, 1), (True, 3)])
def test_curves_picture(tmp_path, ema, epochs):
    """Catches a depth that is not drawn, and terms that are absent (alpha or beta of 0) or dollar signs as an error."""
    record = {'train_ce_20': 0.5, 'train_ce_8': 0.7, 'train_kl_8': 0.1, 'top1_20': 90.0, 'top1_8': 80.0}
    if ema:
        record |= {'ema_top1_20': 91.0, 'ema_top1_8': 82.0}
    rows = [{'depth': depth, 'top1_interval': (89, 91)} for depth in (20, 8)]
    plots.plot_curves(tmp_path / 'a.png', [{'epoch': e, **record} for e in range(epochs)], rows, 'a $x^{ $ b')
    assert {BLUE, ORANGE} <= colours(tmp_path / 'a.png')
