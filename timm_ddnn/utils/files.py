"""Files that are whole or not there at all, and their checksums. Text is UTF-8, whatever the locale."""
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

__all__ = ['file_sha256', 'git_sha1', 'staged_folder', 'write_json', 'write_section', 'write_text']


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file such that it is whole or not there at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + '\n')


def write_text(path: Path, text: str) -> None:
    """Write a text file such that it is whole or not there at all."""
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.write_text(text, encoding='utf-8')
    os.replace(temporary, path)


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in a file.

    Raises:
        InputError: If the file has not each of these lines once, in this order.
    """
    start, end = f'<!-- {name} -->\n', f'<!-- end of {name} -->'
    old = path.read_text(encoding='utf-8')
    before, _, rest = old.partition(start)
    _, _, after = rest.partition(end)
    if not (old.count(start) == old.count(end) == rest.count(end) == 1):
        raise InputError(f'{path} must have the lines {start.strip()} and {end} once each, in this order')
    write_text(path, before + start + text + end + after)


@contextmanager
def staged_folder(folder: str | Path, new: bool = False) -> Iterator[Path]:
    """Give a temporary folder whose files move to `folder` when the block ends, and vanish when it fails.

    Args:
        folder: Where the files are to be, made if it is not there.
        new: Whether it must be new or empty.

    Raises:
        FileExistsError: If it is not new or empty.
        NotADirectoryError: If it is, or lies in, something else than a folder.
    """
    folder = Path(folder).absolute()
    if new and folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f'output must be a new or an empty folder, got {str(folder)!r}')
    base = next(path for path in (folder, *folder.parents) if path.exists())
    if not base.is_dir():
        raise NotADirectoryError(f'output must be a folder, got {str(folder)!r}: {str(base)!r} is a file')
    with tempfile.TemporaryDirectory(dir=base, prefix='.timm-ddnn-') as temporary:
        yield Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(temporary).iterdir():
            os.replace(file, folder / file.name)


def file_sha256(path: str | Path) -> str:
    """Compute the SHA-256 of a file; hexadecimal."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def git_sha1(path: str | Path) -> str:
    """Compute the SHA-1 under which git, and so the Hub, stores a file; hexadecimal."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()
