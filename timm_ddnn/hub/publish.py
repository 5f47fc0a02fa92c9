"""Publication of shared weights, or of one depth, on the Hugging Face Hub; how they come back is in `weights/`."""
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from timm.data import resolve_input_data_config
from torch import nn

from ..models.dynamic_depth import DynamicDepthMixin
from ..models.load import load_model, saved_results
from ..utils.costs import count_costs
from ..utils.errors import InputError
from ..utils.files import file_sha256, git_sha1, write_text
from ..utils.schema import brief, read_json
from ..weights.download import check_client, fetch
from .model_card import SUMMARY, create_model_card, keep_written
from .save import save_model

__all__ = ['Publication', 'push_to_hub']


# Pickle, in all its names, and what safetensors are replaced by: none of it stays beside the weights
OTHER_WEIGHTS = '.bin', '.pt', '.pth', '.pth.tar', '.ckpt', '.pkl', '.pickle', '.safetensors'
PLOT = 'accuracy.png'  # of a run's folder


class Publication(NamedTuple):
    """What was published.

    Attributes:
        url: Address of the repository; of a dry run, the folder.
        commit: Commit that holds the files, None in a dry run.
        files: Size in bytes by file name.
    """
    url: str
    commit: str | None
    files: dict[str, int]


def push_to_hub(
        source: nn.Module | str | Path,
        repo_id: str,
        *,
        depth: int | None = None,
        license: str | None = None,
        private: bool = False,
        revision: str | None = None,
        dry_run: bool = False,
) -> Publication:
    """Publish a model in one commit: model.safetensors, config.json, a model card, and the plot of a run's folder.

    The repository is created if there is none. The same content makes no second commit, and an interrupted publication
    leaves the repository as it was. Weights of other names and formats at the top of the repository are removed by the
    commit. What was written under 'Intended use' and 'Limits' of the card there stays. The token is that of
    `hf auth login` or HF_TOKEN.

    Args:
        source: Dynamic-depth model, or a training run's output folder, timm's too. A folder of this library's training
            knows accuracies and recipe.
        repo_id: 'owner/name'.
        depth: Publish the plain net of this depth, which timm loads without this library (of the CIFAR family, with
            it). All depths if None.
        license: The Hub's identifier of the license of the weights, such as 'apache-2.0'. If None, the card says that
            there is none.
        private: Whether the repository must be private. If not, one that is created is as its owner has it by default.
        revision: Branch, created if there is none. The default branch if None.
        dry_run: Whether to write the files into a folder `output/hub/owner--name` and send nothing.

    Raises:
        InputError: If the source is not a dynamic-depth model, the model has no such depth, a depth was not trained,
            the license is not an identifier, or the repository is public and must be private.
        OSError: If the folder is not complete, or the Hub cannot be reached or refuses.
    """
    try:
        validate_repo_id(repo_id)
        if '/' not in repo_id:
            raise InputError('there is no owner')
    except ValueError as e:
        raise InputError(f"repo_id must be 'owner/name', got {repo_id!r}: {e}") from e
    if license is not None and not re.fullmatch(r'[a-z\d][a-z\d.+-]*', license):
        raise InputError(
            "license must be the Hub's identifier, such as 'apache-2.0', 'cc-by-4.0' or 'other', got " + brief(license))
    with tempfile.TemporaryDirectory(prefix='timm-ddnn-') as temporary:
        folder = Path(temporary) / 'files'
        folder.mkdir()
        _write_files(source, repo_id, depth, folder, license=license, revision=revision)
        if dry_run:
            target = Path('output') / 'hub' / repo_id.replace('/', '--')
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                shutil.rmtree(target)
            shutil.copytree(folder, target)
            return Publication(str(target), None, _sizes(target))
        return _upload(folder, repo_id, private, revision)


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _write_files(
        source: nn.Module | str | Path,
        repo_id: str,
        depth: int | None,
        folder: Path,
        **card_options: Any,
) -> None:
    summary, plot = None, None
    if isinstance(source, nn.Module):
        model, results = source, {}
    else:
        source = Path(source)
        if not any((source / name).is_file() for name in ('config.json', 'args.yaml')):  # the other is timm's
            raise FileNotFoundError(f'source must be a model or the output folder of a run, got {source}')
        model = load_model(f'local-dir:{source}')
        results = {row['depth']: row for row in saved_results(model)}
        if (source / 'summary.json').is_file():
            summary = read_json(source / 'summary.json', SUMMARY)
        if (source / PLOT).is_file() and depth is None:
            plot = shutil.copy(source / PLOT, folder)
    if not isinstance(model, DynamicDepthMixin):
        raise InputError(f'source must be a dynamic-depth model (ddnn_*), got {type(model).__name__}')
    wanted = model.depths if depth is None else (model.resolve_depth(depth),)
    untrained = [d for d in wanted if d not in model.trained_depths]
    if untrained:
        raise InputError(
            f'depths {untrained} are not trained, of {wanted}: train them, calibrate them, or publish one of '
            f'{model.trained_depths} by depth='
        )
    data_config = resolve_input_data_config(model)
    costs = count_costs(model, data_config['input_size'])
    rows = [{**row, **results.get(row['depth'], {})} for row in costs if row['depth'] in wanted]
    save_model(
        model if depth is None else model.extract(depth),
        folder,
        data_config=data_config,
        class_names=model.pretrained_cfg.get('label_names') or (),
        rows=rows,
    )
    config = json.loads((folder / 'config.json').read_bytes())
    size = (folder / 'model.safetensors').stat().st_size
    card = create_model_card(
        config, repo_id, summary=summary, plot=plot and PLOT, weights_bytes=size, **card_options)
    write_text(folder / 'README.md', card)


def _upload(folder: Path, repo_id: str, private: bool, revision: str | None) -> Publication:
    check_client()
    api = HfApi(library_name='timm-ddnn')
    try:
        api.whoami()  # a wrong token ends here, also where there is nothing to change
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(url.repo_id).private:
            raise InputError(f'{repo_id} must be private, got a public repository: make it private, or take another')
        if revision:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        info = api.model_info(url.repo_id, revision=revision, files_metadata=True)
        if any(file.rfilename == 'README.md' for file in info.siblings):
            published = fetch(url.repo_id, 'README.md', revision=info.sha).read_text(encoding='utf-8', errors='replace')
            card = folder / 'README.md'
            write_text(card, keep_written(card.read_text(encoding='utf-8'), published))
        files = _sizes(folder)
        others = _other_weights(info, files)
        if not others and _same(folder, files, info):
            return Publication(str(url), info.sha, files)
        try:
            # one commit, where `upload_folder` may make several, and only if nobody else's came in between
            commit = api.create_commit(
                url.repo_id,
                [CommitOperationAdd(name, folder / name) for name in files]
                + [CommitOperationDelete(name) for name in others],
                commit_message='Publish weights',
                revision=revision,
                parent_commit=info.sha,
            )
        except HfHubHTTPError as e:
            if e.response.status_code != 412:
                raise
            info = api.model_info(url.repo_id, revision=revision, files_metadata=True)
            if not _same(folder, files, info):
                raise OSError('another commit was made at the same time, publish again') from e
            return Publication(str(url), info.sha, files)  # another push of the same content was faster
    except (OSError, HTTPError) as e:
        raise OSError(f'{repo_id} cannot be published: {e}') from e
    except RuntimeError as e:  # by which the client wraps what stopped an upload
        raise OSError(f'{repo_id} cannot be published: {e.__cause__ or e}') from e
    return Publication(str(url), commit.oid, files)


def _other_weights(info: ModelInfo, files: dict[str, int]) -> list[str]:
    names = [file.rfilename for file in info.siblings]
    return [name for name in names if name not in files and '/' not in name and name.endswith(OTHER_WEIGHTS)]


def _same(folder: Path, files: dict[str, int], info: ModelInfo) -> bool:
    """Whether a repository holds these very files."""
    there = {file.rfilename: file for file in info.siblings}
    for name in files:
        file = there.get(name)
        if file is None:
            return False
        found = file_sha256(folder / name) == file.lfs.sha256 if file.lfs else git_sha1(folder / name) == file.blob_id
        if not found:
            return False
    return True
