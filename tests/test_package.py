"""What is installed and shipped."""
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_models_need_no_training_libraries():
    """Fails if `import timm_ddnn` needs what only the extra 'train' installs."""
    code = (
        'import sys\n'
        "for name in ('accelerate', 'datasets', 'matplotlib', 'sklearn', 'torchmetrics', 'rich'):\n"
        '    sys.modules[name] = None\n'
        'import timm, timm_ddnn\n'
        "timm.create_model('ddnn_resnet20')\n"
        'print(timm_ddnn.__version__)'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == (ROOT / 'timm_ddnn' / 'version.py').read_text().split("'")[1]


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    """Fails if the package cannot be built, lacks a module, or carries what does not belong in it."""
    subprocess.run([sys.executable, '-m', 'build', '--outdir', tmp_path, ROOT], check=True, capture_output=True)
    modules = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / 'timm_ddnn').rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        names = wheel.namelist()
    assert {name for name in names if '.dist-info/' not in name} == modules
    assert any(name.endswith('licenses/LICENSE') for name in names)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    assert modules < names
    assert {'README.md', 'LICENSE', 'CITATION.cff', 'train_scripts/train_ekd.py', 'docs/ddnn.svg'} < names
    assert not [name for name in names if name.endswith('.pyc') or name.startswith(('.venv', 'output'))]
