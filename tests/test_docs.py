"""Every snippet of README and the site runs, and what their tables and sentences say of the models is so."""
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.hub_server import User, child, hub  # noqa: F401  a fixture
from helpers.snippets import ROOT, make_place, run_page
from safetensors.torch import save
from torch.utils.flop_counter import FlopCounterMode

import timm_ddnn
from timm_ddnn.utils.costs import count_costs
from timm_ddnn_cli.commands import NAMES

PAGES = ['README.md', 'MODEL_CARD.md', 'CONTRIBUTING.md', 'results/README.md', 'results/PROTOCOL.md',
         'benchmarks/README.md', *sorted(f'docs/{path.name}' for path in ROOT.glob('docs/*.md'))]
TEXTS = {page: (ROOT / page).read_text(encoding='utf-8') for page in PAGES}
README = TEXTS['README.md']
# MACs in G of the model cards of timm on the Hub
PUBLISHED = {
    'ddnn_resnet18': 1.8, 'ddnn_resnet34': 3.7, 'ddnn_resnet50': 4.1, 'ddnn_resnet101': 7.8, 'ddnn_resnet152': 11.6}
WITH_HUB = [page for page, text in TEXTS.items() if re.search('^timm-ddnn push', text, re.MULTILINE)]
TRAINING = [
    page for page, text in TEXTS.items()
    if re.search('^(timm-ddnn (train|export|profile)|accelerate launch train)', text, re.MULTILINE)]


@pytest.fixture(scope='module')
def first_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    make_place(folder)
    return folder


@pytest.fixture
def place(first_place, surroundings, tmp_path, monkeypatch):
    """A folder of its own for a page, which is the working directory."""
    shutil.copytree(first_place, tmp_path / 'place')
    monkeypatch.chdir(tmp_path / 'place')


def run_in_child(hub, *arguments):  # noqa: F811
    """Run pages in a process of their own, where the test server is the Hub: it is found out at import."""
    hub.users[hub.token] = User(hub.user, (hub.organization, 'OWNER', 'me'))
    path = f'{ROOT}{os.pathsep}{ROOT / "tests"}'
    result = child(hub, ['-m', 'helpers.snippets', *arguments], timeout=800, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize('page', [page for page in PAGES if page not in WITH_HUB])
def test_snippets(page, place):
    """Catches a snippet that does not run, an option that is not there, and a page whose snippets are not found."""
    assert run_page(ROOT / page) == len(re.findall('^```(?:python|sh)$', TEXTS[page], re.MULTILINE))


def test_snippets_with_the_hub(place, hub):  # noqa: F811
    """As `test_snippets`, of pages that publish and download."""
    assert WITH_HUB == ['README.md', 'docs/hub.md']
    run_in_child(hub, *(ROOT / page for page in WITH_HUB))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('page', TRAINING)
def test_snippets_that_train_and_export(page, place, hub):  # noqa: F811
    """Catches options that parse and do not go together, and files that are named otherwise."""
    hub.publish('timm/resnet50.a1_in1k', {'model.safetensors': save(timm.create_model('resnet50').state_dict())})
    run_in_child(hub, ROOT / page, '--slow')


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_examples_of_the_help_run(place, hub):  # noqa: F811
    """Catches an example that parses and does not run, and a file that a later command looks for elsewhere."""
    hub.publish('timm/resnet50.a1_in1k', {'model.safetensors': save(timm.create_model('resnet50').state_dict())})
    for run in 'ddnn_resnet50-food', 'ddnn_resnet50-cars':
        shutil.copytree('RUN', f'output/{run}')
    for folder in 'photos', 'more/some':
        shutil.copytree('FOLDER/val/cat', folder)
    Path('more/some/0.jpg').rename('more/some/0.png')
    lines = ['timm-ddnn push RUN OWNER/NAME']
    for name in sorted(NAMES, key=lambda name: name != 'export'):  # `profile --file` measures what it writes
        examples = importlib.import_module(f'timm_ddnn_cli.commands.{name}').EXAMPLES
        lines += re.findall(r'^ +((?:timm-ddnn|accelerate|hf) [^|\n]*)', examples, re.MULTILINE)
    Path('page.md').write_text('\n'.join(f'```sh\n{line}\n```\n' for line in lines), encoding='utf-8')
    run_in_child(hub, 'page.md', '--slow')


@pytest.mark.parametrize('code', [
    '```sh\ntimm-ddnn evaluate RUN\n```', '```sh\ntimm-ddnn train --lrate 1\n```', '```sh\nmake tset\n```',
    "```sh\npip install '.[none]'\n```", '```sh\npython train_scripts/train_timm.py train.py --ekd-gamma 1\n```',
    '```sh\naccelerate launch train_scripts/train_ekd.py --lrate 1\n```', '```sh\ncurl x\n```',
    '```sh\naccelerate launch --gpus 4 train_scripts/train_ekd.py\n```', '```python\nmodel(x)\n```',
])
def test_a_wrong_snippet_is_found(code, tmp_path, surroundings):
    """Catches a runner that lets anything pass."""
    (tmp_path / 'page.md').write_text(f'text\n\n{code}\n', encoding='utf-8')
    with pytest.raises((Exception, SystemExit)):
        run_page(tmp_path / 'page.md')


def test_names_of_the_package_exist():
    """Catches a name that a page uses and the package does not have."""
    used = {name for text in TEXTS.values() for name in re.findall(r'\btimm_ddnn\.(\w+)', text)}
    assert {'Cascade', 'EKDLoss'} <= used and not used - {*timm_ddnn.__all__, 'deploy', 'evaluation', 'models', 'utils'}


@pytest.mark.parametrize('name', timm.list_models('ddnn_*'))
def test_tables_of_models(name):
    """Catches costs of another model, a row that is missing, and a counter that counts otherwise than the field."""
    model = timm.create_model(name, device='meta')
    costs = count_costs(model, model.pretrained_cfg['input_size'])
    if name in PUBLISHED:
        assert costs[0]['macs'] / 1e9 == pytest.approx(PUBLISHED[name], rel=0.015)
    unit, digits = ('G', 2) if model.pretrained_cfg['input_size'][-1] == 224 else ('M', 1)
    size = 1e9 if unit == 'G' else 1e6
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    row = [
        f'`{name}`',
        ', '.join(str(cost['depth']) for cost in costs),
        ', '.join('-'.join(map(str, cost['blocks'])) for cost in costs),
        f'{parameters:.{1 if parameters > 10 else 2}f} M',
        ', '.join(f'{cost["macs"] / size:.{digits}f}' for cost in costs) + f' {unit}',
    ]
    assert f'| {" | ".join(row)} |' in TEXTS['docs/models.md']
    if f'`{name}` |' in README:
        assert f'| {" | ".join(row[:2] + row[3:])} |' in README


def test_readme_counts_the_models():
    assert f'[Models](docs/models.md) has all {len(timm.list_models("ddnn_*"))} and' in ' '.join(README.split())


def test_cost_of_all_depths_together():
    model = timm.create_model('ddnn_resnet50', device='meta').eval()
    x = torch.empty(1, 3, 224, 224, device='meta')
    with FlopCounterMode(display=False) as together:
        model(x, depth='all')
    apart = sum(cost['macs'] for cost in count_costs(model, (3, 224, 224)))
    cost = f'share once: {together.get_total_flops() / 2e9:.2f} GMACs, one by one {apart / 1e9:.2f}'
    assert cost in ' '.join(README.split())


def test_readme_is_short_and_has_the_two_commands():
    assert len(README.splitlines()) <= 150
    assert re.search(r'^make train\b', README, re.MULTILINE) and re.search(r'^make test\b', README, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('mkdocs'), reason='needs the extra `docs`')
def test_site_fetches_nothing_when_it_is_viewed(tmp_path):
    """Catches a page that does not build strictly, fonts and scripts from elsewhere, and a command without its help."""
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', tmp_path / 'site']
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    pages = {path: path.read_text(encoding='utf-8') for path in (tmp_path / 'site').rglob('*.html')}
    assert len(pages) > 15
    for path, text in pages.items():
        loads = re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="([^"]+)"', text)
        loads += re.findall(r'<link[^>]*\brel="(?:stylesheet|preconnect|icon)"[^>]*\bhref="([^"]+)"', text)
        loads += re.findall(r'<link[^>]*\bhref="([^"]+)"[^>]*\brel="(?:stylesheet|preconnect|icon)"', text)
        assert loads and not [url for url in loads if re.match(r'(https?:)?//', url)], path
    commands = re.sub(r'<a.*?</a>', '', (tmp_path / 'site/commands.html').read_text(encoding='utf-8'))
    assert all(f'timm-ddnn {name}</h2>' in commands and f'usage: timm-ddnn {name}' in commands for name in NAMES)
