"""The stand-in for the Hub that tests of publishing and downloading rest on, by the client that the project uses."""
import hashlib
import json
import math
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import hub_server
from helpers.hub_repos import User
from helpers.hub_server import child
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, file_download, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils.sha import git_hash

pytestmark = pytest.mark.slow
hub = hub_server.hub  # the fixture
NET = 'tests/net'
WEIGHTS = bytes(range(256)) * 40
CARD = b'---\nlicense: apache-2.0\n---\n# A net\n'
FILES = {'model.safetensors': WEIGHTS, 'figures/a.png': b'\x89PNG', 'config.json': b'{}', 'README.md': CARD}


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Lets the client run in this process: without Xet, proxies and this machine's token. -> its waits, in seconds"""
    found = []
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    for name, value in dict(HF_HUB_DISABLE_XET=True, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_IMPLICIT_TOKEN=True).items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1000)  # what the client keeps of a download that was cut
    for module in (_http, file_download):
        monkeypatch.setattr(module, 'time', SimpleNamespace(sleep=found.append))
    _http.close_session()
    disable_progress_bars()
    yield found
    enable_progress_bars()
    _http.close_session()


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def folder(tmp_path):
    for path, data in FILES.items():
        file = tmp_path / 'folder' / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / 'folder'


@pytest.fixture
def download(hub, tmp_path):
    """Downloads a file into a cache of its own. -> its bytes"""
    def download(path='model.safetensors', token=False, **kwargs):
        kwargs = {'endpoint': hub.url, 'cache_dir': tmp_path / 'cache', 'token': token, **kwargs}
        return Path(hf_hub_download(NET, path, **kwargs)).read_bytes()
    return download


def blobs(tmp_path):
    return sorted(file.name for file in (tmp_path / 'cache').glob('*/blobs/*'))


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def commit(hub, *changes):
    """A commit as the client would not make it."""
    header = {'key': 'header', 'value': {'summary': 'by hand', 'description': ''}}
    url, body = f'{hub.url}/api/models/{NET}/commit/main', '\n'.join(map(json.dumps, (header, *changes))).encode()
    request = urllib.request.Request(url, body, {'Authorization': f'Bearer {hub.token}'})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def test_what_was_uploaded_is_listed_and_downloaded(hub, api, folder, download, tmp_path):
    """Catches hashes that are not git's and LFS's, files of the wrong kind, and a token that goes to the storage."""
    assert api.create_repo(NET, exist_ok=True).repo_id == NET
    first = api.upload_folder(repo_id=NET, folder_path=folder).oid
    assert {path: data for path, data in hub.repos[NET].contents().items() if path != '.gitattributes'} == FILES
    info = api.model_info(NET, files_metadata=True)
    assert info.sha == first != api.list_repo_commits(NET)[1].commit_id
    assert [c.title for c in api.list_repo_commits(NET)] == ['Upload folder using huggingface_hub', 'initial commit']
    found = {file.rfilename: file for file in info.siblings}
    assert {path: found[path].size for path in FILES} == {path: len(data) for path, data in FILES.items()}
    assert found['model.safetensors'].lfs.sha256 == sha256(WEIGHTS)
    assert found['config.json'].lfs is None
    assert found['config.json'].blob_id == git_hash(b'{}')
    assert sorted(api.list_repo_files(NET)) == sorted([*FILES, '.gitattributes'])
    assert {entry.path for entry in api.list_repo_tree(NET)} == {'figures', *found} - {'figures/a.png'}
    assert [entry.path for entry in api.list_repo_tree(NET, 'figures')] == ['figures/a.png']
    (weights,) = api.get_paths_info(NET, ['model.safetensors', 'none.txt'])
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), sha256(WEIGHTS))
    for path, data in FILES.items():
        assert download(path, token=hub.token) == data
    assert blobs(tmp_path) == sorted([sha256(WEIGHTS), sha256(b'\x89PNG'), git_hash(b'{}'), git_hash(CARD)])
    assert len(hub.seen('^PUT /storage/.* 200')) == len(hub.seen('^GET /storage/.* 200')) == 2
    assert not any(request.token for request in hub.seen('/storage/'))
    assert all(request.token for request in hub.seen('/api/|/resolve/'))
    assert hub.token not in str(hub.requests)


def test_same_content_makes_no_commit_and_old_revisions_stay(hub, api, folder, download):
    """Catches an upload of what is already there, and a revision that changes with the branch."""
    api.create_repo(NET)
    first = api.upload_folder(repo_id=NET, folder_path=folder).oid
    hub.requests.clear()
    assert api.upload_folder(repo_id=NET, folder_path=folder).oid == first
    assert not hub.seen('/commit/|^PUT')
    (folder / 'model.safetensors').write_bytes(WEIGHTS[::-1])
    second = api.upload_folder(repo_id=NET, folder_path=folder).oid
    assert second != first
    assert len(hub.seen('/commit/main 200')) == len(hub.seen('^PUT .* 200')) == 1
    assert download() == WEIGHTS[::-1]
    assert download(revision=first) == WEIGHTS
    assert api.model_info(NET, revision=first).sha == first
    third = commit(hub)['commitOid']  # the client never sends this, but the Hub takes an empty commit
    assert third != second
    assert hub.repos[NET].contents(third) == hub.repos[NET].contents(second)


def test_commit_is_all_or_nothing(hub, api):
    """Catches a commit on top of one that its author has not seen, and half of a commit that fails."""
    hub.publish(NET, {'a.txt': b'a', 'old/b.txt': b'b', 'old/c.txt': b'c'})
    first = api.model_info(NET).sha
    add, refused = CommitOperationAdd('new.txt', b'new'), dict(repo_id=NET, commit_message='refused')
    with pytest.raises(RemoteEntryNotFoundError, match=r'missing\.txt'):
        api.create_commit(operations=[add, CommitOperationDelete('missing.txt')], **refused)
    with pytest.raises(HfHubHTTPError, match='412'):
        api.create_commit(operations=[add], parent_commit=hub.repos[NET].resolve().parent.oid, **refused)
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(operations=[add], revision='missing', **refused)
    hub.fail('POST .*/commit/', 500)
    weights = CommitOperationAdd('model.safetensors', WEIGHTS)
    with pytest.raises(HfHubHTTPError, match='500'):  # the client does not try a commit again
        api.create_commit(operations=[weights, add], **refused)
    assert api.model_info(NET).sha == first
    assert len(hub.seen('^PUT .* 200')) == 1
    gone = [CommitOperationDelete('a.txt'), CommitOperationDelete('old/')]
    api.create_commit(NET, [weights, add, *gone], commit_message='taken', parent_commit=first)
    assert hub.repos[NET].contents().keys() == {'.gitattributes', 'model.safetensors', 'new.txt'}
    assert len(hub.seen('^PUT .* 200')) == 1  # the weights were there already


def test_download_resumes_after_a_cut(hub, download, waits, tmp_path):
    """Catches a range that is off by one, and a cut that strikes too often."""
    hub.publish(NET, {'model.safetensors': WEIGHTS})
    hub.cut('safetensors', after=3500, times=2)
    assert download() == WEIGHTS
    assert [r.range for r in hub.seen('^GET /storage')] == [None, 'bytes=3000-', 'bytes=3000-']
    assert [r.status for r in hub.seen('^GET /storage')] == [200, 206, 206]
    assert waits == [1, 1]
    assert blobs(tmp_path) == [sha256(WEIGHTS)]


@pytest.mark.parametrize('reset, attempts, error', [
    (False, 6, 'RemoteProtocolError'),
    (True, 1, 'ReadError'),  # the client does not resume after a reset
])
def test_download_that_is_always_cut_fails(reset, attempts, error, hub, download, tmp_path):
    """Catches a cut that passes for the end of the file."""
    hub.publish(NET, {'model.safetensors': WEIGHTS})
    hub.cut('safetensors', after=3000, times=math.inf, reset=reset)
    with pytest.raises(HTTPError) as raised:
        download()
    assert type(raised.value).__name__ == error
    assert len(hub.seen('^GET /storage')) == attempts
    assert blobs(tmp_path) == []


def test_flipped_byte_reaches_the_user(hub, download, tmp_path):
    """Catches a flip that the client would notice (it compares sizes only), or that stays on the server."""
    hub.publish(NET, {'model.safetensors': WEIGHTS, 'config.json': b'{}'})
    hub.flip('safetensors', at=700)
    damaged = download()
    assert [i for i in range(len(WEIGHTS)) if damaged[i] != WEIGHTS[i]] == [700]
    assert download() == damaged  # the cache keeps it, under the name of what was asked for
    assert blobs(tmp_path) == [sha256(WEIGHTS)]
    assert download(force_download=True) == WEIGHTS
    hub.flip('GET .*config.json', times=math.inf)
    assert [download('config.json'), download('config.json', force_download=True)] == [b'z}', b'z}']


def test_private_and_gated_repositories(hub, api, download):
    """Catches access without a right to it, and errors other than those of the Hub."""
    api.create_repo(NET, private=True)
    hub.publish(NET, {'model.safetensors': WEIGHTS})
    assert download(token=hub.token) == WEIGHTS
    for token, status in ((False, 401), (hub.stranger, 404)):
        for read in (lambda: api.model_info(NET, token=token), lambda: download('config.json', token=token)):  # noqa: B023
            with pytest.raises(RepositoryNotFoundError) as error:
                read()
            assert error.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match='Invalid credentials') as error:
        api.model_info(NET, token='hf_wrong')
    assert not isinstance(error.value, RepositoryNotFoundError)
    hub.repos[NET].private, hub.repos[NET].gated = False, 'manual'
    for token, status in ((False, 401), (hub.stranger, 403)):
        assert api.model_info(NET, token=token).gated == 'manual'
        with pytest.raises(GatedRepoError) as error:
            api.file_exists(NET, 'model.safetensors', token=token)
        assert error.value.response.status_code == status
    assert api.file_exists(NET, 'model.safetensors')


def test_only_who_may_write_writes(hub, api):
    """Catches a commit or a new repository by a token that may only read."""
    hub.publish(NET, {'config.json': b'{}'})
    hub.users['hf_reader'] = User(hub.user, (hub.organization,), role='read')
    for token, status in ((hub.stranger, 403), ('hf_reader', 403), (False, 401)):
        for write in (
            lambda token: api.upload_file(path_or_fileobj=b'', path_in_repo='a', repo_id=NET, token=token),
            lambda token: api.create_tag(NET, tag='v1', token=token),
            lambda token: api.create_repo('tests/other', token=token),
        ):
            with pytest.raises(HfHubHTTPError) as error:
                write(token)
            assert error.value.response.status_code == status
    assert api.whoami()['orgs'][0]['name'] == hub.organization
    assert api.whoami('hf_reader')['auth']['accessToken']['role'] == 'read'
    with pytest.raises(HfHubHTTPError, match='Invalid user token'):
        api.whoami('hf_wrong')


def test_what_is_missing(hub, api, download, tmp_path):
    """Catches errors that the client takes for one another."""
    with pytest.raises(RepositoryNotFoundError):
        download()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(NET)
    first = hub.publish(NET, {'model.safetensors': WEIGHTS}).oid
    with pytest.raises(RevisionNotFoundError):
        download(revision='v2')
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NET, revision='0' * 40)
    with pytest.raises(RemoteEntryNotFoundError):
        download('pytorch_model.bin')
    assert [file.parent.name for file in tmp_path.glob('cache/*/.no_exist/*/*')] == [first]
    assert [api.file_exists(NET, path) for path in ('model.safetensors', 'config.json')] == [True, False]
    assert api.repo_exists(NET) and not api.repo_exists('tests/other')


def test_busy_server(hub, api, download, waits):
    """Catches an error that comes too often or too seldom, and a wait that the client is not told."""
    hub.publish(NET, {'model.safetensors': WEIGHTS})
    hub.fail('HEAD', 429, times=2, retry_after=3)
    assert download() == WEIGHTS
    assert [r.status for r in hub.seen('HEAD')] == [429, 429, 302]
    assert waits == [3 + 1]  # the first time, the client looks into its cache instead
    hub.fail('/storage/', 503)
    with pytest.raises(HfHubHTTPError, match='503'):
        download(force_download=True)  # the client tries 408 and 429 again, but not this
    hub.fail('/preupload/', 503, times=2)
    api.upload_file(path_or_fileobj=b'{}', path_in_repo='config.json', repo_id=NET)
    assert [r.status for r in hub.seen('/preupload/')] == [503, 503, 200]
    assert waits[1:] == [1, 2]


def test_slow_server(hub, download):
    """Catches a server that answers at once where a test needs time, or that waits at the wrong moment."""
    hub.publish(NET, {'config.json': b'{"a": 1}'})
    hub.slow('HEAD', 0.3)
    start = time.monotonic()
    download('config.json')
    assert time.monotonic() - start > 0.3
    hub.slow('GET', 60, at=3)
    with urllib.request.urlopen(f'{hub.url}/{NET}/resolve/main/config.json', timeout=1) as response:
        assert response.read(3) == b'{"a'
        with pytest.raises(TimeoutError):
            response.read(1)


def test_closed_server(hub, download, waits):
    """Catches connections that are kept alive and outlive the server."""
    hub.publish(NET, {'model.safetensors': WEIGHTS, 'config.json': b'{}'})
    download()
    hub.close()
    assert download() == WEIGHTS
    assert waits == []
    with pytest.raises(LocalEntryNotFoundError) as error:
        download('config.json')
    assert type(error.value.__cause__).__name__ == 'ConnectError'
    assert waits == [1, 2, 4, 8, 8]


def test_tags_and_branches(hub, api, download):
    """Catches a tag that moves, and a branch that is not its own."""
    first = hub.publish(NET, {'config.json': b'1'}).oid
    api.create_tag(NET, tag='v1')
    api.create_branch(NET, branch='next/one')
    hub.publish(NET, {'config.json': b'2'})
    api.create_tag(NET, tag='v1', exist_ok=True)
    with pytest.raises(HfHubHTTPError, match='409'):
        api.create_tag(NET, tag='v1')
    api.upload_file(path_or_fileobj=b'3', path_in_repo='config.json', repo_id=NET, revision='next/one')
    revisions = {'main': b'2', 'v1': b'1', 'next/one': b'3', first: b'1'}
    assert {revision: download('config.json', revision=revision) for revision in revisions} == revisions
    refs = api.list_repo_refs(NET)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [('v1', first)]
    assert [branch.name for branch in refs.branches] == ['main', 'next/one']
    assert api.model_info(NET, revision='v1').sha == first


def test_storage_takes_only_what_was_announced(hub):
    """Catches an LFS object under the hash of another, and a commit that refers to one that was never uploaded."""
    hub.publish(NET, {})
    url = f'{hub.storage_url}/storage/{NET}/{sha256(WEIGHTS)}?size={len(WEIGHTS)}'
    for data, headers in ((WEIGHTS[::-1], {}), (WEIGHTS, {'Authorization': f'Bearer {hub.token}'})):
        with pytest.raises(urllib.error.HTTPError, match='400'):
            urllib.request.urlopen(urllib.request.Request(url, data, headers, method='PUT'))
    assert hub.repos[NET].objects == {}
    with pytest.raises(urllib.error.HTTPError, match='400'):
        commit(hub, {'key': 'lfsFile', 'value': {'path': 'model.safetensors', 'oid': sha256(WEIGHTS)}})
    assert hub.repos[NET].contents().keys() == {'.gitattributes'}


def test_model_card_is_checked(hub, api):
    """Catches a card without metadata that passes."""
    hub.publish(NET, {})
    with pytest.warns(UserWarning, match='empty or missing yaml metadata'):
        api.upload_file(path_or_fileobj=b'# A net', path_in_repo='README.md', repo_id=NET)
    with pytest.raises(ValueError, match='do not end'):
        api.upload_file(path_or_fileobj=b'---\nlicense: mit\n', path_in_repo='README.md', repo_id=NET)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        api.upload_file(path_or_fileobj=CARD, path_in_repo='README.md', repo_id=NET)
    assert hub.repos[NET].contents()['README.md'] == CARD


def test_child_processes_share_a_cache(hub):
    """Catches a child that talks to the real Hub, that has another token, or that is not offline when it should be."""
    hub.publish(NET, {'model.safetensors': WEIGHTS}, private=True)
    code = f'from huggingface_hub import hf_hub_download as load\nprint(load("{NET}", "model.safetensors"))\n'
    online = child(hub, code)
    assert Path(online.stdout.strip()).read_bytes() == WEIGHTS
    assert online.stdout.startswith(hub.home.name)
    hub.requests.clear()
    offline = child(hub, f'{code}load("{NET}", "config.json")', HF_HUB_OFFLINE=1, HF_TOKEN=None)
    assert offline.stdout == online.stdout
    assert offline.returncode == 1
    assert 'LocalEntryNotFoundError: ' in offline.stderr.splitlines()[-1]
    assert not hub.requests
    stranger = child(hub, ['-c', code], HF_HOME=Path(hub.home.name) / 'other', HF_TOKEN=None)
    assert 'RepositoryNotFoundError: 401' in stranger.stderr
