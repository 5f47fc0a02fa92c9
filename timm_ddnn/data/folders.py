"""Folders SPLIT/CLASS/IMAGE and CLASS/IMAGE.

Every file of a class is an image of the data set, passed over by its name, or refused.
"""
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import PIL.Image
from timm.utils import natural_key

from ..utils.errors import InputError

if TYPE_CHECKING:
    import datasets

__all__ = ['are_classes', 'check_encoding', 'find_splits', 'image_extensions', 'list_entries', 'read_folders']


# What systems and programs leave in folders of images, in lower case
CLUTTER = {
    '.appledouble', '.directory', '.ds_store', '.fseventsd', '.git', '.gitattributes', '.gitignore', '.gitkeep',
    '.hidden', '.ipynb_checkpoints', '.localized', '.nomedia', '.picasa.ini', '.spotlight-v100', '.svn',
    '.temporaryitems', '.thumbnails', '.trashes', '#recycle', '$recycle.bin', '@eadir', '__macosx', 'desktop.ini',
    'ehthumbs.db', 'icon\r', 'lost+found', 'picasa.ini', 'system volume information', 'thumbs.db',
}
CLUTTER_PREFIXES = '._', '.nfs', '.fuse_hidden', '.trash-'  # macOS, network file systems, removed files


def find_splits(folder: Path) -> dict[str, Path]:
    """Find the folders in a folder that hold something, by name."""
    return {
        entry.name: Path(entry.path) for entry in list_entries(folder)
        if entry.is_dir() and next(list_entries(Path(entry.path)), None)
    }


def are_classes(folders: Iterable[Path]) -> bool:
    """Whether none of some folders holds a folder: then they are not splits but classes."""
    return not any(entry.is_dir() for folder in folders for entry in list_entries(folder))


def read_folders(splits: Mapping[str, Path]) -> dict[str, 'datasets.Dataset']:
    """List the images of splits; their classes are the names of the folders, sorted naturally as timm does.

    Links are followed, to files and folders. Nothing is left out in silence.

    Args:
        splits: Folder of each split, as an absolute path, with a folder per class.

    Returns:
        For each split the columns image and label.

    Raises:
        InputError: If something in the folders is neither an image in the folder of a class nor clutter.
    """
    import datasets

    files = {split: {name: list(_images(path)) for name, path in _classes(folder)} for split, folder in splits.items()}
    names = {name for classes in files.values() for name, images in classes.items() if images}
    empty = sorted({name for classes in files.values() for name in classes} - names)
    if empty:
        raise InputError(f'{len(empty)} folders of classes have no image in any split, the first is {empty[0]!r}')
    names = sorted(names, key=lambda name: (natural_key(name), name))
    label = {name: index for index, name in enumerate(names)}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    rows = {
        split: [(path, label[name]) for name in names for path in classes.get(name, ())]
        for split, classes in files.items()
    }
    return {
        split: datasets.Dataset.from_dict(
            {'image': [path for path, _ in pairs], 'label': [index for _, index in pairs]}, features=features,
            split=datasets.NamedSplit(split))
        for split, pairs in rows.items()
    }


def list_entries(folder: Path) -> Iterator[os.DirEntry]:
    """Entries of a folder that are not clutter, sorted."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.lower() in CLUTTER or entry.name.lower().startswith(CLUTTER_PREFIXES):
                continue
            check_encoding(entry.path)
            yield entry


def check_encoding(path: str) -> None:
    """Check that a path can be written to tables and files.

    Raises:
        InputError: If it is not UTF-8.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f'file names must be UTF-8, got {os.fsencode(path)!r}') from None


def image_extensions() -> set[str]:
    """Find the suffixes, in lower case, of files that PIL can read as images."""
    return {extension for extension, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}


def _classes(split: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of every class of a split."""
    for entry in list_entries(split):
        if not entry.is_dir():
            raise InputError(f'images must lie in SPLIT/CLASS/ or CLASS/, got {entry.path}')
        yield entry.name, Path(entry.path)


def _images(folder: Path) -> Iterator[str]:
    """Paths of the images in the folder of a class."""
    known, wrong = image_extensions(), []
    for entry in list_entries(folder):
        if entry.is_dir():
            inside = next(list_entries(Path(entry.path)), None)
            raise InputError(f'images must lie in SPLIT/CLASS/ or CLASS/, got {inside.path if inside else entry.path}')
        extension = os.path.splitext(entry.name)[1].lower()
        if entry.is_file() and (extension in known or _is_image(entry.path)):
            yield entry.path
        else:
            wrong.append(entry.name)
    if wrong:
        raise InputError(
            f'{len(wrong)} files in {folder} are not images that can be read here, the first is {wrong[0]!r}')


def _is_image(path: str) -> bool:
    """Whether a file whose name does not tell is an image by its first bytes."""
    try:
        with PIL.Image.open(path):
            return True
    except OSError:
        return False
