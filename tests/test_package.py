"""What is shipped."""
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    """Fails if the package cannot be built, lacks a module, or carries what does not belong in it."""
    subprocess.run([sys.executable, '-m', 'build', '--outdir', tmp_path, ROOT], check=True, capture_output=True)
    modules = {
        path.relative_to(ROOT).as_posix() for package in ('timm_ddnn', 'timm_ddnn_cli')
        for path in (ROOT / package).rglob('*') if path.is_file() and '__pycache__' not in path.parts
    }
    assert 'timm_ddnn/py.typed' in modules
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        names = wheel.namelist()
    assert {name for name in names if '.dist-info/' not in name} == modules
    assert any(name.endswith('licenses/LICENSE') for name in names)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    assert modules < names
    assert {'README.md', 'LICENSE', 'CITATION.cff', 'train_scripts/train_ekd.py', 'docs/ddnn.svg'} < names
    assert not [name for name in names if name.endswith('.pyc') or name.startswith(('.venv', 'output'))]
