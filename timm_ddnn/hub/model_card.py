"""The README.md of a published model: what the Hub reads of it, its results per depth, and how it is used."""
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import CardData

from ..utils.schema import flag, integer, items, mapping, number, optional, record, text
from ..weights.download import ARCHITECTURES

__all__ = ['SUMMARY', 'cost_cells', 'create_model_card', 'markdown_table']


PAPER = 'https://arxiv.org/abs/2103.00793'
CITATION = """@article{ekd2021,
  title   = {Embedded Knowledge Distillation in Depth-level Dynamic Neural Network},
  author  = {Zhao, Qi and Lyu, Shuchang and Zhang, Zhiwei and Xu, Ting-Bing and Cheng, Guangliang},
  journal = {arXiv preprint arXiv:2103.00793},
  year    = {2021},
}"""
TEMPLATE = Template("""---
$metadata
---

# $name

Weights of `$architecture` for [timm](https://github.com/huggingface/pytorch-image-models), made with timm_ddnn.

$table
Parameters and multiply-accumulates (MACs) are those of the plain net of a depth. Top-1 and top-5 accuracy in percent.
$plot
## Use

```python
import timm
import torch$import_library
from PIL import Image, ImageOps

model = timm.create_model('hf-hub:$repo_id', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
photo = ImageOps.exif_transpose(Image.open('photo.jpg')).convert('$mode')
image = transform(photo).unsqueeze(0)
with torch.inference_mode():
    probabilities = model(image).softmax(-1)$other_depth
```

## Training

- data: $data, $training_images images to train
- weights: $weights
- accuracy: on $validation_images images, split $split
- recipe: $recipe
- seed: $seed
- precision: $precision
- hardware: $hardware
- versions: $versions

## Files

`model.safetensors` has $weights_bytes bytes and the SHA-256 `$weights_sha256`. There are no pickled weights.

## License

$license

## Citation

```bibtex
$citation
```
""")
IMPORT = "\nimport timm_ddnn  # pip install timm-ddnn; registers the model, without it timm says 'Unknown model'"
OTHER_DEPTH = """
    probabilities = model(image, depth=$depth).softmax(-1)  # the call above is the deepest net
plain = model.extract($depth)  # a copy, as a plain net"""
PLOT = '\n![Accuracy of every depth over its multiply-accumulates]($file)\n'
RECIPE = 'epochs', 'batch_size', 'opt', 'lr', 'sched', 'weight_decay', 'temperature', 'alpha', 'beta'
UNKNOWN = 'not recorded'

# The parts of a run's summary.json that a card shows
SUMMARY = record({}, {
    'arguments': mapping(lambda value: None),
    'training_images': integer(0),
    'validation_images': integer(0),
    'validation_split': text(1_000),
    'weights': text(1_000),
    'data_on_hub': flag,
    'device': text(100),
    'processes': integer(1),
    'mixed_precision': text(100),
    'seconds_per_epoch': number(0),
    'versions': mapping(text(100)),
    'hardware': record({}, {
        'cpu': optional(text(1_000)),
        'cpu_cores': optional(integer(1)),
        'gpus': items(text(1_000)),
    }),
})


def create_model_card(
        config: Mapping[str, Any],
        repo_id: str,
        *,
        summary: Mapping[str, Any] | None = None,
        plot: str | None = None,
        weights_bytes: int,
) -> str:
    """Write the card of a model.

    Args:
        config: Its config.json: of a dynamic-depth model, or of the plain net of one depth. Rows of results are under
            the key 'depths'; accuracies may be missing.
        repo_id: 'owner/name'.
        summary: The summary.json of the run that trained it, if any, as `SUMMARY` describes it.
        plot: File name of the plot of accuracy over multiply-accumulates, if any.
        weights_bytes: Size of the weights.

    Returns:
        Markdown with metadata.
    """
    summary = summary or {}
    architecture, rows, cfg = config['architecture'], config.get('depths', []), config['pretrained_cfg']
    dynamic, name = architecture.startswith('ddnn_'), repo_id.rpartition('/')[2]
    arguments = summary.get('arguments', {})
    data = arguments.get('dataset', UNKNOWN)
    data = data if summary.get('data_on_hub') else Path(data).name
    split, license_name = summary.get('validation_split', 'validation'), cfg.get('license') or 'apache-2.0'
    metadata = CardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm'] + ['timm_ddnn', 'dynamic-neural-network'] * dynamic,
        license=license_name,
        **({'datasets': [data]} if summary.get('data_on_hub') else {}),
        **(_model_index(name, rows, data, split) if summary else {}),
    )
    shallow = len(rows) > 1 and dynamic
    return TEMPLATE.substitute(
        metadata=metadata.to_yaml(),
        name=name,
        architecture=architecture,
        table=markdown_table(
            ('depth', 'blocks', 'parameters (M)', 'MACs (M)', 'top-1', 'top-5'),
            [[*cost_cells(row), *(_format(row.get(key)) for key in ('top1', 'top5'))] for row in rows],
        ),
        plot=Template(PLOT).substitute(file=plot) if plot else '',
        import_library=IMPORT if architecture.startswith(ARCHITECTURES) else '',
        repo_id=repo_id,
        mode='L' if cfg.get('input_size', (3,))[0] == 1 else 'RGB',
        other_depth=Template(OTHER_DEPTH).substitute(depth=rows[-1]['depth']) if shallow else '',
        data=data,
        training_images=_format(summary.get('training_images')),
        validation_images=_format(summary.get('validation_images')),
        split=split,
        weights=summary.get('weights', UNKNOWN),
        recipe=', '.join(f'{key.replace("_", " ")} {arguments[key]}' for key in RECIPE if key in arguments) or UNKNOWN,
        seed=arguments.get('seed', UNKNOWN),
        precision=summary.get('mixed_precision', UNKNOWN),
        hardware=_hardware(summary),
        versions=', '.join(f'{key} {value}' for key, value in summary.get('versions', {}).items()) or UNKNOWN,
        weights_bytes=f'{weights_bytes:,}',
        weights_sha256=config['weights_sha256'],
        license=license_name,
        citation=CITATION,
    )


def _model_index(name: str, rows: Sequence[Mapping[str, Any]], data: str, split: str) -> dict[str, Any]:
    """The results as the Hub shows them beside a model."""
    results = [
        {
            'task': {'type': 'image-classification', 'name': f'Image classification at depth {row["depth"]}'},
            'dataset': {'type': data, 'name': data, 'split': split},
            'metrics': [
                {'type': 'accuracy', 'name': f'top-{k} accuracy, depth {row["depth"]}', 'value': row[f'top{k}']}
                for k in (1, 5)
            ],
        }
        for row in rows if 'top1' in row and 'top5' in row
    ]
    return {'metrics': ['accuracy'], 'model-index': [{'name': name, 'results': results}]} if results else {}


def _hardware(summary: Mapping[str, Any]) -> str:
    hardware = summary.get('hardware', {})
    if summary.get('device', 'cpu') != 'cpu':
        return f'{summary.get("processes", 1)} x {next(iter(hardware.get("gpus", ())), summary["device"])}'
    return f'{hardware.get("cpu_cores") or "?"} cores of {hardware.get("cpu") or "a CPU"}' if hardware else UNKNOWN


def _format(value: float | None) -> str:
    return '-' if value is None else f'{value:,}' if isinstance(value, int) else f'{value:.2f}'


def cost_cells(row: Mapping[str, Any]) -> list[str]:
    """Format what a depth costs: depth, blocks, and millions of parameters and of multiply-accumulates.

    Args:
        row: Row with depth, blocks, parameters and macs, as `count_costs` gives it.
    """
    return [
        str(row['depth']), '-'.join(map(str, row['blocks'])), f'{row["parameters"] / 1e6:.3f}',
        f'{row["macs"] / 1e6:.1f}',
    ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a table in Markdown.

    Args:
        head: Names of the columns.
        rows: Cells by row.
    """
    lines = ['| ' + ' | '.join(row) + ' |' for row in (head, *rows)]
    lines.insert(1, '|' + '---|' * len(head))
    return '\n'.join(lines) + '\n'
