"""Finding image data: splits, columns and classes of a data set, and a check of every label.

Reading and augmenting the images is in `images.py`. Models and losses need neither, nor the `datasets` library.
"""
import glob
import hashlib
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..models.load import class_names
from ..utils.errors import InputError
from .folders import are_classes, check_encoding, find_splits, list_entries, read_folders

__all__ = ['ImageData', 'count_classes', 'load_image_data', 'match_classes', 'quiet_datasets']


_logger = logging.getLogger(__name__)
TRAIN_SPLITS = ('train',)
VAL_SPLITS = ('validation', 'val', 'valid', 'test')
INPUT_KEYS = ('image', 'img')
TARGET_KEYS = ('label', 'labels', 'fine_label')
LAYOUTS = (
    'a folder must hold SPLIT/CLASS/IMAGE or SPLIT*.parquet with the splits train and val, or CLASS/IMAGE with '
    '--val-fraction'
)


def quiet_datasets() -> None:
    """Let the library `datasets` log nothing, its errors come as exceptions too, and draw bars on a terminal only."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


class ImageData(NamedTuple):
    """A data set whose columns are known and whose labels were checked.

    Attributes:
        train: Training split, None if it was not asked for.
        validation: Validation split.
        input_key: Name of the image column.
        target_key: Name of the label column.
        class_names: Name of every class, the label being its index.
        val_split: Name of the validation split; with the share, if it was held out of one to train on.
    """
    train: datasets.Dataset | None
    validation: datasets.Dataset
    input_key: str
    target_key: str
    class_names: list[str]
    val_split: str


def load_image_data(
        name: str,
        *,
        input_key: str | None = None,
        target_key: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        val_fraction: float | None = None,
        training: bool = True,
) -> ImageData:
    """Find a data set, its splits and its columns, and check every label.

    Args:
        name: 'digits' (the handwritten digits of scikit-learn, 898 images to train and 899 to validate), a folder of
            parquet files `SPLIT*.parquet` or `data/SPLIT*.parquet`, a folder of images `SPLIT/CLASS/*.png` or
            `CLASS/*.png` (the split 'train'), or the id 'owner/name' of a data set on the Hugging Face Hub.
        input_key: Name of the image column. Found by its type, else by its name, if None.
        target_key: Name of the label column. Found likewise.
        train_split: Name of the training split, 'train' if None.
        val_split: Name of the validation split; the first of 'validation', 'val', 'valid' and 'test' if None.
        val_fraction: Share of the training images of every class, (0, 1), that is not trained on and makes the
            validation split: the same ones in every call, at least one of each class that has two.
        training: Whether the training split is wanted.

    Raises:
        FileNotFoundError: If there is no such data set, or a shard of it is missing.
        InputError: If a split or column cannot be told or does not exist, or labels are not integers 0..C-1.
    """
    if name == 'digits':
        if os.path.isdir(name):
            _logger.warning("'digits' names a folder and digits of scikit-learn, which are loaded, not ./digits")
        available = _load_digits()
    elif os.path.isdir(name):
        folder = os.path.abspath(name)
        check_encoding(folder)
        available = _find_files(Path(folder))
    else:
        available = _load_from_hub(name)
    if val_split and val_fraction:
        raise InputError('--val-split and --val-fraction must not be given both')
    roles = {}
    if training or val_fraction:
        roles['train'] = _pick_split(available, train_split, TRAIN_SPLITS, '--train-split')
    if not val_fraction:
        roles['validation'] = _pick_split(available, val_split, VAL_SPLITS, '--val-split')

    files = {}
    if os.path.isdir(name) and name != 'digits':
        files = {split: available[split] for split in roles.values()}
        if isinstance(next(iter(files.values())), Path):
            available, files = read_folders(files), {}
        else:
            try:
                patterns = {split: [glob.escape(path) for path in paths] for split, paths in files.items()}
                available = datasets.load_dataset('parquet', _state_of(files), data_files=patterns)
            except Exception as e:  # datasets and pyarrow raise many types, and none that they share
                raise InputError(f'data set {name!r} cannot be read: {e.__cause__ or e}') from e
    splits = {role: available[split] for role, split in roles.items()}

    features = next(iter(splits.values())).features
    input_key = _pick_column(features, input_key, datasets.Image, INPUT_KEYS, '--input-key')
    target_key = _pick_column(features, target_key, datasets.ClassLabel, TARGET_KEYS, '--target-key')
    if not isinstance(features[input_key], datasets.Image):
        try:
            splits = {role: split.cast_column(input_key, datasets.Image()) for role, split in splits.items()}
        except (pa.ArrowException, TypeError, ValueError) as e:
            raise InputError(f'column {input_key!r} holds no images but {features[input_key]}') from e
    _check_names(files, target_key)
    class_names = _check_labels({roles[role]: split for role, split in splits.items()}, target_key, training)
    if val_fraction:
        splits = _hold_out(splits['train'], target_key, val_fraction)
    if not training:
        splits.pop('train', None)
    held_out = f'{val_fraction} of ' if val_fraction else ''
    return ImageData(
        splits.get('train'), splits['validation'], input_key, target_key, class_names,
        held_out + str(splits['validation'].split))


def count_classes(data: ImageData, num_classes: int) -> np.ndarray:
    """Count the training images of every class, [num_classes]."""
    return np.bincount(_read_labels(data.train, data.target_key), minlength=num_classes)


def match_classes(
        data: ImageData,
        model: nn.Module,
        *,
        more: bool = False,
        same_names: bool = False,
) -> ImageData:
    """Give labels the indices that a model has for their classes.

    A split may lack classes that the model was trained on, or have them in another order. Where all its classes are
    known to the model by a name of their own, the name decides: names that were saved with weights win. Else the index
    does, with a warning if the names are others.

    Args:
        data: What `load_image_data` found.
        model: timm model.
        more: Whether the model may have more classes than the data where the index decides.
        same_names: Whether the index decides only where the model has no names.

    Returns:
        Data whose class names are those of the model, or the same data if nothing is to be changed.

    Raises:
        InputError: If the model has another number of classes, or other names where that matters, and does not know
            those of the data by name.
    """
    own, names = data.class_names, class_names(model)
    if own == names:
        return data
    counts = Counter(names)
    if names and len(set(own)) == len(own) and all(counts[name] == 1 for name in own):
        return _align(data, names)
    if not (len(own) == model.num_classes or (more and len(own) < model.num_classes)):
        raise InputError(
            f'data must have the {model.num_classes} classes of the model, or some of them by the same names, got '
            f'{len(own)}'
        )
    differ = [pair for pair in zip(own, names or (), strict=False) if pair[0] != pair[1]]
    if differ:
        message = (
            f'{len(differ)} classes are called otherwise in the data than in the model, the first {differ[0][0]!r} '
            f'and {differ[0][1]!r}'
        )
        if same_names:
            raise InputError(message)
        _logger.warning(f'{message}: they are matched by index, which is only right if the order is the same')
    return data


def _align(data: ImageData, names: list[str]) -> ImageData:
    index = np.array([names.index(name) for name in data.class_names])
    feature = datasets.ClassLabel(names=names)

    def align(split: datasets.Dataset | None) -> datasets.Dataset | None:
        if split is None:
            return None
        labels = index[_read_labels(split, data.target_key)]
        return split.remove_columns(data.target_key).add_column(data.target_key, labels, feature=feature)

    return data._replace(train=align(data.train), validation=align(data.validation), class_names=names)


def _load_digits() -> datasets.DatasetDict:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    train, validation = train_test_split(
        np.arange(len(images)), test_size=0.5, stratify=digits.target, random_state=0)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(i) for i in range(10)]))
    return datasets.DatasetDict({
        split: datasets.Dataset.from_dict(
            dict(image=list(images[rows]), label=digits.target[rows]), features=features, split=split)
        for split, rows in (('train', train), ('validation', validation))
    })


def _find_files(folder: Path) -> dict[str, list[str]] | dict[str, Path]:
    """Map the splits in a folder to their parquet files, or to their folders of images."""
    folders = find_splits(folder)
    for place in (folder, folder / 'data'):
        splits: dict[str, list[str]] = {}
        counts: dict[str, int] = {}
        for entry in list_entries(place) if place.is_dir() else ():
            stem, extension = os.path.splitext(entry.name)
            if extension.lower() != '.parquet':
                continue
            shard = re.fullmatch(r'(.+?)[-_.]?(\d+)?(?:-of-(\d+)(?:-\w+)?)?', stem)
            splits.setdefault(shard[1], []).append(entry.path)
            if shard[3]:
                counts[shard[1]] = int(shard[3])
        for split, count in counts.items():
            if len(splits[split]) != count:
                raise InputError(
                    f'split {split!r} in {str(place)!r} must have the {count} files that their names say, got '
                    f'{len(splits[split])}')
        twice = sorted(splits.keys() & folders.keys())
        if twice:
            raise InputError(f'split {twice[0]!r} in {str(folder)!r} must be parquet files or a folder, got both')
        if splits:
            return splits
    if not folders:
        raise FileNotFoundError(f'folder {str(folder)!r} holds no data set: {LAYOUTS}')
    return {'train': folder} if are_classes(folders.values()) else folders


def _state_of(files: Mapping[str, list[str]]) -> str:
    """Name the state of files, by which `datasets` caches what it converts; it looks at their times of change alone."""
    states = [(file.stat().st_size, file.stat().st_ctime_ns) for paths in files.values() for file in map(Path, paths)]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16]


def _load_from_hub(name: str) -> datasets.DatasetDict:
    owner, slash, _ = name.partition('/')
    try:
        validate_repo_id(name)
    except HFValidationError:
        slash = ''
    # what a parent folder is there for is not on the Hub
    if not slash or os.path.exists(name) or os.path.isdir(owner):
        got = 'a file' if os.path.exists(name) else 'not a folder here'
        raise FileNotFoundError(f"no data set {name!r}: {got}, not 'digits', and not an id OWNER/NAME of the Hub")
    try:
        return datasets.load_dataset(name)
    except Exception as e:  # as above
        raise FileNotFoundError(f'no data set {name!r}: not a folder here, and not read from the Hub ({e})') from e


def _pick_split(available: dict[str, Any], given: str | None, usual: tuple[str, ...], flag: str) -> str:
    if given is not None and given not in available:
        raise InputError(f'{flag} must be one of the splits {sorted(available)}, got {given!r}')
    found = [split for split in usual if split in available] if given is None else [given]
    if not found:
        raise InputError(
            f'{flag} must name one of the splits {sorted(available)}, none is called {" or ".join(usual)}: {LAYOUTS}')
    return found[0]


def _hold_out(split: datasets.Dataset, target_key: str, fraction: float) -> dict[str, datasets.Dataset]:
    """Split images into those to train on and those to validate, class by class."""
    labels = _read_labels(split, target_key)
    rng, held_out = np.random.default_rng(0), np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        held_out[rows[:count]] = True
    if not held_out.any():
        raise InputError(f'--val-fraction {fraction} needs a class of at least 2 images')
    return {'train': split.select(np.flatnonzero(~held_out)), 'validation': split.select(np.flatnonzero(held_out))}


def _pick_column(
        features: datasets.Features,
        given: str | None,
        kind: type,
        usual: tuple[str, ...],
        flag: str,
) -> str:
    """Choose a column by the name given, else by its type, else by its name, the name deciding between several."""
    if given is not None:
        if given not in features:
            raise InputError(f'{flag} must be one of the columns {list(features)}, got {given!r}')
        return given
    found = [column for column, feature in features.items() if isinstance(feature, kind)] or list(features)
    if len(found) > 1 or not isinstance(features[found[0]], kind):
        found = [column for column in found if column in usual]
    if len(found) != 1:
        raise InputError(f'{flag} must name one of the columns {list(features)}: which of them it is cannot be told')
    return found[0]


def _read_labels(split: datasets.Dataset, key: str) -> np.ndarray:
    return split.select_columns(key).with_format('numpy')[:][key]


def _check_names(files: Mapping[str, list[str]], key: str) -> None:
    """Check that parquet files that name their classes name them alike; `datasets` takes the names of the first."""
    first = None
    for file in (file for paths in files.values() for file in paths):
        feature = datasets.Features.from_arrow_schema(pq.read_schema(file))[key]
        if isinstance(feature, datasets.ClassLabel):
            first = first or (file, feature.names)
            if feature.names != first[1]:
                raise InputError(
                    f'all files must have the same names of classes in the same order, got others in {file} than in '
                    f'{first[0]}')


def _check_labels(splits: dict[str, datasets.Dataset], key: str, training: bool) -> list[str]:
    """Check that all labels are 0..C-1 and return the names of the classes."""
    labels = {}
    for split, data in splits.items():
        column = data.select_columns(key).with_format('arrow')[:][key]
        if not len(column):
            raise InputError(f'split {split!r} is empty')
        if column.null_count or not pa.types.is_integer(column.type):
            got = f'nothing in row {column.is_null().index(True)}' if column.null_count else column.type
            raise InputError(f'column {key!r} must hold integers 0..C-1, got {got} in split {split!r}')
        labels[split] = column.to_numpy()

    feature = next(iter(splits.values())).features[key]
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
    else:
        present = np.unique(np.concatenate(list(labels.values())))
        # Where it is trained on, every label is there, else the numbers do not begin at 0 or have holes
        names = [str(i) for i in range(len(present) if training else int(present[-1]) + 1)]
    if training and len(names) < 2:
        raise InputError(f'column {key!r} must name at least 2 classes, got {names}')
    for split, values in labels.items():
        wrong = np.flatnonzero((values < 0) | (values >= len(names)))
        if len(wrong):
            raise InputError(
                f'labels must be 0..{len(names) - 1} for {len(names)} classes, '
                f'got {values[wrong[0]]} in row {wrong[0]} of split {split!r}'
            )
    if training:
        (split, trained), *others = labels.items()
        missing = np.setdiff1d(np.arange(len(names)), trained)
        if len(missing):
            message = (
                f'{len(missing)} of {len(names)} classes have no image in split {split!r}, the first is '
                f'{names[missing[0]]!r}')
            if any(np.isin(missing, values).any() for _, values in others):
                raise InputError(f'every class to validate must have images to train on: {message}')
            _logger.warning(message)
    return names
