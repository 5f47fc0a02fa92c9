"""Runs the Python and shell snippets of a Markdown page, in a folder that has what they name.

    python -m helpers.snippets PAGE... [--slow]      # in the folder, where the environment says what the Hub is

A command that trains, exports or measures runs only if `slow`, else its arguments are parsed; so are those of a command
that needs GPUs, other hosts or a script of timm, always. `make_place` makes the folder.
"""
import argparse
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from unittest import mock

import timm
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from timm.data import resolve_data_config
from torch.distributed.run import get_args_parser as torchrun_parser

import timm_ddnn  # noqa: F401  the import registers the models
import timm_ddnn_cli.arguments
from timm_ddnn.hub.save import save_model
from timm_ddnn.utils.costs import count_costs
from timm_ddnn_cli.main import main

ROOT = Path(__file__).resolve().parent.parent.parent
# What makes a command short, appended: of an option that is given twice the last counts
SHORT = {
    'calibrate': ['-j', '0'],
    'evaluate': ['-j', '0'],
    'predict': ['-j', '0'],
    'profile': ['--rounds', '2', '--depths', '14'],
    'train': [
        '--epochs', '1', '-b', '4', '-j', '0', '--warmup-epochs', '0', '--mixed-precision', 'no', '--img-size', '32'],
}
SLOW = {'train', 'export', 'profile', 'choose'}
OTHER_HOSTS = {'--multi_gpu', '--config_file', '--main_process_ip'}


class Parsed(BaseException):
    """Raised when the arguments of a program were parsed: no handler of errors takes it for one."""


def run_page(path, slow=False):
    """Evaluate the snippets of a page in its order; an error names the line of the page.

    Returns:
        Number of snippets.
    """
    document = Document.parse(
        str(path), PythonCodeBlockParser(), CodeBlockParser('sh', lambda example: run_shell(example.parsed, slow)),
        SkipParser())
    document.namespace['__name__'] = '__main__'
    examples = list(document)
    for example in examples:
        example.evaluate()
    return len(examples)


def run_shell(text, slow):
    """Run the lines of a snippet; returns what is wrong with one, as Sybil wants it."""
    for line in text.replace('\\\n', ' ').splitlines():
        words = shlex.split(line, comments=True)
        words = words[:words.index('>')] if '>' in words else words
        while words and re.fullmatch(r'[A-Z_]+=\S*', words[0]):
            words.pop(0)
        if words and (wrong := run_line(words, slow)):
            return f'{line}\n{wrong}'
    return None


def run_line(words, slow):
    program, *arguments = words
    if program == 'timm-ddnn':
        return run_command(arguments, slow)
    if program == 'accelerate':
        args = launch_command_parser().parse_args(arguments[1:])
        script = Path(args.training_script)
        if slow and script.name == 'train_ekd.py' and not OTHER_HOSTS & set(arguments):
            return run_command(['train', *args.training_script_args], slow)
        return parse_script([args.training_script, *args.training_script_args])
    if program == 'torchrun':
        args = torchrun_parser().parse_args(arguments)
        return parse_script([args.training_script, *args.training_script_args])
    if program == 'python':
        return parse_script(arguments)
    if program == 'make':
        known = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
        return None if {a for a in arguments if '=' not in a} <= set(known) else f'make has {known}'
    if words[:2] == ['pip', 'install']:
        project = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
        extras, wanted = project['optional-dependencies'], re.fullmatch(r'\.\[(.*)\]', words[2])
        return None if wanted and {*wanted[1].split(',')} <= {*extras} else f'the extras are {list(extras)}'
    return None if words == ['hf', 'auth', 'login'] else f'no test knows how to run {program}'


def run_command(arguments, slow):
    """Run `timm-ddnn`, or parse its arguments."""
    name = arguments[0]
    untrained = '--calibrate-confidence' in arguments  # what no temperature fits
    if untrained or (not slow and name in SLOW):
        with mock.patch.object(argparse.ArgumentParser, 'parse_args', parse_and_stop):
            return expect(Parsed, main, arguments)
    arguments = [*arguments, *SHORT.get('evaluate' if '--evaluate' in arguments else name, ())]
    try:
        main(arguments)
    except SystemExit as stop:
        if stop.code not in ((0, None, 3) if name == 'choose' else (0, None)):  # 3: this machine is busy
            return f'exit status {stop.code}'
    return None


def parse_script(arguments):
    """Parse the arguments of a script of this project; of a script of timm nothing is known."""
    script, *arguments = arguments
    if not Path(script).parent.name:
        return None if (ROOT / 'tests/timm_scripts' / script).is_file() else f'{script} is no script of timm'
    path = ROOT / script
    if not path.is_file():
        return f'{script} is not there'
    def stop(*_):
        raise Parsed
    argv = [str(path), *arguments]
    with (
        mock.patch.object(sys, 'argv', argv),
        mock.patch.object(sys, 'path', [str(path.parent), *sys.path]),
        mock.patch.object(argparse.ArgumentParser, 'parse_args', parse_and_stop),
        # train_timm.py parses a part, puts its task into timm, and runs the script
        mock.patch.object(timm_ddnn_cli.arguments, 'run_script', stop),
        mock.patch.object(timm.task, 'ClassificationTask', timm.task.ClassificationTask),
        mock.patch.object(timm.task.classification, 'ClassificationTask', timm.task.ClassificationTask),
        mock.patch.object(timm.task.TrainingTask, '__init__', timm.task.TrainingTask.__init__),
    ):
        return expect(Parsed, runpy.run_path, str(path), run_name='__main__')


def parse_and_stop(self, *args, original=argparse.ArgumentParser.parse_args, **kwargs):
    original(self, *args, **kwargs)
    raise Parsed


def expect(kind, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except kind:
        return None
    except SystemExit as stop:
        return f'exit status {stop.code}'
    return 'its arguments were not parsed'


# The folder


def make_place(folder):
    """Make the folder in which the snippets run: data sets, runs and a photograph, all tiny."""
    names = 'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'
    make_images(folder / 'FOLDER', ('cat', 'dog'), size=64, count=8)
    make_images(folder / 'uoft-cs/cifar10', names, size=32, count=2)
    make_image(0, 48).save(folder / 'photo.jpg')
    net = timm.create_model('ddnn_resnet50', num_classes=2, channels=(8, 16, 32, 64))
    make_run(folder / 'RUN', net, ('cat', 'dog'), input_size=(3, 64, 64))
    digits = timm.create_model('ddnn_resnet20')
    make_run(folder / 'output/ddnn_resnet20-digits', digits, list(map(str, range(10))), input_size=(3, 32, 32))


def make_run(folder, model, names, input_size):
    folder.mkdir(parents=True)
    model.mark_trained(model.depths)
    config = resolve_data_config({'input_size': input_size}, model=model)
    rows = [row | {'top1': 80.0 + row['depth'] / 10, 'top5': 99.0} for row in count_costs(model, input_size)]
    save_model(model, folder, data_config=config, class_names=names, rows=rows)


def make_images(folder, names, size, count):
    for split in 'train', 'val':
        for label, name in enumerate(names):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                make_image(label, size).save(folder / split / name / f'{i}.jpg')


def make_image(label, size):
    noise = torch.randint(0, 200, (size, size, 3), dtype=torch.uint8) + 5 * label
    return Image.fromarray(noise.to(torch.uint8).numpy())


if __name__ == '__main__':
    for page in sys.argv[1:]:
        if page != '--slow':
            run_page(page, slow='--slow' in sys.argv)
