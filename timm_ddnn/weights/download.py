"""Where weights come from: the Hugging Face Hub or a folder, and what is verified before they are loaded.

Models are built of them in `build.py`. huggingface_hub checks the size of what it downloads and nothing of what it
finds in its cache, hence the checksums here.
"""
import hashlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import getproxies

import torch
from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from timm.models._hub import _parse_model_cfg

from ..utils.errors import InputError
from ..utils.files import file_sha256, git_sha1
from ..utils.schema import judge, read_json, record, text
from .config_checks import BASE_MODEL, CONFIG
from .weight_checks import read_checkpoint, read_tensors

__all__ = [
    'ARCHITECTURES', 'PREVIOUS', 'SavedConfig', 'Weights', 'check_client', 'fetch', 'find_weights', 'read_config',
]


PREVIOUS = '.previous.safetensors'  # weights of the config.json in a folder whose weights are being replaced
ARCHITECTURES = 'ddnn_', 'cifar_resnet', 'dynamic_timm', 'shallow_timm'  # of this library, beginnings
PROXY = r'((https?|socks5h?)://)?([^/@]*@)?([^/@:\[\]]+|\[[\da-fA-F:]+\])(:\d+)?/?'  # [scheme://][user:password@]host[:port]
_logger = logging.getLogger(__name__)


def check_client() -> None:
    """Check what the client of the Hub takes from the environment, where it does not name the cause itself.

    Raises:
        InputError: If a variable cannot be right; the message says which and what to do.
    """
    certificates = os.environ.get('SSL_CERT_FILE')
    if certificates and not os.path.isfile(certificates):
        raise InputError(f'SSL_CERT_FILE must be a file, got {certificates!r}: correct it or unset it')
    for scheme in ('http', 'https', 'all'):
        proxy, name = getproxies().get(scheme), f'{scheme.upper()}_PROXY'  # may hold a password: it is not shown
        if proxy and not re.fullmatch(PROXY, proxy):
            raise InputError(f'{name} must be as http://host:port, which its value is not: correct it or unset it')
        if proxy and proxy.startswith('socks') and find_spec('socksio') is None:
            raise InputError(f"{name} names a SOCKS proxy, which needs a package: pip install 'httpx[socks]'")
    token = get_token() or ''
    if not (token.isascii() and token.isprintable()):
        raise InputError(
            'the token of HF_TOKEN or `hf auth login` must be plain ASCII, as `hf_...`, got one with other characters: '
            'copy it anew, without quotation marks'
        )


def fetch(
        repo_id: str,
        filename: str,
        *,
        revision: str | None = None,
        sha256: str | None = None,
        cache_dir: str | Path | None = None,
) -> Path:
    """Download a file from the Hub, or find it in the cache, and verify it.

    The checksums are the one given and the one that the Hub announced, which is the name of the file's blob in the
    cache. A file that differs is downloaded once more; if it differs again it is removed from the cache.

    Args:
        repo_id: 'owner/name'.
        filename: Name in the repository.
        revision: Branch, tag or commit, the default branch if None.
        sha256: The file's SHA-256 in hexadecimal, if known.
        cache_dir: Cache of huggingface_hub, the user's if None.

    Returns:
        Path in the cache. The name of its folder is the commit.

    Raises:
        InputError: If the environment of the client is wrong, see `check_client`.
        OSError: If there is no such file or repository, it cannot be reached, or what comes is damaged.
    """
    download = dict(repo_id=repo_id, filename=filename, revision=revision, cache_dir=cache_dir)
    check_client()
    try:
        path = Path(hf_hub_download(**download))
    except LocalEntryNotFoundError as e:
        raise LocalEntryNotFoundError(
            f'{filename} of {repo_id} is not in the cache, and the Hub is not reached: {e}') from e
    except (HTTPError, RuntimeError) as e:
        if isinstance(e, OSError):  # as most of them are, and say what is wrong
            raise
        raise OSError(f'{filename} of {repo_id} cannot be downloaded: {e or type(e).__name__}') from e
    damage = _damage(path, sha256)
    if damage is None:
        return path
    _logger.warning(f'{filename} of {repo_id} is damaged in the cache ({damage}), downloading it again: {path}')
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError('HF_HUB_OFFLINE is set')
        path = Path(hf_hub_download(**download, force_download=True))
    except (OSError, HTTPError, RuntimeError) as e:
        raise OSError(f'{filename} of {repo_id} is damaged ({damage}), and cannot be downloaded again: {e}') from e
    again = _damage(path, sha256)
    if again is None:
        return path
    for broken in (path.resolve(), _blob(path), path):
        broken.unlink(missing_ok=True)
    raise OSError(f'{filename} of {repo_id} came damaged twice, the second time {again}; it was removed from the cache')


def _blob(path: Path) -> Path:
    """The file's place among the blobs of its repository, which under Xet is a link to yet another place."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _damage(path: Path, sha256: str | None) -> str | None:
    """Say how a file in the cache differs from its checksums, or None."""
    sums = {} if sha256 is None else {'sha256': sha256}
    announced = _blob(path).name  # the ETag: the SHA-256 of a large file, git's checksum of a small one
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


class SavedConfig(dict):
    """timm's pretrained configuration as a config.json has it, and what else stands there.

    Attributes:
        architecture: Name of the architecture.
        model_args: Arguments of its entrypoint.
        depths: Rows of results, one per depth, if this library saved it.
        weights_sha256: Checksum of the weights, if this library saved it.
        base_models: As in `Weights`.
        commit: Commit of the repository, None for a folder.
    """

    architecture: str
    model_args: dict[str, Any]
    depths: list[dict[str, Any]]
    weights_sha256: str | None
    base_models: list[str]
    commit: str | None


def read_config(name: str, cache_dir: str | Path | None = None) -> SavedConfig:
    """Read and verify the config.json of a folder or a repository on the Hub.

    One of a dynamic-depth model or a plain CIFAR ResNet must be as `config_checks` describes it. Any other is parsed as
    timm does.

    Args:
        name: 'local-dir:FOLDER' or 'hf-hub:ID'.
        cache_dir: As for `fetch`.

    Raises:
        InputError: If it is damaged, or asks for what this library does not build.
        OSError: If there is none, it cannot be reached, or it comes damaged.
    """
    source, _, place = name.partition(':')
    if source == 'local-dir':
        path, origin = Path(place) / 'config.json', {'file': str(Path(place)), 'source': source}
        if not path.is_file():
            raise FileNotFoundError(f'{place} is not the folder of a model: it has no config.json')
    else:
        repo_id, _, revision = place.partition('@')
        path = fetch(repo_id, 'config.json', revision=revision or None, cache_dir=cache_dir)
        origin = {'hf_hub_id': place, 'source': 'hf-hub'}
    title = f'config.json of {place}'
    config = read_json(path, record({'architecture': text()}), title)
    own = config['architecture'].startswith(ARCHITECTURES)
    if own:
        judge(config, CONFIG, title)
    cfg, architecture, model_args = _parse_model_cfg(config, origin)
    saved = SavedConfig(cfg)
    saved.architecture, saved.model_args = architecture, model_args
    saved.depths = config.get('depths', []) if own else []
    saved.weights_sha256 = config.get('weights_sha256', '').lower() or None if own else None
    base_models = [repo_id] if source == 'hf-hub' else config.get('base_model', [])
    saved.base_models = base_models if BASE_MODEL(base_models) is None else []
    saved.commit = None if source == 'local-dir' else path.parent.name
    return saved


class Weights(NamedTuple):
    """Weights as they were read.

    Attributes:
        tensors: Tensors by name.
        source: What error messages call the place that they come from.
        saved: The config.json beside them, if there is one.
        base_models: Names under which others find these weights or, of a folder, what these come from: 'owner/name' on
            the Hub, or name and tag of weights that come with this library. None for a file.
    """
    tensors: dict[str, torch.Tensor]
    source: str
    saved: SavedConfig | None = None
    base_models: Sequence[str] = ()


def find_weights(
        cfg: Mapping[str, Any],
        saved: SavedConfig | None = None,
        cache_dir: str | Path | None = None,
) -> Weights | None:
    """Find, verify and read the weights that a pretrained configuration names.

    Args:
        cfg: timm's pretrained configuration.
        saved: The config.json beside the weights, read here if None.
        cache_dir: As for `fetch`.

    Returns:
        The weights, or None if the configuration names no place but a URL.

    Raises:
        InputError: If the weights are in another format.
        OSError: If there are none, they cannot be reached, or they are damaged.
    """
    if cfg.get('source') == 'local-dir':
        weights = _read_folder(Path(cfg['file']), saved or read_config(f'local-dir:{cfg["file"]}'))
        if saved is None and cfg.get('tag'):
            return weights._replace(base_models=(f'{cfg["architecture"]}.{cfg["tag"]}',))
        return weights._replace(base_models=weights.saved.base_models)
    if cfg.get('source') != 'hf-hub' and cfg.get('state_dict'):
        return Weights(dict(cfg['state_dict']), 'state_dict')
    if cfg.get('source') != 'hf-hub' and cfg.get('file'):
        return Weights(read_checkpoint(cfg['file']), cfg['file'])
    if not cfg.get('hf_hub_id'):
        return None
    repo_id, _, revision = cfg['hf_hub_id'].partition('@')
    filename = cfg.get('hf_hub_filename') or 'model.safetensors'
    if not filename.endswith('.safetensors'):
        raise InputError(f'weights must be in a file *.safetensors, got {filename!r} of {repo_id}')
    if saved is None and filename == 'model.safetensors':
        try:
            saved = read_config(f'hf-hub:{cfg["hf_hub_id"]}', cache_dir)
        except EntryNotFoundError as e:
            if cfg.get('source') == 'hf-hub' and isinstance(e, LocalEntryNotFoundError):
                raise
            _logger.info(f'{repo_id} has no config.json, or none in the cache')  # a tag needs the weights alone
    # of the commit of config.json: another one may follow in between
    revision, sha256 = (saved.commit, saved.weights_sha256) if saved else (revision or None, None)
    try:
        path = fetch(repo_id, filename, revision=revision, sha256=sha256, cache_dir=cache_dir)
    except LocalEntryNotFoundError:
        raise  # not in the cache and not reached
    except EntryNotFoundError as e:
        raise FileNotFoundError(f'{repo_id} has no {filename}, and weights of other formats are not loaded: {e}') from e
    return Weights(read_tensors(path.read_bytes(), str(path)), str(path), saved, (repo_id,))


def _read_folder(folder: Path, saved: SavedConfig) -> Weights:
    """Read the weights of a configuration from a folder where another process may be saving at this time."""
    while True:
        damage = None
        for path in (folder / 'model.safetensors', folder / PREVIOUS):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            got, expected = hashlib.sha256(content).hexdigest(), saved.weights_sha256
            if got == (expected or got):
                return Weights(read_tensors(content, str(path)), str(path), saved)
            damage = damage or f'{path} is damaged: SHA-256 {got} instead of {expected} as config.json says'
        newer = read_config(f'local-dir:{folder}')
        if newer.weights_sha256 == saved.weights_sha256:
            raise OSError(damage) if damage else FileNotFoundError(
                f'weights must be in model.safetensors, which is not in {folder}')
        if (newer.architecture, newer.model_args, newer) != (saved.architecture, saved.model_args, saved):
            raise OSError(f'another model was saved in {folder} while it was read: load it again')
        saved = newer
