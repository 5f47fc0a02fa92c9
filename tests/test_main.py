"""The command `timm-ddnn` as a whole: what it offers, what it lists, and how it refuses."""
import json
import pkgutil
import re
import subprocess
import sys

import pytest
import timm

from timm_ddnn_cli import commands
from timm_ddnn_cli.main import main

NAMES = [name for _, name, _ in pkgutil.iter_modules(commands.__path__)]


def test_help_names_every_command(capsys):
    """Catches a command that does not appear, or has no line of its own."""
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert NAMES == ['calibrate', 'choose', 'evaluate', 'export', 'extract', 'list', 'profile', 'push']
    assert all(re.search(rf'^ +{name}\s+[A-Z]', text, re.MULTILINE) for name in NAMES)
    assert 'exit status: 0 done' in text


@pytest.mark.parametrize('name', NAMES)
def test_help_of_a_command_has_examples(name, capsys):
    """Catches help without command lines, or lines with options that the command has not."""
    with pytest.raises(SystemExit) as stop:
        main([name, '--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    usage, _, examples = text.partition('examples:\n')
    assert f'timm-ddnn {name}' in examples
    lines = [line.split('#')[0] for line in examples.splitlines() if f'timm-ddnn {name}' in line]
    used = {option for line in lines for option in re.findall(r'--[a-z-]+', line)}
    assert used <= set(re.findall(r'--[a-z-]+', usage))


@pytest.mark.parametrize('arguments', [[], ['lst'], ['list', '--nothing'], ['list', 'resnet50'], ['--nothing']])
def test_wrong_arguments_are_one_line(arguments, capsys):
    """Catches usage texts and tracebacks."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1


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
    main(['list', 'ddnn_resnet56'])
    assert re.search(r'ddnn_resnet56 .* 56 .* 9-9-9 .* 0\.85 .* 125\.5', capsys.readouterr().out)


@pytest.mark.parametrize('package, arguments, extras', [
    ('rich', ['list'], 'cli,export'),
    ('sklearn', ['evaluate', 'ddnn_resnet20', '--data', 'digits'], 'train'),
])
def test_a_missing_package_is_named(package, arguments, extras):
    """Catches a traceback where an extra was not installed, and a hint to one that does not have the package."""
    code = (
        'import sys\n'
        f"sys.modules['{package}'] = sys.modules['{package}.console'] = None\n"
        'from timm_ddnn_cli.main import main\n'
        f'main({arguments})'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.returncode == 2
    assert re.fullmatch(
        rf'error: timm-ddnn needs the package {package}.* .timm-ddnn\[{extras}\].\n', run.stderr), run.stderr
