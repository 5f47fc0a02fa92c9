"""Publishing on the Hub and loading from it: by the real client, against a server on 127.0.0.1."""
import math
import multiprocessing
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from helpers import hub_server
from helpers.hub_server import child
from helpers.small_models import IMAGES, logits, make_model, save
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_ddnn
from timm_ddnn.hub import publish
from timm_ddnn.models.load import create_ddnn, saved_results
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.modules import state_dict_sha256
from timm_ddnn.weights import download
from timm_ddnn.weights.download import fetch

hub, client = hub_server.hub, hub_server.client  # fixtures
NET = 'tests/net'
WEIGHTS = 'GET /storage/'  # its files are the large ones


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Folders of two models that differ in their weights alone."""
    folder = tmp_path_factory.mktemp('saved')
    return save(make_model(), folder / 'net'), save(make_model(seed=1), folder / 'other')


@pytest.fixture
def folder(saved):
    return saved[0]


@pytest.fixture
def published(hub, client, folder):
    """A model on the Hub that was put there without the library's publication."""
    hub.publish(NET, {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')})
    return hub


def load(name=f'hf-hub:{NET}', **kwargs):
    return timm.create_model(name, pretrained=True, **kwargs).eval()


def outputs(model):
    with torch.inference_mode():
        return {d: model(IMAGES, depth=d) for d in model.depths}


def same(model, seed=0):
    expected, found = logits(make_model(seed=seed)), outputs(model)
    return found.keys() == expected.keys() and all(torch.equal(found[d], expected[d]) for d in expected)


def use_cache(monkeypatch, path):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(path))


def blob():
    """The weights in the cache."""
    found, = (path for path in Path(constants.HF_HUB_CACHE).glob('*/blobs/*') if path.stat().st_size > 10_000)
    return found


def damage(path, at=9000):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def commits(hub, repo_id=NET):
    return [r for r in hub.seen(f'POST /api/models/{repo_id}/commit') if r.status == 200]


def test_what_is_published_loads_with_equal_logits_at_every_depth(hub, client, saved, tmp_path, monkeypatch):
    """Catches a file that is missing or differs, a second commit of the same content, a revision that is not kept."""
    monkeypatch.chdir(tmp_path)
    folder, other = saved
    weights = [f'other{suffix}' for suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.safetensors')]
    hub.publish(NET, dict.fromkeys([*weights, 'notes.txt', 'sub/other.safetensors'], b'1'))
    dry = timm_ddnn.push_to_hub(folder, NET, dry_run=True)
    first = timm_ddnn.push_to_hub(folder, NET)
    again = timm_ddnn.push_to_hub(folder, NET)
    second = timm_ddnn.push_to_hub(other, NET)
    timm_ddnn.push_to_hub(folder, NET, revision='trial')
    timm_ddnn.push_to_hub(folder, 'tests/hidden', private=True)
    assert hub.repos['tests/hidden'].private and not hub.repos[NET].private
    assert dry.commit is None
    assert first.commit == again.commit != second.commit
    assert len(commits(hub)) == 3
    files = {'README.md', 'config.json', 'model.safetensors'}
    assert set(first.files) == set(dry.files) == files
    assert set(hub.repos[NET].resolve('main').files) == {
        *files, 'notes.txt', 'sub/other.safetensors', '.gitattributes'}

    use_cache(monkeypatch, tmp_path / 'empty')
    for revision, seed in ((f'@{first.commit}', 0), ('', 1), ('@trial', 0)):
        model = load(f'hf-hub:{NET}{revision}')
        assert same(model, seed)
        assert model.trained_depths == model.depths == (20, 14, 8)
        assert [row['top1'] for row in saved_results(model)] == [70.0, 71.0, 72.0]
        assert not torch.equal(outputs(model)[20], outputs(model)[8])
        assert model.base_models == [NET]


def test_what_people_wrote_on_the_card_stays(hub, client, saved):
    """Catches a publication that overwrites answers by questions, or commits the same again because of them."""
    timm_ddnn.push_to_hub(saved[0], NET)
    card = hub.repos[NET].contents()['README.md'].decode()
    written = re.sub('(?s)## Limits.*?## Training', '## Limits\n\nNever at night: é.\n\n## Training', card)
    hub.publish(NET, {**hub.repos[NET].contents(), 'README.md': written.encode()})
    timm_ddnn.push_to_hub(saved[0], NET)
    assert not commits(hub)[1:] and hub.repos[NET].contents()['README.md'].decode() == written
    publication = timm_ddnn.push_to_hub(saved[1], NET)
    kept = hub.repos[NET].contents()['README.md']
    assert '\n\nNever at night: é.\n\n## Training' in kept.decode() and kept.decode() != written
    assert publication.files['README.md'] == len(kept)


def test_one_read_of_the_configuration_makes_a_model(published, monkeypatch):
    """Catches a config.json that is asked for again after it was read, which may be of another commit by then."""
    create_ddnn(f'hf-hub:{NET}', pretrained=True)
    assert len(published.seen('GET .*config.json')) == len(published.seen('HEAD .*config.json')) == 1


def test_a_connection_that_is_reset_is_an_oserror(monkeypatch):
    """Catches an error of the client that is none of those that `fetch` promises, a traceback for commands."""
    def reset(**kwargs):
        raise HTTPError('Connection reset by peer')
    monkeypatch.setattr('timm_ddnn.weights.download.hf_hub_download', reset)
    with pytest.raises(OSError, match=r'config\.json of me/net cannot be downloaded: Connection reset by peer'):
        fetch('me/net', 'config.json')


@pytest.mark.slow
def test_one_depth_is_a_stock_timm_repository(hub, client, tmp_path):
    """Catches a repository that needs this library, or holds the weights of another depth."""
    model = make_model('ddnn_resnet50', channels=(8, 8, 16, 16))
    timm_ddnn.push_to_hub(save(model, tmp_path / 'net'), 'tests/resnet26', depth=26)
    result = child(hub, textwrap.dedent(f"""
        import sys, timm, torch
        model = timm.create_model('hf-hub:tests/resnet26', pretrained=True).eval()
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.save(model(images), {str(tmp_path / "out.pt")!r})
        print(type(model).__module__, 'timm_ddnn' in sys.modules, model.pretrained_cfg['architecture'])
    """), timeout=280)
    assert result.stdout.split() == ['timm.models.resnet', 'False', 'resnet26'], result.stderr
    assert torch.equal(torch.load(tmp_path / 'out.pt'), logits(model)[26])


def test_the_checksum_of_a_state_is_of_its_names_and_values():
    """Catches another net that passes for the same, and weights that cannot be written as safetensors."""
    model, other = make_model(), make_model()
    assert state_dict_sha256(model) == state_dict_sha256(other.to(memory_format=torch.channels_last))
    other.get_classifier().bias.data[0] += 1
    assert state_dict_sha256(model) != state_dict_sha256(other)
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)
    assert len({state_dict_sha256(tied), state_dict_sha256(tied[:1]), state_dict_sha256(tied.bfloat16())}) == 3


@pytest.mark.slow
def test_transformers_run_what_is_published(hub, client, folder, tmp_path):
    """Catches a config.json that timm reads and the TimmWrapper of transformers does not."""
    pytest.importorskip('transformers')
    Image.new('RGB', (40, 40), (200, 30, 90)).save(tmp_path / 'photo.png')
    timm_ddnn.push_to_hub(folder, NET)
    result = child(hub, f"""
import timm, timm_ddnn, torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
photo = Image.open({str(tmp_path / 'photo.png')!r})
model = timm.create_model('hf-hub:{NET}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
expected = model(transform(photo)[None]).softmax(-1)[0]
best = pipeline('image-classification', model={NET!r})(photo)[0]
print(best['label'] == f'class {{expected.argmax()}}', abs(best['score'] - expected.max().item()) < 1e-5)
wrapped = AutoModelForImageClassification.from_pretrained({NET!r}).eval()
print(all(torch.equal(wrapped.timm_model(images, depth=d), model(images, depth=d)) for d in model.depths))
    """, timeout=280, OMP_NUM_THREADS='1')
    assert result.stdout.split() == ['True'] * 3, result.stderr


def test_interrupted_publication_leaves_the_old_revision_whole(published, saved):
    """Catches a publication in several commits."""
    before = published.repos[NET].resolve('main').files
    published.fail(f'POST /api/models/{NET}/commit', 500, times=math.inf)
    with pytest.raises(OSError, match=f'{NET} cannot be published: .*500') as error:
        timm_ddnn.push_to_hub(saved[1], NET)
    assert published.token not in str(error.value)
    assert published.repos[NET].resolve('main').files == before


def test_a_flipped_byte_is_caught_named_and_fetched_again(published, tmp_path, monkeypatch, caplog):
    """Catches damage on the way or in the cache that loads, and damage that stays in the cache."""
    published.flip(WEIGHTS, at=5000)
    assert same(load())
    damage(blob())
    assert same(load())
    assert caplog.text.count(f'model.safetensors of {NET} is damaged') == 2

    published.flip(WEIGHTS, at=5000, times=math.inf)
    use_cache(monkeypatch, tmp_path / 'other')
    with pytest.raises(OSError, match=rf'model\.safetensors of {NET} came damaged twice'):
        load()
    assert not [path for path in (tmp_path / 'other').glob('*/blobs/*') if path.stat().st_size > 10_000]


def test_a_checksum_that_is_not_the_published_one_is_caught(published, folder, tmp_path):
    """Catches weights that the server holds and announces, and that are not those which were published."""
    weights = load_file(folder / 'model.safetensors')
    weights['fc.bias'] += 1
    save_file(weights, tmp_path / 'model.safetensors')
    published.publish(NET, {'model.safetensors': (tmp_path / 'model.safetensors').read_bytes()})
    with pytest.raises(OSError, match=rf'model\.safetensors of {NET} came damaged twice'):
        load()


def test_offline(published, monkeypatch):
    """Catches a load that asks the network for what the cache has, and an error that does not say what is missing."""
    load()
    requests = len(published.requests)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert same(load())
    with pytest.raises(LocalEntryNotFoundError, match=r'config\.json of tests/other is not in the cache'):
        load('hf-hub:tests/other')
    damage(blob())
    with pytest.raises(OSError, match=r'model\.safetensors of .* is damaged .* HF_HUB_OFFLINE is set'):
        load()
    assert len(published.requests) == requests


def test_errors_of_the_network_and_of_access(published, folder, monkeypatch):
    """Catches a load that gives up on what passes, and messages that do not name what is wrong, or name the token."""
    size = (folder / 'model.safetensors').stat().st_size
    published.cut(WEIGHTS, after=size // 2)
    published.fail('(GET|HEAD) .*model.safetensors', 429, retry_after=1)
    published.fail('(GET|HEAD) .*model.safetensors', 503)
    published.publish('tests/private', {'config.json': b'{}'}, private=True)
    assert load().depths == (20, 14, 8)
    with pytest.raises(OSError, match='tests/missing'):
        load('hf-hub:tests/missing')
    with pytest.raises(OSError, match='nowhere'):
        load(f'hf-hub:{NET}@nowhere')
    for token in ('hf_wrong', None):
        monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
        with pytest.raises(OSError, match='tests/private') as error:
            load('hf-hub:tests/private')
        assert 'hf_wrong' not in str(error.value)


def test_files_that_xet_left_in_the_cache_load(published, monkeypatch):
    """Catches the name of a Xet file taken for a SHA-256: there the link to a blob leads to a further link."""
    load()
    found = blob()
    stored = found.parent / ('0' * 64)
    found.rename(stored)
    found.symlink_to(stored)
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert load().depths == (20, 14, 8)
    damage(stored)
    with pytest.raises(OSError, match=r'model\.safetensors .* is damaged'):
        load()


@pytest.mark.parametrize('change', [
    lambda content: content.replace(b'0.4914', b'0.4915'), lambda content: b'!' + content[1:], lambda content: b'',
    lambda content: b'\xff' + content,
], ids=['value', 'syntax', 'empty', 'encoding'])
@pytest.mark.parametrize('create', [timm.create_model, create_ddnn])
def test_a_damaged_configuration_is_repaired_and_not_used(published, caplog, create, change):
    """Catches a damaged config.json in the cache that timm reads before this library verifies it, and that stays."""
    load()
    config, = Path(constants.HF_HUB_CACHE).glob('*/snapshots/*/config.json')
    content = config.read_bytes()
    config.resolve().write_bytes(change(content))
    assert create(f'hf-hub:{NET}', pretrained=True).pretrained_cfg['mean'][0] == 0.4914
    assert f'config.json of {NET} is damaged in the cache' in caplog.text
    assert config.read_bytes() == content


def test_a_damaged_configuration_is_named_offline(published, monkeypatch):
    """Catches a JSONDecodeError where the cache is damaged and the Hub is not there to repair it."""
    load()
    config, = Path(constants.HF_HUB_CACHE).glob('*/snapshots/*/config.json')
    config.resolve().write_bytes(b'!')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(OSError, match=rf'config\.json of {NET} is damaged .* HF_HUB_OFFLINE is set'):
        load()


def test_configurations_of_other_architectures_pass_through(hub, client, tmp_path):
    """Catches a change of what timm itself loads: its result must be that of timm's own reader."""
    original = timm.models._hub
    model = timm.create_model('resnet18', num_classes=3)
    timm.models.save_for_hf(model, tmp_path / 'net', safe_serialization=True, model_config={'label_names': ['a'] * 3})
    hub.publish('tests/stock', {path.name: path.read_bytes() for path in (tmp_path / 'net').iterdir()})
    for source, name, expected in (
        ('local-dir', str(tmp_path / 'net'), original.load_model_config_from_path(tmp_path / 'net')),
        ('hf-hub', 'tests/stock', original.load_model_config_from_hf('tests/stock')),
    ):
        found = timm.models._factory._resolve_model_source(f'{source}:{name}', None, {})
        assert found == (expected[1], expected[0], {'pretrained_model_args': expected[2], **expected[2]})
        loaded = timm.create_model(f'{source}:{name}', pretrained=True)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_weights_are_of_the_commit_of_their_configuration(published, saved, monkeypatch):
    """Catches a publication between two downloads, whose weights would not be those that config.json promises."""
    def publish_after(*args, **kwargs):
        found = fetch(*args, **kwargs)
        monkeypatch.setattr(download, 'fetch', fetch)
        timm_ddnn.push_to_hub(saved[1], NET)
        return found
    monkeypatch.setattr(download, 'fetch', publish_after)
    assert same(load())
    assert same(load(), seed=1)
    assert len(commits(published)) == 1


def test_weights_of_a_tag_load_offline_without_a_configuration(published, monkeypatch):
    """Catches a tag that needs offline what timm alone does not put into the cache."""
    hf_hub_download(NET, 'model.safetensors')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    assert same(load('ddnn_resnet20', pretrained_cfg_overlay=dict(hf_hub_id=NET), channels=(4, 8, 16)))
    assert not published.seen('config.json')


def test_two_downloads_at_once(published):
    """Catches processes that spoil each other's file in the cache."""
    published.slow(WEIGHTS, seconds=1, at=3000, times=2)
    processes = multiprocessing.get_context('fork')
    sums = processes.Queue()
    both = [processes.Process(target=lambda: sums.put(state_dict_sha256(load()))) for _ in range(2)]
    for process in both:
        process.start()
    assert [sums.get(timeout=60) for _ in both] == [state_dict_sha256(make_model())] * 2
    for process in both:
        process.join()


def test_pickle_is_never_loaded(hub, client, folder, tmp_path):
    """Catches weights from pickle, beside safetensors or in their place, from the Hub or from a folder."""
    trap, mark = tmp_path / 'trap.bin', tmp_path / 'mark'
    code = f'import pathlib; pathlib.Path({str(mark)!r}).touch()'
    trap.write_bytes(b'c' + b'builtins\nexec\n(V' + code.encode() + b'\ntR.')
    subprocess.run([sys.executable, '-c', f'import pickle; pickle.load(open({str(trap)!r}, "rb"))'], check=True)
    mark.unlink()  # it works
    config = (folder / 'config.json').read_bytes()
    hub.publish('tests/pickle', {'config.json': config, 'pytorch_model.bin': trap.read_bytes()})
    both = {'pytorch_model.bin': trap.read_bytes(), 'model.safetensors': (folder / 'model.safetensors').read_bytes()}
    hub.publish('tests/both', {'config.json': config, **both})
    (tmp_path / 'local').mkdir()
    (tmp_path / 'local' / 'config.json').write_bytes(config)
    (tmp_path / 'local' / 'pytorch_model.bin').write_bytes(trap.read_bytes())
    with pytest.raises(FileNotFoundError, match=r'tests/pickle has no model\.safetensors'):
        load('hf-hub:tests/pickle')
    with pytest.raises(FileNotFoundError, match=r'weights must be in model\.safetensors'):
        load(f'local-dir:{tmp_path / "local"}')
    with pytest.raises(InputError, match='is not a file of weights'):
        create_ddnn('ddnn_resnet20', checkpoint_path=str(trap))
    assert load('hf-hub:tests/both').depths == (20, 14, 8)
    assert not mark.exists()
    assert not hub.seen(r'pytorch_model\.bin')


@pytest.mark.parametrize(('variable', 'value', 'message'), [
    ('SSL_CERT_FILE', '/nowhere/certificates.pem', r"SSL_CERT_FILE must be a file, got '/nowhere/certificates\.pem'"),
    ('ALL_PROXY', 'socks5://user:secret@127.0.0.1:9', r"ALL_PROXY names a SOCKS proxy, .*: pip install 'httpx\[socks"),
    ('https_proxy', 'http://user:secret@127.0.0.1:none', r'HTTPS_PROXY must be as http://host:port'),
    ('HTTP_PROXY', 'secret:::', r'HTTP_PROXY must be as http://host:port'),
    ('HF_TOKEN', '“secret”', r'the token of HF_TOKEN .* must be plain ASCII'),
    ('HF_TOKEN', 'sec\tret', r'the token of HF_TOKEN .* must be plain ASCII'),
])
def test_a_wrong_environment_is_named(published, folder, monkeypatch, variable, value, message):
    """Catches errors of the client that do not say which variable is wrong, and messages that show a password."""
    monkeypatch.setenv(variable, value)
    for call in (lambda: fetch(NET, 'config.json'), lambda: timm_ddnn.push_to_hub(folder, NET)):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert 'secret' not in str(error.value) and 'sec\t' not in str(error.value)


@pytest.mark.parametrize('proxy', ['http://127.0.0.1:9', 'http://a:b@host', '127.0.0.1:9', 'https://[::1]:8/'])
def test_proxies_that_can_be_right_are_let_through(monkeypatch, proxy):
    """Catches a check that refuses what the client takes."""
    monkeypatch.setenv('HTTPS_PROXY', proxy)
    download.check_client()


def test_private_is_not_public(published, folder):
    """Catches what was meant to be private in a repository that is public."""
    before = published.repos[NET].resolve('main')
    with pytest.raises(InputError, match=f'{NET} must be private, got a public repository'):
        timm_ddnn.push_to_hub(folder, NET, private=True, revision='trial')
    assert published.repos[NET].resolve('main') is before and list(published.repos[NET].branches) == ['main']
    published.repos[NET].private = True
    assert timm_ddnn.push_to_hub(folder, NET, private=True).commit


@pytest.mark.parametrize('token', ['hf_wrong', None])
def test_unchanged_content_needs_a_token_too(hub, client, folder, monkeypatch, token):
    """Catches a push that is called done though nobody was let in, because nothing was to be sent."""
    timm_ddnn.push_to_hub(folder, NET)
    monkeypatch.setenv('HF_TOKEN', token) if token else monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(OSError, match=r'[Tt]oken') as error:
        timm_ddnn.push_to_hub(folder, NET)
    assert 'hf_wrong' not in str(error.value)
    assert len(commits(hub)) == 1


@pytest.mark.parametrize('same_content', [True, False])
def test_two_pushes_at_once(hub, client, saved, monkeypatch, same_content):
    """Catches a push that fails because another has just published the same, and one that overwrites another's."""
    create_commit = publish.HfApi.create_commit

    def after_another(api, *args, **kwargs):
        monkeypatch.setattr(publish.HfApi, 'create_commit', create_commit)
        others.append(timm_ddnn.push_to_hub(saved[0], NET))
        return create_commit(api, *args, **kwargs)

    others = []
    monkeypatch.setattr(publish.HfApi, 'create_commit', after_another)
    if same_content:
        assert timm_ddnn.push_to_hub(saved[0], NET).commit == others[0].commit
    else:
        with pytest.raises(OSError, match='another commit was made at the same time'):
            timm_ddnn.push_to_hub(saved[1], NET)
    assert hub.repos[NET].resolve('main').oid == others[0].commit
    assert len(commits(hub)) == 1
