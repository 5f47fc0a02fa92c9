"""What a training run shows, on a terminal and without one. Each test says which fault it catches."""
import io
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from helpers.image_files import write_images
from helpers.snippets import ROOT
from helpers.training import FAST, history, run
from rich.console import Console

from timm_ddnn.train import progress
from timm_ddnn.train.progress import TrainProgress
from timm_ddnn_cli.main import main

pytestmark = pytest.mark.usefixtures('surroundings')

TERMS = {'loss': 7.123, 'ce_50': 2.345, 'ce_26': 2.345, 'kl_26': 0.123, 'attention_26': 0.012}


def show(console, shown):
    with shown:
        shown.start_epoch(99, 5000)
        for _ in range(3):
            shown.advance()
        shown.show(TERMS)
        shown.bars.refresh()
        for _ in shown.validate(range(50)):
            shown.bars.refresh()
    return re.sub(r'\x1b\[[\d;?]*[A-Za-z]', '', console.file.getvalue()).replace('\r', '\n').splitlines()


@pytest.mark.parametrize('width, terms', [(80, 2), (140, 5)])
def test_bars_fit_the_terminal(width, terms):
    """Catches a bar that wraps, a time left of the run that counts what ran before a resume, and terms cut in two."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})
    shown = TrainProgress(console, epochs=300, steps=5004)
    lines = show(console, shown)
    assert max(map(len, lines)) <= width
    text = '  '.join(f'{name} {value:.3f}' for name, value in list(TERMS.items())[:terms])
    assert any(re.search(rf'^epoch 100/300 .* 5003/5004 \S+ {text}\s*$', line) for line in lines), lines
    assert any(re.search(r'^run .* 99/300 ', line) for line in lines)
    assert any(re.search(r'^validation .* 49/50 ', line) for line in lines)
    assert shown.bars.tasks[0].description == 'epoch 100/300' and len(shown.bars.tasks) == 2
    assert not shown.bars.tasks[1].speed or shown.bars.tasks[1].time_remaining > 1


def test_lines_without_a_terminal(monkeypatch):
    """Catches minutes without a sign of life, between two reports of the loss and in a validation."""
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(now))
    console = Console(file=io.StringIO(), width=80)
    shown = TrainProgress(console, epochs=2, steps=40)
    shown.start_epoch(0, 0)
    for _ in range(20):
        shown.advance()
    shown.show({'loss': 1.5})
    for _ in shown.validate(range(20)):
        pass
    lines = console.file.getvalue().splitlines()
    assert any(re.match(r'epoch 1/2, batch \d/40', line) for line in lines)
    assert any(line.startswith('epoch 1/2, batch 20/40: loss 1.500') for line in lines)
    assert any(re.match(r'validation, batch \d+/20', line) for line in lines)
    assert 8 < len(lines) < 25


def test_a_run_says_what_it_is_and_what_comes_next(capsys):
    """Catches a banner of another run, a folder that one has to look for, and a next command that does not run."""
    write_images(Path('my set'), range(120))
    options = [*FAST, '--dataset', 'my set', '--val-fraction', 0.2, '-b', 32, '--epochs', 2]
    run(*options)
    first = capsys.readouterr().out
    records = history('output/ddnn_resnet20-my set')
    for line in (
            'model    ddnn_resnet20, depths 14, 8, 0.04 M parameters, from random weights',
            'data     my set: 95 images to train, 25 to validate (0.2 of train), 10 classes, 16 x 16 px',
            'training 2 epochs, adamw, learning rate 0.02, warm-up of 0',
            'folder   output/ddnn_resnet20-my set',
            f'epoch 2/2: loss {records[1]["train_loss"]:.3f}, top-1 {records[1]["top1_14"]:.2f} (14) '
            f'{records[1]["top1_8"]:.2f} (8), {records[1]["images_per_second"]:.0f} images/s',
    ):
        assert line in first.splitlines(), first
    assert re.search(r'^device   1 x cpu \(.*\), float32, batches of 32$', first, re.MULTILINE)
    command, = re.findall('^next: (.*)$', first, re.MULTILINE)
    main([*shlex.split(command)[1:], '-j', '0'])
    assert '25 images' in capsys.readouterr().out
    run(*options, '--output', 'output/ddnn_resnet20-my set', '--resume', 'auto', '--json')
    assert 'resuming from output/ddnn_resnet20-my set/checkpoints/step-00000004: its end' in capsys.readouterr().err


@pytest.mark.parametrize('page', ['README.md', 'docs/training.md', 'docs/scale.md', 'train_scripts/train_ekd.py'])
def test_accelerate_does_not_warn_of_the_commands_that_are_given(page, caplog, monkeypatch):
    """Catches a first command that begins with a page of warnings."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    text = (ROOT / page).read_text(encoding='utf-8').replace('\\\n', ' ')
    commands = re.findall(r'accelerate launch ([^`]*?train_ekd\.py)', text)
    assert commands
    for command in commands:
        _validate_launch_command(launch_command_parser().parse_args(shlex.split(command)))
        assert not caplog.text, command
