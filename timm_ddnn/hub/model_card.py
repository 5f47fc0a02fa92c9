"""The README.md of a published model: what the Hub reads of it, its results per depth, and how it is used."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData

__all__ = ['cost_cells', 'create_model_card', 'markdown_table']


PAPER = 'https://arxiv.org/abs/2103.00793'
RECIPE = 'epochs', 'batch_size', 'opt', 'lr', 'sched', 'weight_decay', 'temperature', 'alpha', 'beta', 'seed'
CITATION = """@article{ekd2021,
  title   = {Embedded Knowledge Distillation in Depth-level Dynamic Neural Network},
  author  = {Zhao, Qi and Lyu, Shuchang and Zhang, Zhiwei and Xu, Ting-Bing and Cheng, Guangliang},
  journal = {arXiv preprint arXiv:2103.00793},
  year    = {2021},
}"""


def create_model_card(
        config: Mapping[str, Any],
        repo_id: str,
        *,
        summary: Mapping[str, Any] | None = None,
        picture: str | None = None,
        weights_bytes: int,
) -> str:
    """Write the card of a model.

    Args:
        config: Its config.json: of a dynamic-depth model, or of the plain net of one depth. Rows of results are under
            the key 'depths', see the head of `report.py`; accuracies may be missing.
        repo_id: 'owner/name'.
        summary: The summary.json of the run that trained it, if any.
        picture: File name of the picture of accuracy over multiply-accumulates, if any.
        weights_bytes: Size of the weights.

    Returns:
        Markdown with metadata.
    """
    architecture, rows = config['architecture'], config.get('depths', [])
    dynamic = architecture.startswith('ddnn_')
    name = repo_id.rpartition('/')[2]
    data = _data_name(summary)
    split = (summary or {}).get('validation_split', 'validation')
    parts = [
        f'---\n{_metadata(config, rows, name, data, split, dynamic).to_yaml()}\n---\n',
        f'# {name}\n',
        _introduction(architecture, rows, dynamic, summary),
        _results(rows, data, split, summary),
    ]
    if picture:
        parts.append(f'![Accuracy of every depth over its multiply-accumulates]({picture})\n')
    mode = 'L' if config['pretrained_cfg'].get('input_size', (3,))[0] == 1 else 'RGB'
    parts.append(_usage(architecture, repo_id, rows, dynamic, mode))
    parts.append(_training(summary))
    parts.append(
        f'## Files\n\n`model.safetensors` has {weights_bytes:,} bytes and the SHA-256 `{config["weights_sha256"]}`.\n'
        'There are no pickled weights.\n'
    )
    parts.append(f'## Citation\n\n```bibtex\n{CITATION}\n```\n')
    return '\n'.join(filter(None, parts))


def _data_name(summary: Mapping[str, Any] | None) -> str | None:
    name = (summary or {}).get('arguments', {}).get('dataset')
    if not name:
        return None
    return name if summary.get('data_on_hub') else Path(name).name


def _metadata(
        config: Mapping[str, Any],
        rows: list[Mapping[str, Any]],
        name: str,
        data: str | None,
        split: str,
        dynamic: bool,
) -> CardData:
    tags = ['image-classification', 'timm']
    if dynamic:
        tags += ['timm_ddnn', 'dynamic-neural-network', 'knowledge-distillation']
    metadata: dict[str, Any] = {
        'library_name': 'timm',
        'pipeline_tag': 'image-classification',
        'tags': tags,
        'license': config['pretrained_cfg'].get('license', 'apache-2.0'),
    }
    if data and '/' in data:  # an id on the Hub
        metadata['datasets'] = [data]
    measured = [row for row in rows if 'top1' in row]
    if measured and data:
        metadata['metrics'] = ['accuracy']
        metadata['model-index'] = [{
            'name': name,
            'results': [
                {
                    'task': {'type': 'image-classification', 'name': f'Image classification at depth {row["depth"]}'},
                    'dataset': {'type': data, 'name': data, 'split': split},
                    'metrics': [
                        {'type': 'accuracy', 'name': f'top-{k} accuracy, depth {row["depth"]}', 'value': row[f'top{k}']}
                        for k in (1, 5)
                    ],
                }
                for row in measured
            ],
        }]
    return CardData(**metadata)


def _introduction(
        architecture: str,
        rows: list[Mapping[str, Any]],
        dynamic: bool,
        summary: Mapping[str, Any] | None,
) -> str:
    arguments = (summary or {}).get('arguments', {})
    method = ''
    together = len((summary or {}).get('depths', ())) > 1  # depths that the run trained
    if together and (arguments.get('alpha') or arguments.get('beta')):
        method = (
            f' It was trained by embedded knowledge distillation ([arXiv 2103.00793]({PAPER})): in every step the '
            'deepest net teaches the others.'
        )
    if not dynamic:
        return (
            f'A `{architecture}` for timm: one depth, copied out of a network that holds several in one set of weights.'
            f'{method}\n'
        )
    depths = ', '.join(str(row['depth']) for row in rows)
    return (
        f'A `{architecture}` for [timm](https://github.com/huggingface/pytorch-image-models): one set of weights that '
        f'holds the depths {depths}. The depth is an argument of the call.{method}\n'
    )


def _results(
        rows: list[Mapping[str, Any]],
        data: str | None,
        split: str,
        summary: Mapping[str, Any] | None,
) -> str:
    if not rows:
        return ''
    measured = all('top1' in row for row in rows)
    images = (summary or {}).get('validation_images')
    count = f'the {images:,} images' if images else 'the images'
    where = f'Accuracy in percent on {count} of {data or "its data"}, split {split}. '
    head = ['depth', 'blocks', 'parameters (M)', 'MACs (M)', *(('top-1', 'top-5') if measured else ())]
    cells = [
        [*cost_cells(row), *((f'{row["top1"]:.2f}', f'{row["top5"]:.2f}') if measured else ())]
        for row in rows
    ]
    note = 'Parameters and multiply-accumulates (MACs) are those of the plain net of a depth.'
    return f'## Results\n\n{where if measured else ""}{note}\n\n' + markdown_table(head, cells)


def cost_cells(row: Mapping[str, Any]) -> list[str]:
    """Format what a depth costs: depth, blocks, and millions of parameters and of multiply-accumulates.

    Args:
        row: Row with depth, blocks, parameters and macs, as `report.count_costs` gives it.
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


def _usage(architecture: str, repo_id: str, rows: list[Mapping[str, Any]], dynamic: bool, mode: str) -> str:
    own = dynamic or architecture.startswith('cifar_')
    lines = ['import timm', 'import torch']
    if own:
        lines.append('import timm_ddnn  # pip install timm-ddnn; registers the model')
    lines += [
        'from PIL import Image, ImageOps',
        '',
        f"model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()",
        'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
        f"photograph = ImageOps.exif_transpose(Image.open('photo.jpg')).convert('{mode}')",
        'image = transform(photograph).unsqueeze(0)',
        'with torch.inference_mode():',
        '    probabilities = model(image).softmax(-1)' + ('  # the deepest net' if dynamic else ''),
    ]
    if dynamic and len(rows) > 1:
        depth = rows[-1]['depth']
        lines += [
            f'    probabilities = model(image, depth={depth}).softmax(-1)',
            f'plain = model.extract({depth})  # a copy, as a plain net',
        ]
    code = '## Use\n\n```python\n' + '\n'.join(lines) + '\n```\n'
    if own:
        code += '\nWithout `import timm_ddnn`, timm says `Unknown model`: the import registers the architecture.\n'
    return code


def _training(summary: Mapping[str, Any] | None) -> str:
    if not summary:
        return ''
    arguments = summary['arguments']
    hardware = summary['hardware']
    gpus = hardware['gpus']
    seconds = summary.get('seconds_per_epoch')
    recipe = ', '.join(
        f'{name.replace("_", " ")} {arguments[name]}'
        for name in RECIPE
        if name in arguments
    )
    on_gpu = summary['device'].startswith('cuda')
    machine = (
        f'{summary["processes"]} x {gpus[0]}' if on_gpu else f'{hardware["cpu_cores"]} cores of {hardware["cpu"]}')
    lines = [f'- recipe: {recipe}', f'- precision: {summary["mixed_precision"]}', f'- hardware: {machine}']
    if 'training_images' in summary:
        lines.insert(0, f'- images: {summary["training_images"]:,}')
    if seconds:
        lines.append(f'- time: {seconds:.0f} s per epoch')
    versions = ', '.join(f'{name} {version}' for name, version in summary['versions'].items())
    return '## Training\n\n' + '\n'.join([*lines, f'- versions: {versions}']) + '\n'
