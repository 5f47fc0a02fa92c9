"""Where weights come from: the Hugging Face Hub or a folder, and what is verified before they are loaded.

What is published is in `publish.py`. huggingface_hub checks the size of what it downloads and nothing of what it finds
in its cache, hence the sums here.
"""
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from timm.models import PretrainedCfg
from torch import nn

__all__ = ['ORGANIZATION', 'check_config', 'check_size', 'fetch', 'file_sum', 'find_weights']

# Owner of the repositories that the tags of this library name
ORGANIZATION = os.environ.get('TIMM_DDNN_ORGANIZATION', 'timm-ddnn')

# What a configuration from elsewhere may ask for
MAX_BLOCKS = 1_000
MAX_WIDTH = 1_000_000
MAX_PARAMETERS = 1_000_000_000

_logger = logging.getLogger(__name__)


def file_sum(path: str | Path, kind: str = 'sha256') -> str:
    """Compute the sum of a file, 'sha256', or 'git' for the SHA-1 under which git stores it; hexadecimal."""
    if kind == 'sha256':
        with open(path, 'rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    content = Path(path).read_bytes()
    return hashlib.sha1(b'blob %d\0' % len(content) + content, usedforsecurity=False).hexdigest()


def fetch(
        repo_id: str,
        filename: str,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        cache_dir: str | Path | None = None,
) -> Path:
    """Download a file from the Hub, or find it in the cache, and verify it.

    The sums are the one given and the one that the Hub announced, which is the name of the file's blob in the cache. A
    file that differs is downloaded once more; if it differs again it is removed from the cache.

    Args:
        repo_id: 'owner/name'.
        filename: Name in the repository.
        revision: Branch, tag or commit, the default branch if None.
        sha256: The file's SHA-256 in hexadecimal, if known.
        cache_dir: Cache of huggingface_hub, the user's if None.

    Returns:
        Path in the cache.

    Raises:
        OSError: If there is no such file or repository, it cannot be reached, or what comes is damaged.
    """
    download = dict(repo_id=repo_id, filename=filename, revision=revision, cache_dir=cache_dir)
    path = Path(hf_hub_download(**download))
    damage = _damage(path, sha256)
    if damage is None:
        return path
    _logger.warning(f'{filename} of {repo_id} is damaged in the cache ({damage}), downloading it again: {path}')
    blob = path.resolve()
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError('HF_HUB_OFFLINE is set')
        path = Path(hf_hub_download(**download, force_download=True))
    except OSError as e:
        raise OSError(f'{filename} of {repo_id} is damaged ({damage}), and cannot be downloaded again: {e}') from e
    again = _damage(path, sha256)
    if again is None:
        return path
    for broken in {blob, path.resolve(), path}:
        broken.unlink(missing_ok=True)
    raise OSError(f'{filename} of {repo_id} came damaged twice, the second time {again}; it was removed from the cache')


def _damage(path: Path, sha256: str | None) -> str | None:
    """Say how a file in the cache differs from its sums, or None."""
    sums = {} if sha256 is None else {'sha256': sha256}
    blob = path.resolve().name  # the ETag: the SHA-256 of a large file, git's sum of a small one
    kind = {64: 'sha256', 40: 'git'}.get(len(blob))
    if kind and blob != path.name:
        sums.setdefault(kind, blob)
        if sums[kind] != blob:
            return f'{kind} {blob} announced, {sums[kind]} published'
    for kind, expected in sums.items():
        got = file_sum(path, kind)
        if got != expected:
            return f'{kind} {got} instead of {expected}'
    return None


def find_weights(cfg: Mapping[str, Any], cache_dir: str | Path | None = None) -> Path | None:
    """Find and verify the safetensors file that a pretrained configuration names.

    Args:
        cfg: timm's pretrained configuration.
        cache_dir: As for `fetch`.

    Returns:
        The file, or None where the configuration names neither a folder nor a repository on the Hub.

    Raises:
        ValueError: If the weights are in another format.
        OSError: If there are none, they cannot be reached, or they are damaged.
    """
    if cfg.get('source') == 'local-dir':
        folder = Path(cfg['file'])
        path = folder / 'model.safetensors'
        if not path.is_file():
            raise FileNotFoundError(f'weights must be in model.safetensors, which is not in {folder}')
        published = _published_sum(folder / 'config.json')
        if published is not None and file_sum(path) != published:
            raise OSError(f'{path} is damaged: SHA-256 {file_sum(path)} instead of {published} as config.json says')
        return path
    if (cfg.get('source') != 'hf-hub' and (cfg.get('state_dict') or cfg.get('file'))) or not cfg.get('hf_hub_id'):
        return None
    repo_id, _, revision = cfg['hf_hub_id'].partition('@')
    filename = cfg.get('hf_hub_filename') or 'model.safetensors'
    if not filename.endswith('.safetensors'):
        raise ValueError(f'weights must be in a file *.safetensors, got {filename!r} of {repo_id}')
    place = dict(revision=revision or None, cache_dir=cache_dir)
    published = None
    if filename == 'model.safetensors':
        try:
            config = fetch(repo_id, 'config.json', **place)
        except EntryNotFoundError:
            if constants.HF_HUB_OFFLINE:
                raise
        else:
            published = _published_sum(config)
            place['revision'] = config.parent.name  # the commit: another one may follow in between
    try:
        return fetch(repo_id, filename, sha256=published, **place)
    except EntryNotFoundError as e:
        if isinstance(e, OSError) and not hasattr(e, 'response'):
            raise  # not on the disk and not reached
        raise FileNotFoundError(f'{repo_id} has no {filename}, and weights of other formats are not loaded: {e}') from e


def _published_sum(path: Path) -> str | None:
    """Read the sum of the weights that stands in a config.json, None if none does."""
    try:
        published = json.loads(path.read_text())['weights_sha256']
    except (KeyError, TypeError):
        return None
    if not (isinstance(published, str) and len(published) == 64):
        raise ValueError(f'weights_sha256 in {path} must be 64 hexadecimal digits, got {str(published)[:80]!r}')
    return published.lower()


def check_config(cfg: Mapping[str, Any]) -> None:
    """Check the pretrained configuration of a config.json from elsewhere.

    Args:
        cfg: As timm reads it.

    Raises:
        ValueError: If it has unknown entries or wrong types, or names files.
    """
    known = {field.name for field in fields(PretrainedCfg)}
    unknown = sorted(set(cfg) - known)
    if unknown:
        raise ValueError(f'pretrained_cfg in config.json must have keys of {sorted(known)}, got {unknown}')
    own = {'local-dir': 'file', 'hf-hub': 'hf_hub_id'}[cfg['source']]
    for key in {'url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'custom_load'} - {own}:
        if cfg.get(key):
            raise ValueError(f'pretrained_cfg in config.json must not say where weights are, got {key}={cfg[key]!r}')

    def is_list(value: Any, kind: type | tuple[type, ...], length: int | None = None) -> bool:
        return isinstance(value, list | tuple) and (length is None or len(value) == length) and all(
            isinstance(item, kind) and not isinstance(item, bool) for item in value)

    size = cfg.get('input_size', (3, 224, 224))
    if not (is_list(size, int, 3) and 1 <= size[0] <= 1024 and all(1 <= side <= 16_384 for side in size[1:])):
        raise ValueError(f'input_size in config.json must be channels, height and width, got {str(size)[:80]}')
    for key in ('mean', 'std'):
        if not is_list(cfg.get(key, [0.0]), (int, float)) or len(cfg.get(key, [0.0])) not in (1, size[0]):
            raise ValueError(f'{key} in config.json must be {size[0]} numbers, got {str(cfg[key])[:80]}')
    classes = cfg.get('num_classes', 1000)
    if type(classes) is not int or not 0 <= classes <= MAX_WIDTH:
        raise ValueError(f'num_classes in config.json must be an integer from 0 to {MAX_WIDTH}, got {classes!r}')


def check_size(cls: type[nn.Module], model_args: Mapping[str, Any], weights: Path | None) -> None:
    """Check what a config.json from elsewhere would build, before memory is taken for it.

    Args:
        cls: Class of the model.
        model_args: Its arguments.
        weights: The safetensors file that is to be loaded, if any.

    Raises:
        ValueError: If the arguments make no model, or one that is much larger than its weights.
    """
    def check(name: str, value: Any) -> None:
        if isinstance(value, list | tuple):
            if len(value) > MAX_BLOCKS:
                raise ValueError(f'{name} in config.json must have at most {MAX_BLOCKS} entries, got {len(value)}')
            for item in value:
                check(name, item)
        elif isinstance(value, int | float) and abs(value) > MAX_WIDTH:
            raise ValueError(f'{name} in config.json must be at most {MAX_WIDTH}, got {value}')

    for name, value in model_args.items():
        check(name, value)
    layers, subnets = model_args['layers'], model_args.get('subnets', ())
    for name, value in [('layers', layers), *(('subnets', subnet) for subnet in subnets)]:
        if not (isinstance(value, list | tuple) and all(type(count) is int and count > 0 for count in value)):
            raise ValueError(f'{name} in config.json must be numbers of blocks per stage, got {value!r}')
    blocks = sum(layers) * (1 + len(subnets))
    if blocks > MAX_BLOCKS:
        raise ValueError(f'layers and subnets in config.json must be of at most {MAX_BLOCKS} blocks, got {blocks}')
    try:
        model = cls(**{**model_args, 'device': 'meta'})
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as e:
        raise ValueError(f'model_args in config.json make no {cls.__name__}: {e}') from e
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    allowed = MAX_PARAMETERS
    if weights is not None:
        with safe_open(weights, framework='pt') as file:
            held = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        allowed = 2 * held + 100_000_000  # a larger classifier, and statistics of sub-nets that the file has not
    if count > allowed:
        held = '' if weights is None else f', the weights hold {held}'
        raise ValueError(f'config.json must describe a model of at most {allowed} values, got {count}{held}')
