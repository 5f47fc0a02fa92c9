#!/usr/bin/env python3
"""From a photograph to predictions at every depth of one model.

    python examples/photograph.py                       # a photograph that comes with scikit-learn, a model of CIFAR-10
    python examples/photograph.py PHOTO.jpg --model output/ddnn_resnet50-food --output predictions.png

No network is needed where the weights are on the disk. The photograph of scikit-learn is a temple, which CIFAR-10 has
no class for: see what the depths make of it, then give one of your own.
"""
import time
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_input_data_config
from torch import nn

from timm_ddnn.data.images import convert_image
from timm_ddnn.models.load import load_model
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.arguments import ArgumentParser, number, run


def read_photograph(path: str | None, mode: str) -> Image.Image:
    """Read a photograph, upright."""
    try:
        photograph = Image.open(path) if path else Image.fromarray(load_sample_image('china.jpg'))
        return convert_image(ImageOps.exif_transpose(photograph), mode)
    except (SyntaxError, ValueError) as e:  # Pillow raises SyntaxError for some files that are not images
        raise InputError(f'the photograph {path!r} cannot be read: {e}') from e


def measure_latency(model: nn.Module, image: torch.Tensor, depth: int | str, repeats: int) -> float:
    """Measure the median time of one image at a depth, in milliseconds."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            start = time.perf_counter()
            model(image, depth=depth)
            times.append(1000 * (time.perf_counter() - start))
    return median(times[2:])


def draw(path: Path, photograph: Image.Image, bars: dict[str, list[float]], names: list[str]) -> None:
    """Draw the photograph and, in percent, the probabilities of some classes by depth."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
    left.imshow(photograph, cmap='gray' if photograph.mode == 'L' else None)
    left.axis('off')
    height = 0.8 / len(bars)
    for k, (label, values) in enumerate(bars.items()):
        right.barh([row + k * height for row in range(len(names))], values, height, label=label)
    right.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    right.invert_yaxis()
    right.set(title='What every depth says', xlabel='probability (%)', xlim=(0, 100))
    figure.legend(fontsize='small', loc='outside lower right', ncols=len(bars))
    figure.savefig(path, format='png', dpi=150)


def main() -> None:
    """Classify the photograph at every depth, in one call; compare the answers and what they cost."""
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('photograph', nargs='?', help='image file, a photograph of scikit-learn if not given')
    parser.add_argument('--model', default='ddnn_resnet20', help="timm's name, a folder or hf-hub:ID")
    parser.add_argument('--output', type=Path, default=Path('photograph.png'), help='plot to write')
    parser.add_argument('--repeats', type=number(int, 1), default=20, help='runs of which the latency is the median')
    args = parser.parse_args()

    model = load_model(args.model)
    names = model.pretrained_cfg.get('label_names') or [f'class {i}' for i in range(model.num_classes)]
    print(f'{args.model} has depths {model.depths}, trained are {model.trained_depths}; {len(names)} classes')

    data_config = resolve_input_data_config(model)
    photograph = read_photograph(args.photograph, 'L' if data_config['input_size'][0] == 1 else 'RGB')
    image = create_transform(**data_config)(photograph).unsqueeze(0)                                  # [1, C, H, W]
    print(f'a photograph of {photograph.width} x {photograph.height} px becomes {list(image.shape)}')

    with torch.inference_mode():
        outputs = model(image, depth='all')                                      # {depth: (logits, features), ...}
    percent = {depth: 100 * output.logits.softmax(-1)[0] for depth, output in outputs.items()}       # [num_classes]
    best = torch.stack(list(percent.values())).mean(0).topk(min(5, len(names))).indices.tolist()
    width = max(15, *(len(names[i]) for i in best))
    print('\nprobability (%)'.ljust(width + 1), *(f'depth {depth}'.rjust(9) for depth in model.depths))
    for i in best:
        print(names[i].ljust(width), *(f'{percent[depth][i]:9.1f}' for depth in model.depths))
    print()
    for depth in model.depths:
        print(f'depth {depth} says {names[percent[depth].argmax()]}, {percent[depth].max():.1f} % sure')

    latency = {depth: measure_latency(model, image, depth, args.repeats) for depth in (*model.depths, 'all')}
    print(f'\nlatency on the CPU, {torch.get_num_threads()} threads, median of {args.repeats}:')
    for depth in model.depths:
        print(f'depth {depth}: {latency[depth]:.1f} ms')
    together = sum(latency[depth] for depth in model.depths)
    print(f'all in one call: {latency["all"]:.1f} ms, one after the other {together:.1f} ms')

    bars = {f'depth {d}, {latency[d]:.1f} ms': [percent[d][i].item() for i in best] for d in model.depths}
    draw(args.output, photograph, bars, [names[i] for i in best])
    print(f'\n{args.output}')


if __name__ == '__main__':
    run(main)
