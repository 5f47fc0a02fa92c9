"""What is published: files, model card and refusals. How it travels to the Hub and back is in `test_hub.py`."""
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.hub_server import ROOT
from helpers.small_models import make_model, save
from huggingface_hub import ModelCard
from PIL import Image

import timm_ddnn
from timm_ddnn.hub.model_card import keep_written
from timm_ddnn.utils.files import file_sha256, write_json
from timm_ddnn_cli.main import main


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    return save(make_model(), tmp_path_factory.mktemp('saved') / 'net')


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / 'net')


def come_from(folder, *names):
    """Make a folder say which models its weights come from."""
    config = json.loads((folder / 'config.json').read_bytes())
    write_json(folder / 'config.json', config | {'base_model': names})


def run_snippet(target, repo_id='me/net'):
    """Run the snippet of a card as a user does who has photo.jpg; returns its names."""
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save('photo.jpg')
    code = re.search(r'```python\n(.*?)```', (target / 'README.md').read_text(encoding='utf-8'), re.DOTALL)[1]
    assert f"'hf-hub:{repo_id}'" in code
    names = {}
    exec(code.replace(f'hf-hub:{repo_id}', f'local-dir:{target}'), names)
    return names


def summary_of(**changes):
    return {
        'arguments': {'dataset': 'uoft-cs/cifar10', 'epochs': 3, 'alpha': 0.3, 'seed': 7, 'model': '/home/me/first',
                      'pretrained': True, 'teacher': 'hf-hub:me/teacher'},
        'augmentation': {'crop_mode': 'pad', 'mixup': 0.2}, 'weights': 'of epoch 2 of 3', 'validation_images': 1000,
        'training_images': 5000, 'hardware': {'cpu': 'a CPU', 'cpu_cores': 2, 'gpus': ['a GPU'] * 8},
        'versions': {'torch': '2'}, 'device': 'cuda:0', 'processes': 1, 'mixed_precision': 'bf16',
        'data_on_hub': True, 'validation_split': 'test', **changes,
    }


def test_dry_run_writes_a_card_that_the_hub_understands(folder, tmp_path, monkeypatch, capsys):
    """Catches metadata that is missing, a table without a depth, a plot that is not the run's, files not shown."""
    monkeypatch.chdir(tmp_path)
    write_json(folder / 'summary.json', summary_of())
    come_from(folder, 'timm/some.a1_in1k', 'ddnn_resnet56.ekd_cifar10')
    Image.new('RGB', (4, 4)).save(folder / 'accuracy.png')
    main(['push', str(folder), 'me/net', '--license', 'mit', '--dry-run'])
    shown = capsys.readouterr().out
    target = tmp_path / 'output' / 'hub' / 'me--net'
    assert str(target.relative_to(tmp_path)) in shown
    assert {path.name for path in target.iterdir()} == {'README.md', 'accuracy.png', 'config.json', 'model.safetensors'}
    for path in target.iterdir():
        assert re.search(rf'{re.escape(path.name)} +{path.stat().st_size:,}\n', shown)

    text = (target / 'README.md').read_text(encoding='utf-8')
    known = ModelCard(text).data
    assert (known.license, known.base_model, known.library_name) == ('mit', ['timm/some.a1_in1k'], 'timm')
    assert [result.metric_value for result in known.eval_results if 'top-1' in result.metric_name] == [70, 71, 72]
    _, metadata, card = text.split('---\n', 2)
    metadata = yaml.safe_load(metadata)
    assert metadata['library_name'] == 'timm'
    assert metadata['datasets'] == ['uoft-cs/cifar10']
    results = metadata['model-index'][0]['results']
    assert [result['metrics'][0]['value'] for result in results] == [70.0, 71.0, 72.0]
    assert {result['dataset']['split'] for result in results} == {'test'}
    assert all(f'depth {d}' in result['task']['name'] for d, result in zip((20, 14, 8), results, strict=True))
    assert all(re.search(rf'\| {d} \| .* \| {top1:.2f} \|', card) for d, top1 in ((20, 70), (14, 71), (8, 72)))
    for line in (
        '- data: uoft-cs/cifar10, 5,000 images to train', '- accuracy: on 1,000 images, split test',
        '- recipe: epochs 3, alpha 0.3', '- seed: 7', '- hardware: 1 x a GPU', '](accuracy.png)', 'import timm_ddnn',
        'model(image, depth=8)', file_sha256(target / 'model.safetensors'), 'arXiv:2103.00793',
        '- image size: 32 x 32 px, RGB', '- classes: 10: `class 0`, `class 1`,', '- starting weights: first\n',
        '- base model: [timm/some.a1_in1k](https://huggingface.co/timm/some.a1_in1k), `ddnn_resnet56.ekd_cifar10`',
        '- teacher: hf-hub:me/teacher', '- augmentation: crop mode pad, mixup 0.2', '- weights: of epoch 2 of 3',
        '## License\n\nmit. Mind the license of the base model', '[More Information Needed]: who should use',
    ):
        assert line in card
    assert '$' not in card
    assert (target / 'accuracy.png').read_bytes() == (folder / 'accuracy.png').read_bytes()

    config = json.loads((target / 'config.json').read_text())
    assert config['weights_sha256'] == file_sha256(target / 'model.safetensors')
    assert [row['top1'] for row in config['depths']] == [70.0, 71.0, 72.0]
    assert config['label_names'] == [f'class {i}' for i in range(10)]
    assert config['model_args']['channels'] == [4, 8, 16]


@pytest.mark.parametrize(('summary', 'expected', 'absent'), [
    (summary_of(arguments={'dataset': 'data/food'}, data_on_hub=False, device='cpu'),
     ['- data: food, 5,000', '- hardware: 2 cores of a CPU', '- seed: not recorded', '- starting weights: random',
      '- base model: none', '- teacher: its own deepest net', 'No license was given: without one nobody'],
     ['data/food', 'datasets:', 'license:', 'base_model:']),
    (summary_of(arguments={'dataset': 'данные'}, data_on_hub=False), ['- data: данные, 5,000'], []),
    ({}, ['- data: not recorded, - images to train', '- recipe: not recorded', '- hardware: not recorded'],
     ['model-index', 'datasets:']),
    (None, ['- data: not recorded', '- starting weights: not recorded', '- augmentation: not recorded'],
     ['model-index', 'pip install timm-ddnn']),
])
def test_a_card_claims_no_more_than_the_run_did(folder, tmp_path, monkeypatch, summary, expected, absent):
    """Catches a link to a stranger's data set that is called as the user's folder, and what was never recorded."""
    monkeypatch.chdir(tmp_path)
    if summary is not None:
        write_json(folder / 'summary.json', summary)
    files = timm_ddnn.push_to_hub(folder, 'me/net', dry_run=True).files
    card = (tmp_path / 'output/hub/me--net/README.md').read_text(encoding='utf-8')
    assert all(text in card for text in expected)
    assert not any(text in card for text in [*absent, 'accuracy.png', 'None', '$'])
    assert 'accuracy.png' not in files


@pytest.mark.parametrize('content', [
    '', '[]', '{"arguments": 5}', '{"arguments": {"dataset": null}}', '{"arguments": {"teacher": [1]}}',
    '{"arguments": {"lr": {}}}', '{"hardware": {"gpus": 3}}', '{"versions": [1]}', '{"training_images": "many"}',
    '{"validation_images": NaN}', '[' * 10_000,
])
def test_a_damaged_summary_is_one_line(folder, tmp_path, monkeypatch, capsys, content):
    """Catches tracebacks, and cards that show what a damaged file says."""
    monkeypatch.chdir(tmp_path)
    (folder / 'summary.json').write_text(content)
    with pytest.raises(SystemExit) as error:
        main(['push', str(folder), 'me/net', '--dry-run'])
    assert error.value.code == 2
    assert re.fullmatch(r'error: .*summary\.json must be .*\n', capsys.readouterr().err)
    assert not Path('output').exists()


def test_publication_needs_no_package_of_the_commands(folder, tmp_path, monkeypatch):
    """Catches `push_to_hub` that draws, or imports what only the commands need."""
    monkeypatch.chdir(tmp_path)
    for name in ('matplotlib', 'rich', 'accelerate', 'datasets', 'torchmetrics'):
        for module in [module for module in sys.modules if module.split('.')[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
    for module in [module for module in sys.modules if module.startswith('timm_ddnn.hub')]:
        monkeypatch.delitem(sys.modules, module)
    publish = importlib.import_module('timm_ddnn.hub.publish')
    assert publish.push_to_hub(folder, 'me/net', dry_run=True).files


def test_a_model_of_grey_images_is_published(tmp_path, monkeypatch):
    """Catches a model that is run on images of three channels, and one whose own modes are changed by that."""
    monkeypatch.chdir(tmp_path)
    model = make_model(in_chans=1).train()
    model.layer1.eval()
    timm_ddnn.push_to_hub(model, 'me/grey', dry_run=True)
    assert not model.layer1.training and model.layer2.training and model.training
    config = json.loads((tmp_path / 'output/hub/me--grey/config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [1, 32, 32]
    names = run_snippet(tmp_path / 'output/hub/me--grey', 'me/grey')
    assert names['image'].shape == (1, 1, 32, 32) and names['label'].startswith('class ')  # without names


@pytest.mark.parametrize(('options', 'source'), [
    ({}, 'me/net'), ({'depth': 8}, 'me/net'), ({'revision': 'half'}, 'me/net@half')])
def test_the_snippet_of_a_card_prints_a_label(folder, tmp_path, monkeypatch, capsys, options, source):
    """Catches a snippet that does not run, prints numbers, or loads another branch than the one it lies on."""
    monkeypatch.chdir(tmp_path)
    config = json.loads((folder / 'config.json').read_bytes())
    write_json(folder / 'config.json', config | {'label_names': [f'Katze {i}' for i in range(10)]})
    timm_ddnn.push_to_hub(folder, 'me/net', dry_run=True, **options)
    names = run_snippet(tmp_path / 'output/hub/me--net', source)
    assert re.fullmatch(r'Katze \d: \d+\.\d%\n', capsys.readouterr().out)
    assert names['probabilities'].sum() == pytest.approx(1)
    assert ('plain' in names) == ('depth' not in options)


def test_what_people_wrote_on_a_card_stays():
    """Catches a new publication that puts its questions in the place of the answers."""
    card = '# New\n\n## Intended use\n\n?\n\n## Limits\n\n?\n\n## Training\n\nnew\n'
    published = '# Old\n\n## Limits\n\nNot at \\g<0> night.\n\n## Training\n\nold\n'
    assert keep_written(card, published) == card.replace('Limits\n\n?', 'Limits\n\nNot at \\g<0> night.')
    assert keep_written(card, '') == card


@pytest.mark.parametrize(('arguments', 'message'), [
    (['nowhere', 'me/net'], 'source must be a model or the output folder of a run, got nowhere'),
    (['{folder}', 'net'], "repo_id must be 'owner/name', got 'net'"),
    (['{folder}', 'me/a b'], "repo_id must be 'owner/name', got 'me/a b'"),
    (['{folder}', 'me/a/b'], "repo_id must be 'owner/name', got 'me/a/b'"),
    (['{folder}', 'me/net', '--depth', '9'], 'depth must be one of (20, 14, 8)'),
    (['{folder}', 'me/net', '--license', 'My Own'], "license must be the Hub's identifier, such as 'apache-2.0'"),
])
def test_wrong_arguments_of_push_are_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    """Catches tracebacks, and files that are left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(['push', *(argument.format(folder=folder) for argument in arguments), '--dry-run'])
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not Path('output').exists()


def test_depths_that_are_not_trained_are_not_published(tmp_path, monkeypatch):
    """Catches statistics that are copies of the full-net's, published as a model."""
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.add_subnet((3, 2, 2))
    with pytest.raises(ValueError, match=r'depths \[.*\] are not trained'):
        timm_ddnn.push_to_hub(model, 'me/net', dry_run=True)
    assert timm_ddnn.push_to_hub(model, 'me/net', depth=8, dry_run=True).files.keys() >= {'model.safetensors'}


@pytest.mark.slow
def test_a_card_is_utf_8_whatever_the_locale(folder, tmp_path):
    """Catches files that are written, or read, in the encoding of the machine."""
    write_json(folder / 'summary.json', summary_of(arguments={'dataset': 'crème/кот'}))
    config = json.loads((folder / 'config.json').read_bytes())
    config['label_names'] = [f'crème {i}' for i in range(10)]
    (folder / 'config.json').write_text(json.dumps(config, ensure_ascii=False), encoding='utf-8')
    subprocess.run(
        [sys.executable, '-c', f'import timm_ddnn; timm_ddnn.push_to_hub({str(folder)!r}, "me/net", dry_run=True)'],
        cwd=tmp_path, check=True, timeout=200,
        env={**os.environ, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'PYTHONPATH': str(ROOT)},
    )
    target = tmp_path / 'output/hub/me--net'
    assert '- data: crème/кот, 5,000' in (target / 'README.md').read_text(encoding='utf-8')
    assert json.loads((target / 'config.json').read_bytes())['label_names'] == config['label_names']
