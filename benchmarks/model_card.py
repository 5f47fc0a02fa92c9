#!/usr/bin/env python3
"""Write MODEL_CARD.md, the card of the weights that come with the library, from what was measured of them.

    python benchmarks/model_card.py

Of each tag it reads config.json beside the weights and, in results/weights/TAG, evaluation.json, profile.json and, if
the weights were evaluated on images that played no part in any choice, sealed.json. `make_tag.py` makes a tag.
"""
import json
from pathlib import Path

from results import RESULTS
from timm_ddnn.hub.model_card import CITATION, markdown_table
from timm_ddnn.models.ddnn_resnet import WEIGHTS
from timm_ddnn.utils.files import write_text

ROOT = RESULTS.parent
CARD = """## {tag}

{table}
Top-1, top-5 and expected calibration error (ECE) in percent of {images:,} validation images; parameters and
multiply-accumulates (MACs) are those of the plain net of a depth. Latency: one image on one thread of {cpu}, eager,
median.{sealed}

- **Method:** {method}
- **Training:** {epochs} epochs, {hours:.1f} h on {machine}; the options are those of
  `{run}` in `results/runs.csv`.
- **Data:** {data}
- **By class:** {by_class}
"""
HEAD = """# Model card

Weights that come with timm_ddnn, under Apache-2.0: small nets for images of 32 px, of the classes of CIFAR-10
or CIFAR-100. They come from short schedules, show what depth costs, and are not the best nets of their size.

`timm.create_model('ddnn_resnet20', pretrained=True)` takes `ddnn_resnet20.kd_cifar10`, `ddnn_resnet56` takes
`ddnn_resnet56.ekd_cifar10`, and `ddnn_cifar_resnet18_025` takes `ddnn_cifar_resnet18_025.ekd_cifar100`. The others are
asked for by name.

```python
import timm
import timm_ddnn  # registers the models
from PIL import Image

model = timm.create_model('ddnn_resnet20.kd_cifar10', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = transform(Image.open('photo.jpg').convert('RGB')).unsqueeze(0)  # [1, 3, 32, 32]
probabilities = model(image, depth=8).softmax(-1)                       # [1, 10]; model(image) is depth 20
name = model.pretrained_cfg['label_names'][probabilities.argmax()]
```

![Accuracy of every depth over its multiply-accumulates](results/cifar10_resnet20.png)

"""
FOOT = """## Limits and biases

- CIFAR-10 (JPEG) is recoded as JPEG of quality 75, so its accuracies compare with each other and not with those of the
  original files. CIFAR-100 is lossless.
- A net names one of its classes whatever the image shows, and knows images of the kind and size that it was trained on.
- The confidence is what training left, without calibration afterwards: see the ECE.
- CIFAR-10 and CIFAR-100 were collected from the Internet by search terms as parts of 80 Million Tiny Images, which its
  authors withdrew in 2020 for offensive labels among its other classes. Whom and what these images show was not
  balanced, and nothing here measures what follows from that.

## Citation

```bibtex
{citation}
```
"""

DATA = {
    'cifar10': '50,000 images of CIFAR-10 (JPEG). Methods, options and seed were chosen on the images of the table, a '
               'random half of the test images: they are optimistic, see the means in `results/README.md`.',
    'cifar100_judged': '45,000 images of CIFAR-100; the seed was fixed before, and the images of the table, a random '
                       'half of the test images, were looked at once, after the last epoch.',
}


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def describe_sealed(path):
    if not path.exists():
        return ''
    sealed = read(path)
    top1 = ' / '.join(f'{row["top1"]:.2f}' for row in sealed['depths'])
    return (
        f'\n\n**On {sealed["images"]:,} sealed images**, which played no part in any choice, top-1 is {top1}: '
        'expect these.')


def card_section(tag):
    """Write the section of a tag, {TAG: folder of its weights}."""
    measured = RESULTS / 'weights' / tag.name
    evaluation, profile = (read(measured / name) for name in ('evaluation.json', 'profile.json'))
    run = read(RESULTS / f'{evaluation["run"]}.json')
    rows = evaluation['depths']
    if [row['top1'] for row in read(tag / 'config.json')['depths']] != [row['top1'] for row in rows]:
        raise ValueError(f'{tag} and {measured} must be of the same weights: make the tag again')
    latency = {row['depth']: row['median_ms'] for row in profile['measurements']}
    full, shallow = rows[0]['depth'], rows[-1]['depth']
    by_class = []
    for depth in (full, shallow):
        low, *_, high = sorted((row[f'top1_{depth}'], row['class']) for row in evaluation['per_class'])
        by_class.append(f'from {low[0]:.1f} % ({low[1]}) to {high[0]:.1f} % ({high[1]}) at depth {depth}')
    teacher = run['options'].get('--teacher')
    return CARD.format(
        tag=tag.name,
        table=markdown_table(
            ['depth', 'blocks', 'parameters (M)', 'MACs (M)', 'top-1', 'top-5', 'ECE', 'latency (ms)'],
            [
                [
                    str(row['depth']), '-'.join(map(str, row['blocks'])), f'{row["parameters"] / 1e6:.3f}',
                    f'{row["macs"] / 1e6:.1f}', *(f'{row[name]:.2f}' for name in ('top1', 'top5', 'ece')),
                    f'{latency[row["depth"]]:.2f}',
                ]
                for row in rows
            ],
        ),
        images=evaluation['images'],
        cpu=profile['hardware']['cpu'],
        sealed=describe_sealed(measured / 'sealed.json'),
        method=f'all depths distilled from `{teacher}`, which was trained on the same images.' if teacher else
        'embedded knowledge distillation (arXiv 2103.00793), the full-net being the teacher.',
        epochs=run['arguments']['epochs'],
        hours=sum(record['seconds'] for record in run['history']) / 3600,
        machine=' '.join(run['hardware']['gpus'][:1]) or f'{run["hardware"]["cpu_cores"]} cores of '
        f'{run["hardware"]["cpu"]}',
        run=evaluation['run'],
        data=DATA[run['arguments']['dataset']],
        by_class=', '.join(by_class) + '.',
    )


def main():
    tags = [path.parent for path in sorted(Path(WEIGHTS).glob('[!.]*/config.json'))]
    text = HEAD + '\n'.join(map(card_section, tags)) + '\n' + FOOT.format(citation=CITATION)
    write_text(ROOT / 'MODEL_CARD.md', text)


if __name__ == '__main__':
    main()
