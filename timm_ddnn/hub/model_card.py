"""The README.md of a published model: what the Hub reads of it, its results per depth, and how it is used.

The text is in `card_template.md`.
"""
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import CardData

from ..utils.schema import flag, integer, items, mapping, number, optional, record, text
from ..weights.download import ARCHITECTURES

__all__ = ['SUMMARY', 'cost_cells', 'create_model_card', 'keep_written', 'markdown_table']


CITATION = """@article{ekd2021,
  title   = {Embedded Knowledge Distillation in Depth-level Dynamic Neural Network},
  author  = {Zhao, Qi and Lyu, Shuchang and Zhang, Zhiwei and Xu, Ting-Bing and Cheng, Guangliang},
  journal = {arXiv preprint arXiv:2103.00793},
  year    = {2021},
}"""
IMPORT = "\nimport timm_ddnn  # registers the model: without it timm says 'Unknown model'"
INSTALL = {
    False: 'Install timm:\n\n```sh\npip install timm\n```',
    True: 'timm_ddnn is not on PyPI: install it from a checkout of its repository, and timm with it:\n\n'
          '```sh\npip install .\n```',
}
OTHER_DEPTH = """  # of the deepest net
    fast = model(image, depth=$depth).softmax(-1)[0]
plain = model.extract($depth)  # a copy, as a plain net"""
PLOT = '\n![Accuracy of every depth over its multiply-accumulates]($file)\n'
RECIPE = 'epochs', 'batch_size', 'opt', 'lr', 'sched', 'weight_decay', 'temperature', 'alpha', 'beta'
UNKNOWN = 'not recorded'
TODO = '[More Information Needed]'  # as the Hub's own template has it
WRITTEN = 'Intended use', 'Limits'  # sections that people write
NO_LICENSE = 'No license was given: without one nobody but the owner of the weights may use, change or share them.'
OTHERS_LICENSE = 'Mind the license of the base model, too.'
MAX_CLASSES = 100  # that are named

# The parts of a run's summary.json that a card shows
SUMMARY = record({}, {
    'arguments': mapping(lambda value: None),
    'augmentation': mapping(lambda value: None),
    'weights': text(1_000),
    'training_images': integer(0),
    'validation_images': integer(0),
    'validation_split': text(1_000),
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
        license: str | None = None,
        revision: str | None = None,
        summary: Mapping[str, Any] | None = None,
        plot: str | None = None,
        weights_bytes: int,
) -> str:
    """Write the card of a model.

    Args:
        config: Its config.json: of a dynamic-depth model, or of the plain net of one depth. Rows of results are under
            the key 'depths'; accuracies may be missing.
        repo_id: 'owner/name'.
        license: The Hub's identifier of its license. If None, the card says that there is none.
        revision: Branch that the model is published on, the default branch if None.
        summary: The summary.json of the run that trained it, if any, as `SUMMARY` describes it.
        plot: File name of the plot of accuracy over multiply-accumulates, if any.
        weights_bytes: Size of the weights.

    Returns:
        Markdown with metadata.
    """
    summary = summary or {}
    architecture, rows, cfg = config['architecture'], config.get('depths', []), config['pretrained_cfg']
    dynamic, name = architecture.startswith('ddnn_'), repo_id.rpartition('/')[2]
    own = architecture.startswith(ARCHITECTURES)
    arguments, class_names = summary.get('arguments', {}), config.get('label_names')
    data = arguments.get('dataset', UNKNOWN)
    data = data if summary.get('data_on_hub') else Path(data).name
    split = summary.get('validation_split', 'validation')
    base_models = config.get('base_model', [])
    on_hub = [model for model in base_models if '/' in model]
    metadata = CardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm'] + ['timm_ddnn', 'dynamic-neural-network'] * dynamic,
        **({'license': license} if license else {}),
        # of several base models the Hub would take these weights for a merge
        **({'base_model': on_hub, 'base_model_relation': 'finetune'} if on_hub else {}),
        **({'datasets': [data]} if summary.get('data_on_hub') else {}),
        **(_model_index(name, rows, data, split) if summary else {}),
    )
    shallow = len(rows) > 1 and dynamic
    license_text = [f'{license}.' if license else NO_LICENSE] + [OTHERS_LICENSE] * bool(base_models)
    return Template(Path(__file__).with_name('card_template.md').read_text(encoding='utf-8')).substitute(
        metadata=metadata.to_yaml(),
        name=name,
        architecture=f'Weights of `{architecture}`',
        table=markdown_table(
            ('depth', 'blocks', 'parameters (M)', 'MACs (M)', 'top-1', 'top-5'),
            [[*cost_cells(row), *(_format(row.get(key)) for key in ('top1', 'top5'))] for row in rows],
        ),
        plot=Template(PLOT).substitute(file=plot) if plot else '',
        install=INSTALL[own],
        import_library=IMPORT if own else '',
        source=f'{repo_id}@{revision}' if revision else repo_id,
        mode='L' if cfg['input_size'][0] == 1 else 'RGB',
        other_depth=Template(OTHER_DEPTH).substitute(depth=rows[-1]['depth']) if shallow else '',
        label="model.pretrained_cfg['label_names'][probabilities.argmax()]" if class_names
        else "f'class {probabilities.argmax()}'",
        image_size=_describe_images(cfg),
        classes=_describe_classes(config['num_classes'], class_names),
        todo=TODO,
        starting_weights=_starting_weights(arguments),
        base_model=', '.join(f'[{model}](https://huggingface.co/{model})' if model in on_hub else f'`{model}`'
                             for model in base_models) or 'none',
        teacher=_public_name(arguments.get('teacher') or 'its own deepest net') if arguments else UNKNOWN,
        data=data,
        training_images=_format(summary.get('training_images')),
        augmentation=', '.join(f'{key.replace("_", " ")} {value}' for key, value in summary['augmentation'].items())
        if 'augmentation' in summary else UNKNOWN,
        recipe=', '.join(f'{key.replace("_", " ")} {arguments[key]}' for key in RECIPE if key in arguments) or UNKNOWN,
        seed=arguments.get('seed', UNKNOWN),
        weights=summary.get('weights', UNKNOWN),
        validation_images=_format(summary.get('validation_images')),
        split=split,
        precision=summary.get('mixed_precision', UNKNOWN),
        hardware=_hardware(summary),
        versions=', '.join(f'{key} {value}' for key, value in summary.get('versions', {}).items()) or UNKNOWN,
        weights_bytes=f'{weights_bytes:,}',
        weights_sha256=config['weights_sha256'],
        license=' '.join(license_text),
        citation=CITATION,
    )


def keep_written(card: str, published: str) -> str:
    """Take over from a published card the sections that people write.

    Args:
        card: The new card.
        published: The one that it replaces.
    """
    for title in WRITTEN:
        section = re.compile(rf'^## {title}\n.*?(?=^## )', re.MULTILINE | re.DOTALL)
        found = section.search(published)
        if found:
            card = section.sub(lambda _, found=found: found[0], card)
    return card


def _starting_weights(arguments: Mapping[str, Any]) -> str:
    if not arguments:
        return UNKNOWN
    name = arguments.get('initial_checkpoint') or (arguments.get('pretrained') and arguments.get('model'))
    return _public_name(name) if name else 'random'


def _public_name(name: str) -> str:
    """A model's name without the folders of the machine that it was trained on."""
    return name if name.startswith('hf-hub:') else Path(name).name


def _describe_images(cfg: Mapping[str, Any]) -> str:
    channels, height, width = cfg['input_size']
    colours = {1: 'grey', 3: 'RGB'}.get(channels, f'{channels} channels')
    return f'{width} x {height} px, {colours}; `transform` resizes and crops to it'


def _describe_classes(count: int, names: Sequence[str] | None) -> str:
    if not names:
        return f'{count}, without names'
    more = f' and {count - MAX_CLASSES} more, which `config.json` names' if count > MAX_CLASSES else ''
    return f'{count}: ' + ', '.join(f'`{name}`' for name in names[:MAX_CLASSES]) + more


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
