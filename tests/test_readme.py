"""The README's code runs, and its table says what the models are."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.models import EXPECTED_DEPTHS
from torch.utils.flop_counter import FlopCounterMode

from timm_ddnn.utils.costs import count_costs

README = (Path(__file__).parent.parent / 'README.md').read_text()


def test_python_block_runs():
    names = {}
    exec(re.search(r'```python\n(.*?)```', README, re.DOTALL)[1], names)
    assert names['logits'].shape == (2, 10) and tuple(names['outputs']) == (50, 26, 14)
    assert all(p.grad is not None for p in names['model'].parameters())
    model, x = names['model'].eval(), names['x']
    with torch.no_grad():
        assert torch.equal(model.extract(26)(x), model(x, depth=26))


def test_names_of_the_package_exist():
    """Catches a name that the README uses and the package does not have, or not after `import timm_ddnn` alone."""
    code = 'import timm_ddnn; print(*dir(timm_ddnn))'
    known = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    used = set(re.findall(r'\btimm_ddnn\.(\w+)', README))
    assert 'Cascade' in used and not used - set(known)


@pytest.mark.parametrize('name', list(EXPECTED_DEPTHS))
def test_table_of_models(name):
    table = README.partition('\n## Models\n')[2]
    row = next(line for line in table.splitlines() if line.startswith(f'| `{name}` |'))
    model = timm.create_model(name, device='meta')
    costs = count_costs(model, model.pretrained_cfg['input_size'])
    unit, digits = ('G', 2) if model.pretrained_cfg['input_size'][-1] == 224 else ('M', 1)
    size = 1e9 if unit == 'G' else 1e6
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert [cell.strip() for cell in row.strip('|').split('|')] == [
        f'`{name}`',
        ', '.join(str(cost['depth']) for cost in costs),
        ', '.join('-'.join(map(str, cost['blocks'])) for cost in costs),
        f'{parameters:.{1 if parameters > 10 else 2}f} M',
        ', '.join(f'{cost["macs"] / size:.{digits}f}' for cost in costs) + f' {unit}',
    ]


def test_cost_of_all_depths_together():
    model = timm.create_model('ddnn_resnet50', device='meta').eval()
    x = torch.empty(1, 3, 224, 224, device='meta')
    with FlopCounterMode(display=False) as together:
        model(x, depth='all')
    apart = sum(cost['macs'] for cost in count_costs(model, (3, 224, 224)))
    assert f'cost {together.get_total_flops() / 2e9:.2f} GMACs' in README
    assert f'one by one {apart / 1e9:.2f}' in README
