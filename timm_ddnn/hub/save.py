"""Weights and configuration saved in timm's format."""
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

from ..utils.files import file_sha256, write_json

__all__ = ['save_model']


def save_model(
        model: nn.Module,
        folder: Path,
        *,
        data_config: Mapping[str, Any],
        class_names: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
) -> None:
    """Save weights and configuration such that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads them.

    Args:
        model: Dynamic-depth model.
        folder: Folder that exists. Of files with the same names the new ones take the place, one by one.
        data_config: Preprocessing of the images, as `timm.data.resolve_data_config` gives it.
        class_names: Name of every class. They are left out if the model has other classes besides.
        rows: Rows of results. They become the key 'depths' of the configuration, which timm passes over.
    """
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)  # safetensors takes no other format
    label_names = list(class_names) if len(class_names) == model.num_classes else None
    with tempfile.TemporaryDirectory(dir=folder, prefix='.model-') as temporary:
        save_for_hf(
            model,
            temporary,
            safe_serialization=True,
            model_config={'label_names': label_names, 'depths': list(rows)},
            data_config=dict(data_config),
        )
        path = Path(temporary) / 'config.json'
        config = json.loads(path.read_bytes())
        # It stands at top level as well, and transformers cannot load a timm model that gets it twice
        config.get('model_args', {}).pop('num_classes', None)
        config['weights_sha256'] = file_sha256(Path(temporary) / 'model.safetensors')
        write_json(path, config)
        shutil.copymode(path, Path(temporary) / 'model.safetensors')  # safetensors lets nobody but the owner read it
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(temporary) / name, folder / name)
