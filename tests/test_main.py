"""The command `timm-ddnn` as a whole: what it offers and lists, what it costs to start, and how it fails."""
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import timm

from timm_ddnn.deploy.formats import FORMATS
from timm_ddnn.deploy.profile import RUNTIMES
from timm_ddnn.utils.errors import InputError
from timm_ddnn.version import __version__
from timm_ddnn_cli import commands
from timm_ddnn_cli.commands import NAMES, export, profile
from timm_ddnn_cli.commands import list as list_command
from timm_ddnn_cli.main import SHELLS, _create_parser, main
from timm_ddnn_cli.tables import format_count

CHILD = """
import sys, time
try:
    {plant}
    from timm_ddnn_cli.main import main
    main({arguments})
finally:
    loaded = sorted({{'torch', 'timm', 'timm_ddnn', 'rich', 'datasets'}} & set(sys.modules))
    print('CPU', time.process_time(), *loaded, file=sys.stderr)
"""


def child(*arguments, plant='pass', **environment):
    """Run the command in a process of its own; -> exit status, stdout, stderr, CPU seconds, packages it imported."""
    run = subprocess.run(
        [sys.executable, '-c', CHILD.format(plant=plant, arguments=list(arguments))], capture_output=True,
        env=dict(os.environ, **environment))
    err = run.stderr.decode(errors='replace')
    seconds, *loaded = re.search(r'^CPU (.*)$', err, re.MULTILINE)[1].split()
    return run.returncode, run.stdout, re.sub(r'^CPU .*\n', '', err, flags=re.MULTILINE), float(seconds), loaded


# Help and arguments

def test_help_names_every_command_in_the_order_of_the_work(capsys):
    """Catches a command that does not appear, or has no line of its own, and help that is an error."""
    assert sorted(NAMES) == sorted(name for _, name, _ in pkgutil.iter_modules(commands.__path__))
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert tuple(re.findall(r'^    (\w+)\s+[A-Z]', text, re.MULTILINE)) == NAMES
    assert 'exit status: 0 done' in text
    main([])
    assert capsys.readouterr().out == text


@pytest.mark.parametrize('name', NAMES)
def test_help_of_a_command_has_examples_that_parse(name, capsys):
    """Catches help without command lines, and lines with options or values that the command does not take."""
    with pytest.raises(SystemExit) as stop:
        main([name, '--help'])
    assert stop.value.code == 0
    _, _, examples = capsys.readouterr().out.partition('examples:\n')
    lines = re.findall(rf'^ *timm-ddnn ({name}\b[^#|\n]*)', examples, re.MULTILINE)
    assert lines
    for line in lines:
        assert _create_parser().parse_args(shlex.split(line)).command == name


COMPLETE = """
source /dev/stdin
for line in "$@"; do
    read -ra COMP_WORDS <<< "$line"
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )) COMPREPLY=()
    $(complete -p timm-ddnn | grep -o '_shtab\\w*')
    echo "${COMPREPLY[@]}"
done
"""


@pytest.mark.skipif(not shutil.which('bash'), reason='bash is not installed')
def test_bash_completes_commands_options_choices_and_files(tmp_path, capsys):
    """Catches a script that the shell does not take, and values that are offered nothing or the wrong things."""
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'profile.json').touch()
    expected = {
        'timm-ddnn ev': 'evaluate', 'timm-ddnn evaluate --cal': '--calibrate-confidence',
        'timm-ddnn export RUN --format o': 'onnx', 'timm-ddnn profile RUN --runtimes eager o': 'onnxruntime',
        'timm-ddnn predict ph': 'photos', 'timm-ddnn predict RUN ph': 'photos', 'timm-ddnn choose --batch-size p': '',
        'timm-ddnn choose --profile pr': 'profile.json',
    }
    main(['--print-completion', 'bash'])
    run = subprocess.run(
        ['bash', '-c', COMPLETE, 'bash', *expected], input=capsys.readouterr().out, cwd=tmp_path, capture_output=True,
        text=True)
    assert (run.returncode, run.stderr) == (0, '')
    assert dict(zip(expected, run.stdout.splitlines(), strict=True)) == expected


@pytest.mark.parametrize('shell', SHELLS)
def test_completion_names_every_command(shell, capsys):
    """Catches a shell that is offered and not known, and commands without completion."""
    main(['--print-completion', shell])
    out, err = capsys.readouterr()
    assert not err and all(name in out for name in NAMES)


def test_literal_choices_are_the_librarys():
    """Catches a choice of the command line that the library does not know, or one of the library that it lacks."""
    assert RUNTIMES == profile.RUNTIMES
    assert tuple(FORMATS) == export.FORMATS


@pytest.mark.parametrize(('arguments', 'status'), [
    ([], 0), (['--help'], 0), (['--version'], 0), (['evaluate', '--help'], 0), (['train', '--help'], 0),
    (['lst'], 2), (['evaluate'], 2), (['evaluate', 'm', '--data', 'd', '--threshold', '2'], 2),
    (['choose', '--runtime', 'tflite'], 2), (['choose'], 2),
])
def test_what_the_arguments_alone_decide_costs_little(arguments, status):
    """Catches an import of torch or timm before it is known that they are needed: 4 s and more of CPU."""
    code, out, err, seconds, loaded = child(*arguments)
    assert (code, loaded) == (status, [])
    assert seconds < 0.5
    assert bool(out) is (status == 0) and len(err.splitlines()) == (status == 2)
    if arguments == ['--version']:
        assert out.decode() == f'timm-ddnn {__version__}\n'


@pytest.mark.parametrize('arguments', [
    ['lst'], ['list', '--nothing'], ['list', 'resnet50'], ['--nothing'], ['train', '-j', '1000'],
    ['evaluate', 'm', '--data', 'd', '-j', '1000'],
])
def test_wrong_arguments_are_one_line(arguments, capsys):
    """Catches usage texts and tracebacks, and more processes than a machine stands."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith('error: ') and len(err.splitlines()) == 1


# Errors and output

class Refused(InputError):
    exit_status = 3


@pytest.mark.parametrize(('error', 'status', 'line'), [
    (InputError('must be a,\n got b'), 2, 'error: must be a, got b\n'),
    (Refused('nothing fits'), 3, 'error: nothing fits\n'),
    (FileNotFoundError(2, 'No such file', 'x.json'), 2, "error: [Errno 2] No such file: 'x.json'\n"),
])
def test_wrong_input_is_one_line_and_a_status(error, status, line, monkeypatch, capsys):
    """Catches a traceback for a user's mistake, and another status."""
    def refuse(args):
        raise error
    monkeypatch.setattr(list_command, 'run', refuse)
    with pytest.raises(SystemExit) as stop:
        main(['list'])
    assert (stop.value.code, *capsys.readouterr()) == (status, '', line)


@pytest.mark.parametrize('error', ['KeyError("planted")', 'ValueError("planted")', 'RuntimeError("planted")'])
def test_a_bug_keeps_its_traceback(error):
    """Catches a bug that is told as if the user had made a mistake, without the place where it is."""
    plant = f'import timm_ddnn_cli.commands.list as c; c.run = lambda args: (_ for _ in ()).throw({error})'
    code, out, err, *_ = child('list', plant=plant)
    assert (code, out) == (1, b'')
    assert err.startswith('Traceback') and 'planted' in err.splitlines()[-1]


def test_messages_are_bounded(monkeypatch, capsys):
    """Catches an error of megabytes, such as that of a file which is given as a name."""
    message = str(InputError(f'name must be short, got {"x" * 10 ** 6} at the end'))
    assert len(message) < 1100 and message.startswith('name must be') and message.endswith('at the end')

    def refuse(args):
        raise OSError('x' * 10 ** 6)
    monkeypatch.setattr(list_command, 'run', refuse)
    with pytest.raises(SystemExit):
        main(['list'])
    assert len(capsys.readouterr().err) < 2100


def test_what_the_console_cannot_show_is_replaced():
    """Catches a command that ends by UnicodeEncodeError, its work done, where the console has few characters."""
    plant = (
        'import timm_ddnn_cli.commands.list as c\n'
        '    def show(args):\n'
        '        from timm_ddnn_cli.tables import create_table, print_line, print_table\n'
        '        table = create_table(("name",), fold=("name",))\n'
        '        table.add_row("\\u0416\\U0001f600")\n'
        '        print_table(table)\n'
        '        print_line("\\u0416 and a")\n'
        '        return []\n'
        '    c.run = show')
    code, out, err, *_ = child('list', plant=plant, PYTHONIOENCODING='cp1252', PYTHONUTF8='0')
    assert (code, err) == (0, '')
    assert b'??' in out and b'? and a' in out


@pytest.mark.parametrize(('package', 'arguments', 'extras'), [
    ('rich', ['list'], 'cli,export'),
    ('sklearn', ['evaluate', 'ddnn_resnet20', '--data', 'digits'], 'train'),
])
def test_a_missing_package_is_named(package, arguments, extras, monkeypatch, capsys):
    """Catches a traceback where an extra was not installed, and a hint to one that does not have the package."""
    for name in {package, *(name for name in sys.modules if name.startswith(f'{package}.'))}:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, 'timm_ddnn_cli.tables', raising=False)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert re.fullmatch(rf'error: timm-ddnn needs the package {package}.* .timm-ddnn\[{extras}\].\n', line), line


# list

def test_list_is_what_the_models_are(capsys):
    """Catches costs of another model, a depth without its blocks, and tags that timm does not have."""
    main(['list', 'ddnn_resnet[35]*', '--json'])
    listed = {model['model']: model for model in json.loads(capsys.readouterr().out)}
    assert set(listed) == set(timm.list_models('ddnn_resnet[35]*'))
    assert listed['ddnn_resnet50']['tags'][0] == 'a1_in1k'
    rows = listed['ddnn_resnet50']['depths']
    assert [(row['depth'], row['blocks']) for row in rows] == [(50, [3, 4, 6, 3]), (26, [2] * 4), (14, [1] * 4)]
    for row in rows:
        net = timm.create_model('resnet50', layers=row['blocks'], device='meta')
        assert row['parameters'] == sum(p.numel() for p in net.parameters())
    assert [round(row['macs'] / 1e9, 3) for row in rows] == [4.089, 2.342, 1.469]


def test_list_fits_80_columns(monkeypatch, capsys):
    """Catches numbers, names and tags that are broken into two lines, or cut, where the terminal is narrow."""
    depths = {101: [3, 4, 23, 3], 50: [3, 4, 6, 3]}
    rows = [{'depth': d, 'blocks': b, 'parameters': 44_549_160, 'macs': 1_813_561_344} for d, b in depths.items()]
    name, tags = max(timm.list_models('ddnn_*'), key=len), ['fb_swsl_ig1b_ft_in1k', 'kd_cifar10', 'ekd_cifar10']
    models = [{'model': name, 'tags': tags, 'input_size': [3, 224, 224], 'depths': rows}]
    monkeypatch.setattr('timm_ddnn.models.load.list_models', lambda pattern: models)
    monkeypatch.setenv('COLUMNS', '80')
    main(['list'])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split() for line in lines if '.' in line][1:] == [
        [name, '224', '101', '3-4-23-3', '44.5', 'M', '1.81', 'G'],
        [f'.{tags[0]}', '50', '3-4-6-3', '44.5', 'M', '1.81', 'G'],
        [f'.{tags[1]}'],
        [f'.{tags[2]}'],
    ]


@pytest.mark.parametrize(('value', 'text'), [
    (0, '0'), (999, '999'), (999.6, '1.00 k'), (75290, '75.3 k'), (269722, '270 k'), (999_499, '999 k'),
    (999_600, '1.00 M'), (25_557_032, '25.6 M'), (9.996e6, '10.0 M'), (1.814e9, '1.81 G'), (11.5e9, '11.5 G'),
])
def test_counts_have_three_digits(value, text):
    """Catches a unit that is wrong by a thousand, and digits that rounding adds."""
    assert format_count(value) == text
