"""One depth saved as a plain net that timm loads."""
from pathlib import Path
from typing import Any

from timm.data import resolve_input_data_config

from ..hub.save import save_model
from ..models.load import load_model, saved_results, warn_of_untrained
from ..utils.files import staged_folder
from ..weights.download import ARCHITECTURES

__all__ = ['extract_model']


def extract_model(name: str, depth: int, output: str | Path) -> dict[str, Any]:
    """Save one depth of a model such that `timm.create_model('local-dir:OUTPUT', pretrained=True)` loads it.

    The configuration has the model's preprocessing and names of classes, and the results of that depth if they were
    saved with the model.

    Args:
        name: As for `load_model`.
        depth: One of the model's depths.
        output: Folder to write, new or empty.

    Returns:
        output, architecture (timm's name), depth, blocks, trained (whether the depth was), top1 (in percent, None if it
        is not known), imports (packages that must be imported to load it).

    Raises:
        InputError: If there is no such model or depth.
        OSError: If the folder cannot be written.
    """
    with staged_folder(output, new=True) as folder:
        model = load_model(name)
        net = model.extract(depth)
        warn_of_untrained(model, [depth])
        rows = [row for row in saved_results(model) if row['depth'] == depth]
        names = model.pretrained_cfg.get('label_names') or ()
        save_model(net, folder, data_config=resolve_input_data_config(model), class_names=list(names), rows=rows)
    architecture = net.pretrained_cfg['architecture']
    return {
        'output': str(output),
        'architecture': architecture,
        'depth': depth,
        'blocks': list(model.blocks(depth)),
        'trained': depth in model.trained_depths,
        'top1': rows[0].get('top1') if rows else None,
        'imports': ['timm', 'timm_ddnn'] if architecture.startswith(ARCHITECTURES) else ['timm'],
    }
