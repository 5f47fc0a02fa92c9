"""Who imports whom, and what the parts need: the contracts are in pyproject.toml."""
import subprocess
import sys
from pathlib import Path

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
    root = Path(__file__).resolve().parent.parent
    # in a process of its own: it silences the loggers of the one that it runs in
    run = subprocess.run([sys.executable, '-c', LINT], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stdout + run.stderr


def test_models_losses_and_publication_need_no_extra_packages(tmp_path):
    """Catches an import that `pip install timm-ddnn` alone cannot fulfil."""
    run = subprocess.run([sys.executable, '-c', CODE], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("'")[1::2] == ['README.md', 'config.json', 'model.safetensors']
