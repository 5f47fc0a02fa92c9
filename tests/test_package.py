"""What is shipped, and that it runs where it alone is installed."""
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """Folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp('distributions')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', folder, ROOT], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_wheel_and_sdist(distributions):
    """Fails if the package cannot be built, lacks a module, or carries what does not belong in it."""
    modules = {
        path.relative_to(ROOT).as_posix() for package in ('timm_ddnn', 'timm_ddnn_cli')
        for path in (ROOT / package).rglob('*') if path.is_file() and '__pycache__' not in path.parts
    }
    assert 'timm_ddnn/py.typed' in modules
    with zipfile.ZipFile(next(distributions.glob('*.whl'))) as wheel:
        names = wheel.namelist()
    assert {name for name in names if '.dist-info/' not in name} == modules
    assert any(name.endswith('licenses/LICENSE') for name in names)
    with tarfile.open(next(distributions.glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    assert modules < names
    assert {'README.md', 'LICENSE', 'CITATION.cff', 'train_scripts/train_ekd.py', 'docs/ddnn.svg'} < names
    assert not [name for name in names if name.endswith('.pyc') or name.startswith(('.venv', 'output'))]


@pytest.mark.slow
def test_the_wheel_runs_alone(distributions, tmp_path):
    """Catches a module, a registered model or the command that only a checkout has."""
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'

    def run(*command):
        return subprocess.run(
            [*map(str, command)], cwd=tmp_path, env={'HOME': str(tmp_path)}, check=True, capture_output=True, text=True,
        ).stdout

    wheel = next(distributions.glob('*.whl'))
    run(python, '-m', 'pip', 'install', '--no-deps', '--no-index', wheel)
    own = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    # what it depends on is taken from here; links to checkouts, themselves .pth files there, are not followed
    others = [path for path in sys.path if Path(path).name in ('site-packages', 'dist-packages')]
    (own / 'dependencies.pth').write_text('\n'.join(others))
    lines = re.search(r'^## In Python\n+```python\n(.*?)^```', (ROOT / 'README.md').read_text(), re.M | re.S)[1]
    found = run(python, '-c', f'{lines}\nprint(timm_ddnn.__file__, type(plain).__module__)')
    assert found.split() == [str(own / 'timm_ddnn' / '__init__.py'), 'timm.models.resnet']
    command = python.with_name('timm-ddnn')
    assert run(command, '--version').startswith('timm-ddnn ')
    assert '"ddnn_resnet20"' in run(command, 'list', 'ddnn_resnet2*', '--json')
