"""Repositories as the Hugging Face Hub keeps and describes them, in memory: what `hub_server.py` serves.

Only models, and only what the client reads: files in git or in git LFS, commits, branches, tags.
"""
import base64
import hashlib
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath as Path
from typing import NamedTuple

LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.onnx', '.npy', '.npz', '.parquet', '.zip', '.png', '.jpg')
ATTRIBUTES = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES).encode()


class Refusal(Exception):
    """An answer that is an error. `code` is what the client chooses the type of its exception by."""

    def __init__(self, status, message, code=None, headers=(), **content):
        super().__init__(message)
        self.status, self.content = status, {'error': message, **content}
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {}), **dict(headers)}


class User(NamedTuple):
    name: str
    organizations: tuple = ()
    role: str = 'write'  # or 'read'


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self):
        return f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'.encode()

    @cached_property
    def blob_id(self):
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b'blob %d\0' % len(blob) + blob).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.lfs else self.blob_id

    def describe(self, blob='oid', sha256='oid'):
        """Size and hashes, under the names that differ between the answers of the Hub."""
        lfs = {'lfs': {sha256: self.sha256, 'size': len(self.data), 'pointerSize': len(self.pointer)}}
        return {blob: self.blob_id, 'size': len(self.data), **(lfs if self.lfs else {})}


@dataclass
class Commit:
    parent: 'Commit | None'
    files: dict
    title: str
    message: str
    author: str
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ'))

    @cached_property
    def oid(self):
        tree = sorted((path, file.blob_id) for path, file in self.files.items())
        return hashlib.sha1(repr((self.parent and self.parent.oid, self.title, self.date, tree)).encode()).hexdigest()

    def history(self):
        return [self, *(self.parent.history() if self.parent else ())]

    def describe(self):
        authors = [{'user': self.author}]
        return {'id': self.oid, 'title': self.title, 'message': self.message, 'date': self.date, 'authors': authors}

    def preupload(self, path):
        """How a file that is to come to this path must be sent, and which lies there now."""
        mode, old = 'lfs' if path.endswith(LFS_SUFFIXES) else 'regular', self.files.get(path)
        return {'path': path, 'uploadMode': mode, 'shouldIgnore': False, 'oid': old and old.etag}

    def entries(self):
        """What the Hub says of every file and every folder, by path."""
        folders = {str(folder) for path in self.files for folder in Path(path).parents} - {'.'}
        found = {path: {'type': 'directory', 'oid': '0' * 40, 'size': 0} for path in folders}
        found |= {path: {'type': 'file', **file.describe()} for path, file in self.files.items()}
        return {path: {'path': path, **entry} for path, entry in sorted(found.items())}


class Repo:
    def __init__(self, author, private=False):
        self.private, self.gated = private, False
        self.commits, self.branches, self.tags = {}, {'main': None}, {}
        self.objects = {}  # by SHA-256, what was uploaded to LFS, whether or not a commit refers to it
        self.commit('main', {'.gitattributes': File(ATTRIBUTES, False)}, 'initial commit', '', author)

    def commit(self, branch, files, title, message, author):
        commit = Commit(self.branches[branch], files, title, message, author)
        self.commits[commit.oid] = self.branches[branch] = commit
        return commit

    def resolve(self, revision='main'):
        for commits in (self.branches, self.tags, self.commits):
            if revision in commits:
                return commits[revision]
        raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')

    def contents(self, revision='main'):
        """For tests: bytes by path."""
        return {path: file.data for path, file in self.resolve(revision).files.items()}

    def apply(self, branch, header, changes, author):
        """Commit all `changes`, pairs of their kind and content, or none."""
        if branch not in self.branches:
            raise Refusal(404, f'Invalid rev id: {branch}', 'RevisionNotFound')
        if not self.branches[branch].oid.startswith(header.get('parentCommit', '')):
            raise Refusal(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(self.branches[branch].files)
        for kind, change in changes:
            path = change['path']
            if kind == 'file':
                files[path] = File(base64.b64decode(change['content'], validate=True), lfs=False)
            elif kind == 'lfsFile':
                if change['oid'] not in self.objects:
                    raise Refusal(400, f'The LFS object of {path} was not uploaded.')
                files[path] = File(self.objects[change['oid']], lfs=True)
            else:  # deletedFile or deletedFolder
                gone = [p for p in files if p == path or (kind == 'deletedFolder' and Path(path) in Path(p).parents)]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", 'EntryNotFound')
                files = {p: file for p, file in files.items() if p not in gone}
        return self.commit(branch, files, header['summary'], header['description'], author)

    def refs(self):
        def describe(kind, refs):
            return [{'name': name, 'ref': f'refs/{kind}/{name}', 'targetCommit': c.oid} for name, c in refs.items()]
        return {'branches': describe('heads', self.branches), 'tags': describe('tags', self.tags), 'converts': []}

    def info(self, repo_id, revision, blobs):
        commit = self.resolve(revision)
        return {
            'id': repo_id, 'author': repo_id.split('/')[0], 'sha': commit.oid, 'tags': [], 'downloads': 0, 'likes': 0,
            'private': self.private, 'gated': self.gated, 'disabled': False,
            'createdAt': commit.history()[-1].date, 'lastModified': commit.date,
            'siblings': [
                {'rfilename': path, **(file.describe('blobId', 'sha256') if blobs else {})}
                for path, file in sorted(commit.files.items())
            ],
        }
