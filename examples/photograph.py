#!/usr/bin/env python3
"""From a photograph to predictions at every depth of one model.

    python examples/photograph.py                       # a photograph that comes with scikit-learn, a model of CIFAR-10
    python examples/photograph.py PHOTO.jpg --model output/ddnn_resnet50-food --output predictions.png

The parts between `# %%` are cells of a notebook for VS Code, Spyder, and by jupytext for Jupyter. None needs a network
where the weights are on the disk. The photograph of scikit-learn is a temple, which CIFAR-10 has no class for: see what
the depths make of it, then give one of your own.
"""
# %% Arguments
import sys
import time
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from timm.data import create_transform, resolve_input_data_config

from timm_ddnn.data.images import convert_image
from timm_ddnn.models.load import create_ddnn
from timm_ddnn_cli.arguments import ArgumentParser, fail, number, one_line_errors

parser = ArgumentParser(__doc__.splitlines()[0])
parser.add_argument('photograph', nargs='?', help='image file, a photograph of scikit-learn if not given')
parser.add_argument('--model', default='ddnn_resnet20', help="timm's name, a folder or hf-hub:ID")
parser.add_argument('--output', type=Path, default=Path('photograph.png'), help='picture to write')
parser.add_argument('--repeats', type=number(int, 1), default=20, help='runs of which the latency is the median')
args = parser.parse_args([] if 'ipykernel' in sys.modules else None)

# %% One model, one set of weights, several depths
with one_line_errors(ValueError):
    model = create_ddnn(args.model, pretrained=True).eval()
names = model.pretrained_cfg.get('label_names') or [f'class {i}' for i in range(model.num_classes)]
print(f'{args.model} has depths {model.depths}, trained are {model.trained_depths}; {len(names)} classes')

# %% The photograph, prepared as the model's images were
data_config = resolve_input_data_config(model)
mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
try:
    photograph = Image.open(args.photograph) if args.photograph else Image.fromarray(load_sample_image('china.jpg'))
    photograph = convert_image(ImageOps.exif_transpose(photograph), mode)
except (OSError, SyntaxError, ValueError) as e:  # Pillow raises SyntaxError, too, for what is no image
    fail(f'the photograph {args.photograph!r} cannot be read: {e}')
image = create_transform(**data_config)(photograph).unsqueeze(0)                                      # [1, C, H, W]
print(f'a photograph of {photograph.width} x {photograph.height} px becomes {list(image.shape)}')

# %% Every depth in one call, what they share being computed once
with torch.inference_mode():
    outputs = model(image, depth='all')                                          # {depth: (logits, features), ...}
probabilities = {depth: output.logits.softmax(-1)[0] for depth, output in outputs.items()}           # [num_classes]
best = torch.stack(list(probabilities.values())).mean(0).topk(min(5, len(names))).indices.tolist()
width = max(len(names[i]) for i in best)
print('\nprobability (%)'.ljust(width + 1), *(f'depth {depth}'.rjust(9) for depth in model.depths))
for i in best:
    print(names[i].ljust(max(width, 15)), *(f'{100 * probabilities[depth][i]:9.1f}' for depth in model.depths))

# %% Do the shallow nets say what the deepest says?
answers = {depth: names[p.argmax()] for depth, p in probabilities.items()}
print(f'\ndepth {model.depths[0]} says {answers[model.depths[0]]}')
for depth in model.depths[1:]:
    verdict = 'agrees' if answers[depth] == answers[model.depths[0]] else f'says {answers[depth]}'
    print(f'depth {depth} {verdict}, {100 * probabilities[depth].max():.1f} % sure')


# %% What a depth costs on this machine
def latency(depth: int | str) -> float:
    """Measure the median time of one image at a depth, in milliseconds."""
    times = []
    with torch.inference_mode():
        for _ in range(args.repeats + 2):
            start = time.perf_counter()
            model(image, depth=depth)
            times.append(1000 * (time.perf_counter() - start))
    return median(times[2:])


milliseconds = {depth: latency(depth) for depth in model.depths}
print(f'\nlatency on the CPU, {torch.get_num_threads()} threads, median of {args.repeats}:')
for depth, value in milliseconds.items():
    print(f'depth {depth}: {value:.1f} ms')
print(f'all in one call: {latency("all"):.1f} ms, one after the other {sum(milliseconds.values()):.1f} ms')

# %% A picture
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout='constrained')
left.imshow(photograph, cmap='gray' if photograph.mode == 'L' else None)
left.axis('off')
height = 0.8 / len(model.depths)
for k, depth in enumerate(model.depths):
    places = [row + k * height for row in range(len(best))]
    label = f'depth {depth}, {milliseconds[depth]:.1f} ms'
    right.barh(places, [100 * probabilities[depth][i].item() for i in best], height, label=label)
right.set_yticks([row + 0.4 - height / 2 for row in range(len(best))], [names[i] for i in best])
right.invert_yaxis()
right.set(xlabel='probability (%)', xlim=(0, 100))
right.legend(fontsize='small', loc='lower right')
with one_line_errors(OSError, ValueError):
    figure.savefig(args.output, dpi=150)
print(f'\n{args.output}')
