"""Who imports whom, and what the parts need: the contracts are in pyproject.toml."""
import ast
import subprocess
import sys

import pytest
from helpers.training import ROOT

from timm_ddnn_cli.commands import NAMES

LINT = 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))'
CODE = """
import sys
for name in ('accelerate', 'datasets', 'matplotlib', 'sklearn', 'pandas', 'rich', 'onnx', 'onnxruntime'):
    sys.modules[name] = None
import timm, torch, timm_ddnn
from PIL import Image
model = timm.create_model('ddnn_resnet20', pretrained=True)
task = timm_ddnn.EKDTask(model, verbose=False)
task.train()(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))['loss'].backward()
timm_ddnn.calibrate_bn(model, [torch.zeros(2, 3, 32, 32)], 8)
timm_ddnn.Cascade(model.eval(), (8, 20), 0.5)(torch.zeros(1, 3, 32, 32))
timm_ddnn.predict(model, [Image.new('RGB', (40, 30))], cascade=(8, 20), threshold=0.5)
print(sorted(timm_ddnn.push_to_hub(model, 'owner/name', dry_run=True).files))
"""


def test_imports_run_down():
    """Catches a part that knows what is built on it, and a core that needs more than torch and timm."""
    # in a process of its own: it silences the loggers of the one that it runs in
    run = subprocess.run([sys.executable, '-c', LINT], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize('name', NAMES)
def test_commands_show_that_they_start(name):
    """Catches a command that is silent while it imports torch and timm, which takes seconds."""
    tree = ast.parse((ROOT / f'timm_ddnn_cli/commands/{name}.py').read_text(encoding='utf-8'))
    run = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == 'run')
    status = next(node for node in run.body if isinstance(node, ast.With))
    assert ast.unparse(status.items[0].context_expr).startswith('show_status(')

    def imports(nodes):
        return [node for top in nodes for node in ast.walk(top)
                if isinstance(node, ast.Import | ast.ImportFrom) and 'timm' in ast.unparse(node)]
    assert imports(status.body) and not imports([node for node in run.body if node is not status])


def test_models_losses_and_publication_need_no_extra_packages(tmp_path):
    """Catches an import that `pip install timm-ddnn` alone cannot fulfil."""
    run = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("'")[1::2] == ['README.md', 'config.json', 'model.safetensors']
