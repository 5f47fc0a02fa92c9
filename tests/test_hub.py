"""Publishing on the Hub and loading from it: by the real client, against a server on 127.0.0.1."""
import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import hub_server
import pytest
import torch
from hub_server import child
from huggingface_hub.errors import HTTPError
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import logits, make_model, save

from timm_ddnn.utils.modules import state_dict_sha256
from timm_ddnn.weights.download import fetch

hub = hub_server.hub  # the fixture
NET = 'tests/net'
WEIGHTS = 'GET /storage/'  # its files are the large ones


@pytest.fixture
def folder(tmp_path):
    return save(make_model(), tmp_path / 'net')


@pytest.fixture
def published(hub, folder):
    """A model on the Hub that was put there without the library's publication."""
    hub.publish(NET, {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')})
    return hub


def run(hub, code, **env):
    """Run code after the usual imports, in a process that takes `hub` for the Hub. -> its output"""
    header = textwrap.dedent("""
        import sys, timm, timm_ddnn, torch
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        def load(name, **kwargs):
            return timm.create_model(name, pretrained=True, **kwargs).eval()
        def failure(call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except Exception as e:
                print(type(e).__name__, ' '.join(str(e).split()))
            else:
                print('no error')
    """)
    result = child(hub, header + textwrap.dedent(code), timeout=280, OMP_NUM_THREADS='1', **env)
    assert result.returncode == 0, result.stderr
    assert hub.token not in result.stdout + result.stderr
    return result


def commits(hub, repo_id=NET):
    return [r for r in hub.seen(f'POST /api/models/{repo_id}/commit') if r.status == 200]


def test_what_is_published_loads_with_equal_logits_at_every_depth(hub, folder, tmp_path):
    """Catches a file that is missing or differs, a second commit of the same content, a revision that is not kept."""
    weights = [f'other{suffix}' for suffix in ('.bin', '.pt', '.pth', '.ckpt', '.pkl', '.safetensors')]
    hub.publish(NET, dict.fromkeys([*weights, 'notes.txt', 'sub/other.safetensors'], b'1'))
    other = save(make_model(seed=1), tmp_path / 'other')
    result = run(hub, f"""
        import json, os
        os.chdir({str(tmp_path)!r})
        dry = timm_ddnn.push_to_hub({str(folder)!r}, {NET!r}, dry_run=True)
        first = timm_ddnn.push_to_hub({str(folder)!r}, {NET!r})
        again = timm_ddnn.push_to_hub({str(folder)!r}, {NET!r})
        second = timm_ddnn.push_to_hub({str(other)!r}, {NET!r})
        branch = timm_ddnn.push_to_hub({str(folder)!r}, {NET!r}, revision='trial')
        timm_ddnn.push_to_hub({str(folder)!r}, 'tests/hidden', private=True)
        print(json.dumps([dry, first, again, second, branch]))
    """)
    assert hub.repos['tests/hidden'].private and not hub.repos[NET].private
    dry, first, again, second, _ = json.loads(result.stdout.splitlines()[-1])
    assert dry[1] is None
    assert first[1] == again[1] != second[1]
    assert len(commits(hub)) == 3
    files = {'README.md', 'accuracy.png', 'config.json', 'model.safetensors'}
    assert set(first[2]) == set(dry[2]) == files
    assert set(hub.repos[NET].resolve('main').files) == {
        *files, 'notes.txt', 'sub/other.safetensors', '.gitattributes'}

    run(hub, f"""
        for name in ({NET!r} + '@' + {first[1]!r}, {NET!r}, {NET!r} + '@trial'):
            model = load('hf-hub:' + name)
            with torch.inference_mode():
                out = {{d: model(images, depth=d) for d in model.depths}}
            torch.save([out, model.trained_depths], {str(tmp_path)!r} + '/' + name[-3:] + '.pt')
    """, HF_HOME=tmp_path / 'empty')
    for name, seed in ((first[1][-3:], 0), (NET[-3:], 1), ('ial', 0)):
        out, trained = torch.load(tmp_path / f'{name}.pt')
        expected = logits(make_model(seed=seed))
        assert trained == tuple(expected) == (20, 14, 8)
        assert all(torch.equal(out[d], expected[d]) for d in expected)
        assert not torch.equal(out[20], out[8])


def test_a_connection_that_is_reset_is_an_oserror(monkeypatch):
    """Catches an error of the client that is none of those that `fetch` promises, a traceback for commands."""
    def reset(**kwargs):
        raise HTTPError('Connection reset by peer')
    monkeypatch.setattr('timm_ddnn.weights.download.hf_hub_download', reset)
    with pytest.raises(OSError, match=r'config\.json of me/net cannot be downloaded: Connection reset by peer'):
        fetch('me/net', 'config.json')


def test_one_depth_is_a_stock_timm_repository(hub, tmp_path):
    """Catches a repository that needs this library, or holds the weights of another depth."""
    model = make_model('ddnn_resnet50', channels=(8, 8, 16, 16))
    folder = save(model, tmp_path / 'net')
    run(hub, f'print(timm_ddnn.push_to_hub({str(folder)!r}, "tests/resnet26", depth=26))')
    result = child(hub, textwrap.dedent(f"""
        import sys, timm, torch
        model = timm.create_model('hf-hub:tests/resnet26', pretrained=True).eval()
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            torch.save(model(images), {str(tmp_path / "out.pt")!r})
        print(type(model).__module__, 'timm_ddnn' in sys.modules, model.pretrained_cfg['architecture'])
    """), timeout=280, HF_HOME=tmp_path / 'empty')
    assert result.stdout.split() == ['timm.models.resnet', 'False', 'resnet26'], result.stderr
    assert torch.equal(torch.load(tmp_path / 'out.pt'), logits(model)[26])


def test_the_sum_of_a_state_is_of_its_names_and_values():
    """Catches another net that passes for the same, and weights that cannot be written as safetensors."""
    model, other = make_model(), make_model()
    assert state_dict_sha256(model) == state_dict_sha256(other.to(memory_format=torch.channels_last))
    other.get_classifier().bias.data[0] += 1
    assert state_dict_sha256(model) != state_dict_sha256(other)
    tied = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)
    assert len({state_dict_sha256(tied), state_dict_sha256(tied[:1]), state_dict_sha256(tied.bfloat16())}) == 3


@pytest.mark.slow
def test_transformers_run_what_is_published(hub, folder, tmp_path):
    """Catches a config.json that timm reads and the TimmWrapper of transformers does not."""
    pytest.importorskip('transformers')
    Image.new('RGB', (40, 40), (200, 30, 90)).save(tmp_path / 'photo.png')
    result = run(hub, f"""
        from PIL import Image
        from transformers import AutoModelForImageClassification, pipeline
        timm_ddnn.push_to_hub({str(folder)!r}, {NET!r})
        photo = Image.open({str(tmp_path / 'photo.png')!r})
        model = load('hf-hub:{NET}')
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        expected = model(transform(photo)[None]).softmax(-1)[0]
        best = pipeline('image-classification', model={NET!r})(photo)[0]
        print(best['label'] == f'class {{expected.argmax()}}', abs(best['score'] - expected.max().item()) < 1e-5)
        wrapped = AutoModelForImageClassification.from_pretrained({NET!r}).eval()
        print(all(torch.equal(wrapped.timm_model(images, depth=d), model(images, depth=d)) for d in model.depths))
    """)
    assert result.stdout.split() == ['True'] * 3


def test_interrupted_publication_leaves_the_old_revision_whole(published, tmp_path):
    """Catches a publication in several commits."""
    before = published.repos[NET].resolve('main').files
    other = save(make_model(seed=1), tmp_path / 'other')
    published.fail(f'POST /api/models/{NET}/commit', 500, times=math.inf)
    result = run(published, f'failure(timm_ddnn.push_to_hub, {str(other)!r}, {NET!r})')
    assert '500' in result.stdout
    assert published.repos[NET].resolve('main').files == before


def test_a_flipped_byte_is_caught_named_and_fetched_again(published, tmp_path):
    """Catches damage on the way or in the cache that loads, and damage that stays in the cache."""
    published.flip(WEIGHTS, at=5000)
    result = run(published, f"""
        import os
        from pathlib import Path
        model = load('hf-hub:{NET}')
        torch.save(model(images), {str(tmp_path / "first.pt")!r})
        blob, = [p for p in Path(os.environ['HF_HOME']).glob('hub/*/blobs/*') if p.stat().st_size > 10_000]
        content = bytearray(blob.read_bytes())
        content[9000] ^= 1
        blob.write_bytes(content)
        torch.save(load('hf-hub:{NET}')(images), {str(tmp_path / "second.pt")!r})
    """)
    assert result.stderr.count(f'model.safetensors of {NET} is damaged') == 2
    expected = logits(make_model())[20]
    for name in ('first', 'second'):
        assert torch.equal(torch.load(tmp_path / f'{name}.pt'), expected)

    published.flip(WEIGHTS, at=5000, times=math.inf)
    result = run(published, f"""
        import os
        from pathlib import Path
        failure(load, 'hf-hub:{NET}')
        print(len([p for p in Path(os.environ['HF_HOME']).glob('hub/*/blobs/*') if p.stat().st_size > 10_000]))
    """, HF_HOME=tmp_path / 'other')
    message, left = result.stdout.splitlines()
    assert message.startswith(f'OSError model.safetensors of {NET} came damaged twice')
    assert left == '0'


def test_a_hash_that_is_not_the_published_one_is_caught(published, folder):
    """Catches weights that the server holds and announces, and that are not those which were published."""
    weights = load_file(folder / 'model.safetensors')
    weights['fc.bias'] += 1
    save_file(weights, folder / 'model.safetensors')
    published.publish(NET, {'model.safetensors': (folder / 'model.safetensors').read_bytes()})
    result = run(published, f"failure(load, 'hf-hub:{NET}')")
    assert result.stdout.startswith(f'OSError model.safetensors of {NET} came damaged twice')


def test_offline(published, tmp_path):
    """Catches a load that asks the network for what the cache has, and an error that does not say what is missing."""
    run(published, f"load('hf-hub:{NET}')")
    requests = len(published.requests)
    result = run(published, f"""
        import os
        from pathlib import Path
        torch.save(load('hf-hub:{NET}')(images), {str(tmp_path / "out.pt")!r})
        failure(load, 'hf-hub:tests/other')
        blob, = [p for p in Path(os.environ['HF_HOME']).glob('hub/*/blobs/*') if p.stat().st_size > 10_000]
        content = bytearray(blob.read_bytes())
        content[9000] ^= 1
        blob.write_bytes(content)
        failure(load, 'hf-hub:{NET}')
    """, HF_HUB_OFFLINE='1')
    assert torch.equal(torch.load(tmp_path / 'out.pt'), logits(make_model())[20])
    missing, damaged = result.stdout.splitlines()
    assert missing.startswith('LocalEntryNotFoundError')
    assert re.match(r'OSError model.safetensors .* is damaged .* HF_HUB_OFFLINE is set', damaged)
    assert len(published.requests) == requests


def test_errors_of_the_network_and_of_access(published, folder):
    """Catches a load that gives up on what passes, and messages that do not name what is wrong, or name the token."""
    size = (folder / 'model.safetensors').stat().st_size
    published.cut(WEIGHTS, after=size // 2)
    published.fail('(GET|HEAD) .*model.safetensors', 429, retry_after=1)
    published.fail('(GET|HEAD) .*model.safetensors', 503)
    published.publish('tests/private', {'config.json': b'{}'}, private=True)
    result = run(published, f"""
        model = load('hf-hub:{NET}')
        print(model.depths)
        failure(load, 'hf-hub:tests/missing')
        failure(load, 'hf-hub:{NET}@nowhere')
    """)
    first, missing, revision = result.stdout.splitlines()
    assert first == '(20, 14, 8)'
    assert 'tests/missing' in missing
    assert 'nowhere' in revision
    for token in ('hf_wrong', None):
        result = run(published, "failure(load, 'hf-hub:tests/private')", HF_TOKEN=token)
        assert 'tests/private' in result.stdout
        assert 'hf_wrong' not in result.stdout + result.stderr


def test_files_that_xet_left_in_the_cache_load(published, tmp_path):
    """Catches the name of a Xet file taken for a SHA-256: there the link to a blob leads to a further link."""
    run(published, f"load('hf-hub:{NET}')")
    blob = next(path for path in Path(published.home.name).glob('hub/*/blobs/*') if path.stat().st_size > 10_000)
    stored = blob.parent / ('0' * 64)
    blob.rename(stored)
    blob.symlink_to(stored)
    result = run(published, f"""
        print(load('hf-hub:{NET}').depths)
        import pathlib
        content = bytearray(pathlib.Path({str(stored)!r}).read_bytes())
        content[9000] ^= 1
        pathlib.Path({str(stored)!r}).write_bytes(content)
        failure(load, 'hf-hub:{NET}')
    """, HF_HUB_OFFLINE='1')
    depths, damaged = result.stdout.splitlines()
    assert depths == '(20, 14, 8)'
    assert re.match(r'OSError model.safetensors .* is damaged', damaged)


def test_a_damaged_configuration_is_repaired_and_not_used(published):
    """Catches a model of a damaged config.json, which timm reads before this library can verify it."""
    result = run(published, f"""
        import os
        from pathlib import Path
        from timm_ddnn.models.load import create_ddnn
        load('hf-hub:{NET}')
        config, = Path(os.environ['HF_HOME']).glob('hub/*/snapshots/*/config.json')
        content = config.read_text()
        config.resolve().write_text(content.replace('0.4914', '0.4915'))
        failure(load, 'hf-hub:{NET}')
        print(load('hf-hub:{NET}').pretrained_cfg['mean'])
        config.resolve().write_text('!' + content[1:])
        print(create_ddnn('hf-hub:{NET}', pretrained=True).depths)
    """)
    damaged, mean, depths = result.stdout.splitlines()
    assert damaged.startswith(f'OSError config.json of {NET} was damaged in the cache and was downloaded again')
    assert '0.4914' in mean
    assert depths == '(20, 14, 8)'


def test_weights_are_of_the_commit_of_their_configuration(published, tmp_path):
    """Catches a publication between two downloads, whose weights would not be those that config.json promises."""
    other = save(make_model(seed=1), tmp_path / 'other')
    run(published, f"""
        from timm_ddnn.weights import download
        fetch = download._fetch
        def publish_after(*args):
            found = fetch(*args)
            download._fetch = fetch
            timm_ddnn.push_to_hub({str(other)!r}, {NET!r})
            return found
        download._fetch = publish_after
        torch.save(load('hf-hub:{NET}')(images, depth=14), {str(tmp_path / 'old.pt')!r})
        torch.save(load('hf-hub:{NET}')(images, depth=14), {str(tmp_path / 'new.pt')!r})
    """)
    assert len(commits(published)) == 1
    for name, seed in ('old', 0), ('new', 1):
        assert torch.equal(torch.load(tmp_path / f'{name}.pt'), logits(make_model(seed=seed))[14])


def test_weights_of_a_tag_load_offline_without_a_configuration(published, tmp_path):
    """Catches a tag that needs offline what timm alone does not put into the cache."""
    result = run(published, f"""
        import os
        from huggingface_hub import constants, hf_hub_download
        hf_hub_download({NET!r}, 'model.safetensors')
        constants.HF_HUB_OFFLINE = True
        model = timm.create_model('ddnn_resnet20', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id={NET!r}),
                                  channels=(4, 8, 16)).eval()
        with torch.inference_mode():
            torch.save(model(images, depth=8), {str(tmp_path / 'out.pt')!r})
    """)
    assert not published.seen('config.json'), result.stderr
    assert torch.equal(torch.load(tmp_path / 'out.pt'), logits(make_model())[8])


def test_two_downloads_at_once(published, tmp_path):
    """Catches processes that spoil each other's file in the cache."""
    published.slow(WEIGHTS, seconds=2, at=3000, times=2)
    code = f"""
import timm, timm_ddnn, torch
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
model = timm.create_model('hf-hub:{NET}', pretrained=True).eval()
with torch.inference_mode():
    print(model(images, depth=8).sum().item())
"""
    script = tmp_path / 'load.py'
    script.write_text(code)
    both = f"""
import subprocess, sys
processes = [subprocess.Popen([sys.executable, {str(script)!r}], stdout=subprocess.PIPE, text=True) for _ in range(2)]
for process in processes:
    print(process.communicate()[0].strip(), process.returncode)
"""
    result = child(published, both, timeout=280, OMP_NUM_THREADS='1')
    expected = logits(make_model())[8].sum().item()
    assert [line.split() for line in result.stdout.splitlines()] == [[str(expected), '0']] * 2, result.stderr


def test_pickle_is_never_loaded(hub, folder, tmp_path):
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
    result = run(hub, f"""
        failure(load, 'hf-hub:tests/pickle')
        failure(load, 'local-dir:{tmp_path / "local"}')
        print(load('hf-hub:tests/both').depths)
    """)
    remote, local, depths = result.stdout.splitlines()
    assert 'tests/pickle has no model.safetensors' in remote
    assert local.startswith('FileNotFoundError weights must be in model.safetensors')
    assert depths == '(20, 14, 8)'
    assert not mark.exists()
    assert not hub.seen(r'pytorch_model\.bin')
