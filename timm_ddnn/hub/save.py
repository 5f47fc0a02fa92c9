"""Weights and configuration saved in timm's format."""
import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from ..utils.errors import InputError
from ..utils.files import file_sha256, write_json
from ..utils.schema import read_json, record, text
from ..weights.build import ABOUT_WEIGHTS
from ..weights.download import PREVIOUS

__all__ = ['save_model']


def save_model(
        model: nn.Module,
        folder: Path,
        *,
        data_config: Mapping[str, Any],
        class_names: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
        epoch: int | None = None,
) -> None:
    """Save weights and configuration such that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads them.

    Weights and configuration that lie there are replaced. The older weights stay as long as their configuration does:
    whoever loads in between, or after this process was killed in between, finds both of the same save.

    What the model's configuration says of published weights, such as their tag and license, is not of these, and left
    out. Which ones these come from, the attribute `base_models`, becomes the key 'base_model'.

    Args:
        model: Dynamic-depth model, or the plain net of a depth.
        folder: Folder that exists.
        data_config: Preprocessing of the images, as `timm.data.resolve_data_config` gives it.
        class_names: Name of every class. They are left out if the model has other classes besides.
        rows: Rows of results. They become the key 'depths' of the configuration, which timm passes over.
        epoch: Epochs that the weights were trained for, if that is known: the key 'epoch'.
    """
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)  # safetensors takes no other format
    for key in ABOUT_WEIGHTS:
        model.pretrained_cfg.pop(key, None)
    added = {
        'label_names': list(class_names) if len(class_names) == model.num_classes else None,
        'depths': list(rows),
        'base_model': model.base_models,
        'epoch': epoch,
    }
    new = folder / '.saving'
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir()
    try:
        save_for_hf(
            model,
            new,
            safe_serialization=True,
            model_config={key: value for key, value in added.items() if value not in (None, [])},
            data_config=dict(data_config),
        )
        config = json.loads((new / 'config.json').read_bytes())
        # It stands at top level as well, and transformers cannot load a timm model that gets it twice
        config.get('model_args', {}).pop('num_classes', None)
        config['weights_sha256'] = file_sha256(new / 'model.safetensors')
        write_json(new / 'config.json', config)
        # safetensors lets nobody but the owner read it
        shutil.copymode(new / 'config.json', new / 'model.safetensors')
        if _belong_together(folder):
            os.replace(folder / 'model.safetensors', folder / PREVIOUS)
        for name in ('model.safetensors', 'config.json'):
            os.replace(new / name, folder / name)
        (folder / PREVIOUS).unlink(missing_ok=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _belong_together(folder: Path) -> bool:
    """Whether the weights in a folder are those of its configuration."""
    try:
        config = read_json(folder / 'config.json', record({'weights_sha256': text()}))
        return file_sha256(folder / 'model.safetensors') == config['weights_sha256']
    except (InputError, FileNotFoundError):
        return False
