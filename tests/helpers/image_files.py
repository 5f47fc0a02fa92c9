"""Data sets of a few real digits, written as users have them: parquet files and folders of images."""
import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = load_digits()
CLASS_NAMES = [str(i) for i in range(10)]
DAMAGED = b'\x89PNG and then nothing'


def digit(index):
    """The image of a digit, 8x8 grey values."""
    return Image.fromarray((DIGITS.images[index] * (255 / 16)).round().astype(np.uint8))


def png(index, mode='L'):
    file = io.BytesIO()
    digit(index).convert(mode).save(file, 'PNG')
    return file.getvalue()


def write_parquet(path, indices, *, labels=None, image='image', label='label', target=None, files=None):
    """Write digits as the Hub has them; `labels`, `target` (its feature) and `files` (the bytes) may be wrong ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({image: datasets.Image(), label: target or datasets.ClassLabel(names=CLASS_NAMES)})
    files = files or [png(i) for i in indices]
    labels = DIGITS.target[indices].tolist() if labels is None else labels
    table = pa.table({
        image: pa.array([{'bytes': file, 'path': None} for file in files], features.arrow_schema.field(image).type),
        label: pa.array(labels),
    })
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), path)


def write_images(folder, indices, class_names=CLASS_NAMES):
    """Write digits as folder/CLASS/INDEX.png."""
    for index in indices:
        path = folder / class_names[DIGITS.target[index]] / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(index))
