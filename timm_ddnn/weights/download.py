"""Where weights come from: the Hugging Face Hub or a folder, and what is verified before they are loaded.

Models are built of them in `build.py`. huggingface_hub checks the size of what it downloads and nothing of what it
finds in its cache, hence the checksums here.
"""
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError

from ..utils.files import file_sha256, git_sha1

__all__ = ['ORGANIZATION', 'fetch', 'find_weights', 'read_config']


# Owner of the repositories that the tags of this library name
ORGANIZATION = os.environ.get('TIMM_DDNN_ORGANIZATION', 'timm-ddnn')
_logger = logging.getLogger(__name__)


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
    path, _ = _fetch(repo_id, filename, revision, sha256, cache_dir)
    return path


def _fetch(
        repo_id: str,
        filename: str,
        revision: str | None,
        sha256: str | None,
        cache_dir: str | Path | None,
) -> tuple[Path, bool]:
    """Do what `fetch` does, and tell whether the file was found damaged and downloaded again."""
    download = dict(repo_id=repo_id, filename=filename, revision=revision, cache_dir=cache_dir)
    try:
        path = Path(hf_hub_download(**download))
    except LocalEntryNotFoundError as e:
        raise LocalEntryNotFoundError(f'{filename} of {repo_id} is not on the disk, and is not reached: {e}') from e
    except (HTTPError, RuntimeError) as e:
        if isinstance(e, OSError):  # as most of them are, and say what is wrong
            raise
        raise OSError(f'{filename} of {repo_id} cannot be downloaded: {e or type(e).__name__}') from e
    damage = _damage(path, sha256)
    if damage is None:
        return path, False
    _logger.warning(f'{filename} of {repo_id} is damaged in the cache ({damage}), downloading it again: {path}')
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError('HF_HUB_OFFLINE is set')
        path = Path(hf_hub_download(**download, force_download=True))
    except (OSError, HTTPError, RuntimeError) as e:
        raise OSError(f'{filename} of {repo_id} is damaged ({damage}), and cannot be downloaded again: {e}') from e
    again = _damage(path, sha256)
    if again is None:
        return path, True
    for broken in (path.resolve(), _blob(path), path):
        broken.unlink(missing_ok=True)
    raise OSError(f'{filename} of {repo_id} came damaged twice, the second time {again}; it was removed from the cache')


def _blob(path: Path) -> Path:
    """The file's place among the blobs of its repository, which under Xet is a link to yet another place."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _damage(path: Path, sha256: str | None) -> str | None:
    """Say how a file in the cache differs from its sums, or None."""
    sums = {} if sha256 is None else {'sha256': sha256}
    announced = _blob(path).name  # the ETag: the SHA-256 of a large file, git's sum of a small one
    kind = {64: 'sha256', 40: 'git'}.get(len(announced))
    if kind and announced != path.name:
        sums.setdefault(kind, announced)
        if sums[kind] != announced:
            return f'{kind} {announced} announced, {sums[kind]} published'
    for kind, expected in sums.items():
        got = (file_sha256 if kind == 'sha256' else git_sha1)(path)
        if got != expected:
            return f'{kind} {got} instead of {expected}'
    return None


def read_config(name: str, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Read and verify the config.json of a dynamic-depth model or a plain CIFAR ResNet, before timm makes one of it.

    Args:
        name: 'local-dir:FOLDER' or 'hf-hub:ID'.
        cache_dir: As for `fetch`.

    Raises:
        ValueError: If it is of no such model.
        OSError: If there is none, it cannot be reached, or it is damaged.
    """
    source, _, place = name.partition(':')
    if source == 'local-dir':
        path = Path(place) / 'config.json'
        if not path.is_file():
            raise FileNotFoundError(f'{place} is no folder of a model: it has no config.json')
    else:
        repo_id, _, revision = place.partition('@')
        path = fetch(repo_id, 'config.json', revision=revision or None, cache_dir=cache_dir)
    try:
        config = json.loads(path.read_bytes())
    except ValueError as e:
        raise ValueError(f'config.json of {place} is no JSON: {e}') from None
    architecture = config.get('architecture') if isinstance(config, dict) else None
    if not (isinstance(architecture, str) and architecture.startswith(('ddnn_', 'cifar_resnet'))):
        raise ValueError(f"config.json of {place} must be of an architecture 'ddnn_*', got {str(architecture)[:80]!r}")
    for key in ('pretrained_cfg', 'model_args'):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f'{key} in config.json of {place} must be a mapping, got {str(config[key])[:80]!r}')
    return config


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
        if published is not None and file_sha256(path) != published:
            raise OSError(f'{path} is damaged: SHA-256 {file_sha256(path)} instead of {published} as config.json says')
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
        own = cfg.get('source') == 'hf-hub'  # timm has read that config.json, where a tag needs the weights alone
        try:
            config, repaired = _fetch(repo_id, 'config.json', place['revision'], None, cache_dir)
        except EntryNotFoundError as e:
            if own and isinstance(e, LocalEntryNotFoundError):
                raise
            _logger.info(f'{repo_id} has no config.json, or none in the cache')
        else:
            if own and repaired:
                raise OSError(f'config.json of {repo_id} was damaged in the cache and was downloaded again: load again')
            published = _published_sum(config)
            place['revision'] = config.parent.name  # the commit: another one may follow in between
    try:
        return fetch(repo_id, filename, sha256=published, **place)
    except LocalEntryNotFoundError:
        raise  # not on the disk and not reached
    except EntryNotFoundError as e:
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
