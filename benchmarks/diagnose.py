#!/usr/bin/env python3
"""Show what shared weights have learned at every depth: losses, gradients' angles, size of the weights.

    python benchmarks/diagnose.py DATA output/experiments/tuning/ekd_* > table.md

DATA is the folder of the data set that experiments.py made, with splits train and test. Losses are the cross-entropy of
the first 2,000 images of both splits, not augmented, in eval mode. Angles are those between the gradients of two
depths' cross-entropies on the same batch, over the convolutions that both share, in training mode: the mean of the
cosines of eight batches of 128 training images. The size is the root mean square of the convolutions' weights: under
batch norm a step turns them by an angle that goes with rate / size squared.
"""
import argparse
from itertools import combinations
from pathlib import Path
from statistics import mean

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config

import timm_ddnn  # noqa: F401  the import registers the models
from timm_ddnn.data.cached import MemoryImages
from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.data.loader import normalize
from timm_ddnn.hub.model_card import markdown_table

IMAGES, BATCH, BATCHES = 2_000, 128, 8


def batches(images, data_config, size, count):
    """-> The first `count` images of a split, normalized, and their labels, in batches."""
    rows = [[(0, i) for i in range(start, start + size)] for start in range(0, count, size)]
    return normalize(map(images.__getitems__, rows), data_config, 'cpu')


@torch.no_grad()
def losses(model, images, data_config):
    """-> Mean cross-entropy by depth."""
    total = dict.fromkeys(model.depths, 0.0)
    for batch, target in batches(images, data_config, 250, IMAGES):
        for depth, output in model(batch, depth='all').items():
            total[depth] += F.cross_entropy(output.logits, target, reduction='sum').item()
    return {depth: value / IMAGES for depth, value in total.items()}


def cosines(model, images, data_config):
    """-> Mean cosine between gradients by pair of depths."""
    weights = [p for name, p in model.named_parameters() if p.ndim == 4]
    found = {pair: [] for pair in combinations(model.depths, 2)}
    for batch, target in batches(images, data_config, BATCH, BATCHES * BATCH):
        gradients = {
            depth: torch.autograd.grad(F.cross_entropy(output.logits, target), weights, retain_graph=True,
                                       allow_unused=True)
            for depth, output in model(batch, depth='all').items()}
        for a, b in found:
            both = [(x, y) for x, y in zip(gradients[a], gradients[b], strict=True) if x is not None and y is not None]
            x, y = (torch.cat([g.flatten() for g in side]) for side in zip(*both, strict=True))
            found[a, b].append(F.cosine_similarity(x, y, dim=0).item())
    return {pair: mean(values) for pair, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data', help='folder of the data set')
    parser.add_argument('runs', nargs='+', type=Path, help='folders of training runs')
    args = parser.parse_args()
    data, rows = load_image_data(args.data, val_split='test'), []
    for folder in args.runs:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        config = resolve_data_config(model=model)
        train, test = (MemoryImages(data, split, config) for split in ('train', 'validation'))
        train.padding = [0, 0]  # as it is
        learned, general = losses(model, train, config), losses(model, test, config)
        convolutions = [p for name, p in model.named_parameters() if p.ndim == 4]
        size = (sum(p.square().sum() for p in convolutions) / sum(p.numel() for p in convolutions)).sqrt().item()
        angles = ', '.join(f'{c:.2f} ({a}, {b})' for (a, b), c in cosines(model.train(), train, config).items())
        rows += [
            [f'`{folder.name}`', str(depth), f'{learned[depth]:.3f}', f'{general[depth]:.3f}', f'{size:.4f}', angles]
            for depth in model.depths
        ]
    head = ['run', 'depth', 'training loss', 'loss on other images', 'size of the weights', 'cosines of gradients']
    print(markdown_table(head, rows), end='')


if __name__ == '__main__':
    main()
