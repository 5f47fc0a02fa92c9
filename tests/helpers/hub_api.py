"""What the stand-in for the Hugging Face Hub answers over HTTP: the handler of `hub_server.py`.

Of the Hub's interface it knows what `huggingface_hub` asks for about models without Xet; anything else is status 501.
"""
import hashlib
import json
import os
import re
import socket
import struct
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath as Path
from typing import NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from helpers.hub_repos import Refusal, Repo

REPO = r'/(?P<repo_id>[^/]+/[^/]+)'
MODEL = f'/api/models{REPO}'
ROUTES = []  # (methods, pattern of the whole path, method of the handler)


def route(methods, pattern):
    def register(function):
        ROUTES.append((methods.split(), re.compile(pattern), function))
        return function
    return register


class Request(NamedTuple):
    """A line of the log: `token` says whether there was one, never which."""
    method: str
    path: str
    status: int
    token: bool
    range: str | None


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True

    def answer(self):
        self.hub, url = self.server.hub, urlsplit(self.path)
        self.query, self.line = parse_qs(url.query), f'{self.command} {unquote(url.path)}'
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        try:
            if slow := self.hub.take('slow', self.line):
                self.hub.closed.wait(slow.seconds)
            if fail := self.hub.take('fail', self.line):
                wait = {} if fail.retry_after is None else {'Retry-After': fail.retry_after}
                raise Refusal(fail.status, f'The test asked for status {fail.status}.', headers=wait)
            for methods, pattern, function in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(url.path)):
                    found = function(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
                    return None if found is None else self.send(200, json.dumps(found).encode())
            raise Refusal(501, f'This server does not know {self.line}.')
        except Refusal as refusal:
            self.send(refusal.status, json.dumps(refusal.content).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_request(self, code='-', size='-'):  # called before the client can see the answer
        path, token = self.line.partition(' ')[2], 'Authorization' in self.headers
        self.hub.requests.append(Request(self.command, path, int(code), token, self.headers.get('Range')))

    def send(self, status, body, headers=(), size=None):
        """Answer with `body`, or with its head alone if `size` is given and for HEAD."""
        self.send_response(status)
        size = len(body) if size is None else size
        for name, value in {'Content-Type': 'application/json', 'Content-Length': size, **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_file(self, data, headers):
        """Answer with all of `data`, or the range that was asked for, with the faults that a test has switched on."""
        headers = {**headers, 'Accept-Ranges': 'bytes', 'Content-Type': 'application/octet-stream'}
        status, start, stop, size = 200, 0, len(data), len(data)
        if match := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            start, stop = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
            if start >= stop:
                raise Refusal(416, 'Range Not Satisfiable', headers={'Content-Range': f'bytes */{size}'})
            status, headers['Content-Range'] = 206, f'bytes {start}-{stop - 1}/{size}'
        self.send(status, b'', headers, size=stop - start)
        if self.command == 'HEAD':
            return
        flip, cut, stall = (self.hub.take(kind, self.line) for kind in ('flip', 'cut', 'stall'))
        if flip:
            data = data[:flip.at] + bytes([data[flip.at] ^ 1]) + data[flip.at + 1:]
        end = min(stop, max(start, cut.after)) if cut else stop
        if stall:
            self.wfile.write(data[start:min(end, stall.at)])
            self.hub.closed.wait(stall.seconds)
            start = max(start, stall.at)
        self.wfile.write(data[start:end])
        self.close_connection = self.close_connection or end < stop
        if cut and cut.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            os.close(self.connection.detach())  # now, and by a reset

    # Who may do what

    @property
    def user(self):
        token = self.headers.get('Authorization', '').removeprefix('Bearer ')
        if token and token not in self.hub.users:
            raise Refusal(401, 'Invalid credentials in Authorization header')
        return self.hub.users.get(token)

    def refuse(self, status, message, code=None):
        """Say no to a user, or to someone unknown that a token might help."""
        raise Refusal(status, message, code) if self.user else Refusal(401, 'Invalid username or password.', code)

    def owns(self, namespace, write=False):
        user = self.user
        return user and namespace in (user.name, *user.organizations) and (user.role == 'write' or not write)

    def find(self, repo_id, write=False, files=False):
        """The repository, if this user may see it. The client learns from the code, not from a 401, what is wrong."""
        repo, namespace = self.hub.repos.get(repo_id), repo_id.split('/')[0]
        if repo is None or (repo.private and not self.owns(namespace)):
            self.refuse(404, 'Repository not found', 'RepoNotFound')
        if files and repo.gated and not self.owns(namespace):
            self.refuse(403, f'Access to model {repo_id} is restricted.', 'GatedRepo')
        if write and not self.owns(namespace, write):
            self.refuse(403, 'Forbidden: you need a token that may write to this repository.')
        return repo

    # The user and the list of repositories

    @route('GET', '/api/whoami-v2')
    def whoami(self):
        name, organizations, role = self.user or self.refuse(401, '')
        orgs = [{'type': 'org', 'name': name, 'roleInOrg': role} for name in organizations]
        return {'type': 'user', 'name': name, 'orgs': orgs, 'auth': {'accessToken': {'role': role}}}

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self):
        """Looks for front matter, but does not parse it."""
        fences = [i for i, line in enumerate(json.loads(self.body)['content'].splitlines()) if line.strip() == '---']
        if fences[:1] != [0]:
            return {'errors': [], 'warnings': [{'message': 'empty or missing yaml metadata in repo card'}]}
        if len(fences) < 2:
            errors = [{'message': 'the yaml metadata do not end'}]
            raise Refusal(400, errors[0]['message'], errors=errors, warnings=[])
        return {'errors': [], 'warnings': []}

    @route('POST', '/api/repos/create')
    def create(self):
        wanted = json.loads(self.body)
        namespace = wanted.get('organization') or (self.user or self.refuse(401, '')).name
        if not self.owns(namespace, write=True):
            self.refuse(403, f'You don\'t have the rights to create a model under the namespace "{namespace}".')
        repo_id = f'{namespace}/{wanted["name"]}'
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise Refusal(409, 'You already created this model repo', url=f'{self.hub.url}/{repo_id}')
            private = wanted.get('visibility') == 'private' or wanted.get('private', False)  # of clients before 2
            self.hub.repos[repo_id] = Repo(self.user.name, private)
        return {'url': f'{self.hub.url}/{repo_id}'}

    # What is in a repository

    @route('GET', f'{MODEL}(?:/revision/(?P<revision>[^/]+))?')
    def info(self, repo_id, revision):
        return self.find(repo_id).info(repo_id, revision or 'main', blobs='blobs' in self.query)

    @route('GET', f'{MODEL}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?')
    def tree(self, repo_id, revision, folder):
        entries, folder = self.find(repo_id).resolve(revision).entries(), (folder or '.').rstrip('/')
        if folder != '.' and folder not in entries:
            raise Refusal(404, f'{folder} does not exist on "{revision}"', 'EntryNotFound')
        depth = None if self.query['recursive'] == ['true'] else 1
        return [entry for path, entry in entries.items() if folder in map(str, list(Path(path).parents)[:depth])]

    @route('POST', f'{MODEL}/paths-info/(?P<revision>[^/]+)')
    def paths_info(self, repo_id, revision):
        entries = self.find(repo_id).resolve(revision).entries()
        return [entries[path] for path in parse_qs(self.body.decode())['paths'] if path in entries]

    @route('GET', f'{MODEL}/refs')
    def refs(self, repo_id):
        return self.find(repo_id).refs()

    @route('GET', f'{MODEL}/commits/(?P<revision>[^/]+)')
    def commits(self, repo_id, revision):
        return [commit.describe() for commit in self.find(repo_id).resolve(revision).history()]

    @route('GET HEAD', f'{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)')
    def resolve(self, repo_id, revision, path):
        commit = self.find(repo_id, files=True).resolve(revision)
        headers = {'X-Repo-Commit': commit.oid}
        if path not in commit.files:
            raise Refusal(404, 'Entry not found', 'EntryNotFound', headers)
        file = commit.files[path]
        headers['ETag'] = f'"{file.etag}"'
        if not file.lfs:
            return self.send_file(file.data, headers)
        return self.send(302, b'', {
            **headers, 'X-Linked-ETag': headers['ETag'], 'X-Linked-Size': len(file.data),
            'Location': f'{self.hub.storage_url}/storage/{repo_id}/{file.sha256}/{quote(path)}',
        })

    # Changes

    @route('POST', f'{MODEL}/(?P<kind>tag|branch)/(?P<name>[^/]+)')
    def add_ref(self, repo_id, kind, name):
        """The path names the new branch, but of a new tag the revision that it is for."""
        repo, wanted = self.find(repo_id, write=True), json.loads(self.body)
        name, revision = (wanted['tag'], name) if kind == 'tag' else (name, wanted.get('startingPoint', 'main'))
        refs = repo.tags if kind == 'tag' else repo.branches
        if name in refs:
            raise Refusal(409, f'The {kind} {name} already exists')
        refs[name] = repo.resolve(revision)
        return {}

    @route('POST', f'{MODEL}/preupload/(?P<revision>[^/]+)')
    def preupload(self, repo_id, revision):
        commit = self.find(repo_id, write=True).resolve(revision)
        return {'files': [commit.preupload(file['path']) for file in json.loads(self.body)['files']]}

    @route('POST', rf'{REPO}\.git/info/lfs/objects/batch')
    def lfs_batch(self, repo_id):
        def describe(oid, size):
            actions = {'upload': {'href': f'{self.hub.storage_url}/storage/{repo_id}/{oid}?size={size}'}}
            return {'oid': oid, 'size': size, **({} if oid in repo.objects else {'actions': actions})}
        repo = self.find(repo_id, write=True)
        return {'transfer': 'basic', 'objects': [describe(**wanted) for wanted in json.loads(self.body)['objects']]}

    @route('GET PUT', f'/storage{REPO}/(?P<oid>[0-9a-f]{{64}})(?:/.*)?')
    def storage(self, repo_id, oid):
        """Where large files lie: the link that the Hub gave is enough, and a token must never come here."""
        if 'Authorization' in self.headers:
            raise Refusal(400, 'Only one auth mechanism allowed')
        objects = self.hub.repos[repo_id].objects
        if self.command != 'PUT':
            return self.send_file(objects[oid], {'ETag': f'"{oid}"'})
        if (hashlib.sha256(self.body).hexdigest(), str(len(self.body))) != (oid, self.query['size'][0]):
            raise Refusal(400, f'The {len(self.body)} bytes that came are not those of {oid}.')
        objects[oid] = self.body
        return {}

    @route('POST', f'{MODEL}/commit/(?P<branch>[^/]+)')
    def commit(self, repo_id, branch):
        repo = self.find(repo_id, write=True)
        (_, header), *changes = ((line['key'], line['value']) for line in map(json.loads, self.body.splitlines()))
        with self.hub.lock:
            commit = repo.apply(branch, header, changes, self.user.name)
        return {'commitOid': commit.oid, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{commit.oid}'}
