"""A stand-in for the Hugging Face Hub on 127.0.0.1, for tests of publishing and downloading by the real client.

It holds models without Xet: repositories, commits, revisions, git LFS, private and gated access. Large files lie on a
second port, as those of the real Hub lie on another host. `hub_api.py` has the answers, `hub_repos.py` what is kept.

    with HubServer() as hub:
        hub.publish('tests/net', {'config.json': b'{}'})
        hub.cut('net/.*config.json', after=1)
        result = child(hub, 'from huggingface_hub import hf_hub_download; hf_hub_download("tests/net", "config.json")')
        assert result.returncode == 0 and len(hub.seen('GET .*config.json 200')) == 2
"""
import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http, disable_progress_bars, enable_progress_bars

from helpers.hub_api import Handler
from helpers.hub_repos import LFS_SUFFIXES, File, Repo, User

ROOT = Path(__file__).resolve().parent.parent.parent


class Server(ThreadingHTTPServer):
    """Remembers its connections: those that are kept alive would outlive it."""

    def __init__(self, hub):
        super().__init__(('127.0.0.1', 0), Handler)
        self.hub, self.connections = hub, []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def process_request(self, request, client_address):
        self.connections.append(request)
        super().process_request(request, client_address)

    def close(self):
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class HubServer:
    """The server, what it holds, and the faults that a test can switch on.

    Patterns are searched for in `METHOD path`. Each fault strikes `times` times (math.inf: always), the oldest first.
    One that is about the bytes of a file waits for a GET that is answered with them.
    """

    def __init__(self):
        self.user, self.organization, self.token, self.stranger = 'tester', 'tests', 'hf_tester', 'hf_stranger'
        self.users = {self.token: User(self.user, (self.organization,)), self.stranger: User('stranger')}
        self.repos, self.requests, self.faults = {}, [], []
        self.lock, self.closed = threading.Lock(), threading.Event()

    def start(self):
        self.home = tempfile.TemporaryDirectory(prefix='hub-home-')
        self.servers = [Server(self), Server(self)]
        self.url, self.storage_url = (f'http://127.0.0.1:{server.server_port}' for server in self.servers)
        return self

    def close(self):
        """From now on nobody answers. What the clients have in their cache stays."""
        self.closed.set()
        for server in self.servers:
            server.close()

    __enter__ = start

    def __exit__(self, *_):
        self.close()
        self.home.cleanup()

    def publish(self, repo_id, files, private=False):
        """Commit `files` (bytes by path) to the main branch without a client. The repository is created if need be."""
        repo = self.repos.setdefault(repo_id, Repo(self.user, private))
        files = {path: File(data, path.endswith(LFS_SUFFIXES)) for path, data in files.items()}
        repo.objects |= {file.sha256: file.data for file in files.values() if file.lfs}
        return repo.commit('main', repo.resolve().files | files, 'publish', '', self.user)

    def seen(self, pattern):
        """Requests whose `METHOD path status` matches."""
        return [r for r in self.requests if re.search(pattern, f'{r.method} {r.path} {r.status}')]

    def fail(self, pattern, status, times=1, retry_after=None):
        """Answer with an error. `retry_after` is in seconds."""
        self._add('fail', pattern, times, status=status, retry_after=retry_after)

    def cut(self, pattern, after, times=1, reset=False):
        """Close the connection before byte `after` of a file, as a server that stops does, or reset it."""
        self._add('cut', pattern, times, after=after, reset=reset)

    def flip(self, pattern, at=0, times=1):
        """Change the lowest bit of byte `at` of a file."""
        self._add('flip', pattern, times, at=at)

    def slow(self, pattern, seconds, times=1, at=None):
        """Wait before the answer, or before byte `at` of a file."""
        self._add('slow' if at is None else 'stall', pattern, times, seconds=seconds, at=at)

    def _add(self, kind, pattern, times, **details):
        self.faults.append(SimpleNamespace(kind=kind, pattern=pattern, times=times, **details))

    def take(self, kind, line):
        """The oldest fault of this kind that is due for this request, or None."""
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind and fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


@pytest.fixture
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """Lets the client in this process take `hub` for the Hub, with a cache of its own. -> its waits, in seconds

    What it reads from the environment it has read at its import, hence constants in the place of variables.
    """
    waits = []
    settings = {
        'ENDPOINT': hub.url, 'HUGGINGFACE_CO_URL_TEMPLATE': hub.url + '/{repo_id}/resolve/{revision}/{filename}',
        'HF_HUB_CACHE': str(tmp_path / 'hub'), 'HF_TOKEN_PATH': str(tmp_path / 'token'), 'HF_HUB_DISABLE_XET': True,
        'HF_HUB_OFFLINE': False, 'HF_HUB_DISABLE_IMPLICIT_TOKEN': False, 'HF_HUB_DISABLE_TELEMETRY': True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    for module in (_http, file_download):
        monkeypatch.setattr(module, 'time', SimpleNamespace(sleep=waits.append))
    for name in [name for name in os.environ if 'proxy' in name.lower()]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('HF_TOKEN', hub.token)
    _http.close_session()
    disable_progress_bars()
    yield waits
    enable_progress_bars()
    _http.close_session()


def child(hub, code, timeout=120, **env):
    """Run code (a string), or `python` with a list of arguments, as a process that takes `hub` for the Hub.

    All children of one hub share a cache. Variables given as None are removed: `HF_TOKEN=None` is no token.
    """
    settings = {
        **{k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING')) and 'proxy' not in k.lower()},
        'HF_ENDPOINT': hub.url, 'HF_HOME': hub.home.name, 'HF_TOKEN': hub.token, 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'PYTHONPATH': str(ROOT), **env,
    }
    settings = {key: str(value) for key, value in settings.items() if value is not None}
    command = [sys.executable, *(['-c', code] if isinstance(code, str) else map(str, code))]
    return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout)
