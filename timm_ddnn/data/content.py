"""The files of the images of a data set: a fingerprint of all, and which of validation are trained on as well."""
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from .datasets import ImageData

__all__ = ['count_duplicates', 'fingerprint']


MOST_HASHED_BYTES = 2 ** 28


def fingerprint(data: ImageData) -> dict[str, Any]:
    """Compute what tells a data set from another, for a run that resumes.

    Args:
        data: What `load_image_data` found.

    Returns:
        How many images the splits have, and 'sha256', over names, sizes and classes of all images, and over their bytes
        if these are at most 256 MiB. It does not depend on where the files lie, nor on their times.
    """
    splits = {'training_images': data.train, 'validation_images': data.validation}
    digest = hashlib.sha256(json.dumps(data.class_names).encode())
    total = 0
    for split in splits.values():
        for path, size, label in _image_sizes(split, data):
            total += size
            digest.update(f'{"/".join(Path(path).parts[-2:])} {size} {label}\n'.encode())
    if total <= MOST_HASHED_BYTES:
        for split in splits.values():
            for content in _contents(split, data.input_key):
                digest.update(content)
    return {'sha256': digest.hexdigest(), **{name: len(split) for name, split in splits.items()}}


def count_duplicates(data: ImageData) -> int | None:
    """Count the images of validation whose file is, byte for byte, that of an image to train on.

    Only files of a size that occurs in both splits are read.

    Args:
        data: What `load_image_data` found.

    Returns:
        Their number, None if more than 256 MiB would have to be read.
    """
    sizes = [[size for _, size, _ in _image_sizes(split, data)] for split in (data.train, data.validation)]
    common = set(sizes[0]) & set(sizes[1])
    rows = [[row for row, size in enumerate(own) if size in common] for own in sizes]
    if sum(own[row] for own, chosen in zip(sizes, rows, strict=True) for row in chosen) > MOST_HASHED_BYTES:
        return None
    trained, validated = (
        [hashlib.sha256(content).digest() for content in _contents(split.select(chosen), data.input_key)]
        for split, chosen in zip((data.train, data.validation), rows, strict=True))
    trained = set(trained)
    return sum(digest in trained for digest in validated)


def _image_sizes(split: datasets.Dataset, data: ImageData) -> Iterator[tuple[str, int, int]]:
    """Path ('' without one), bytes and label of every image; the images are not read."""
    columns = split.cast_column(data.input_key, datasets.Image(decode=False)).with_format('arrow')
    for batch in columns.select_columns([data.input_key, data.target_key]).iter(1000):
        images = batch[data.input_key].combine_chunks()
        sizes = pc.binary_length(images.field('bytes')).to_pylist()
        paths, labels = images.field('path').to_pylist(), batch[data.target_key].to_pylist()
        for path, size, label in zip(paths, sizes, labels, strict=True):
            if size is None:
                size = os.path.getsize(path) if path else 0
            yield path or '', size, label


def _contents(split: datasets.Dataset, key: str) -> Iterator[bytes]:
    """The file of every image; nothing for one that is missing, which is named when it is trained on."""
    for row in split.cast_column(key, datasets.Image(decode=False)).select_columns(key):
        image = row[key] or {}
        content = image.get('bytes')
        if content is None and image.get('path'):
            content = Path(image['path']).read_bytes()
        yield content or b''
