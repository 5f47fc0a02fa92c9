#!/usr/bin/env python3
"""Measure how many images per second a core decodes and augments, and how many the training step takes.

    python benchmarks/input_pipeline.py --dataset FOLDER --model ddnn_resnet50

The loader of training, the same with images that the workers normalize, and timm's `create_loader` read the same
training split, a folder that `datasets` finds by itself, with the same augmentation. Each has one worker process and
every thread pool one thread, so the rate of the loader alone is that of one core; --workers 2 shows whether it doubles.
The step is the one of training, on a batch in memory, on the device that is there. Rounds are interleaved; medians, and
the spread from least to most.
"""
import itertools
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.data import create_loader as create_timm_loader

import timm_ddnn
from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.data.images import Images, create_train_transform
from timm_ddnn.data.loader import create_loader, normalize
from timm_ddnn.utils.environment import describe_machine
from timm_ddnn_cli.arguments import ArgumentParser, number


def rate(batches, count):
    """Images per second over `count` batches, after one that starts the worker."""
    batches = iter(batches)
    next(batches)
    start = time.perf_counter()
    images = sum(len(target) for _, target in itertools.islice(batches, count))
    return images / (time.perf_counter() - start)


def steps(task, optimizer, images, target, bfloat16):
    """Yield after every training step, for `rate`."""
    while True:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bfloat16):
            loss = task(images, target)['loss']
        loss.backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()
        yield images, target


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    count = number(int, 1)
    arg = parser.add_argument
    arg('--dataset', required=True, help='folder with parquet or image files in a split called train')
    arg('--model', default='ddnn_resnet50', help='dynamic-depth model')
    arg('--img-size', type=count, help="side of the images in pixels, the model's if not given")
    arg('-b', '--batch-size', type=count, default=64, help='images per batch')
    arg('-j', '--workers', type=count, default=1, help='worker processes of a loader')
    arg('--batches', type=count, default=10, help='batches per round')
    arg('--rounds', type=count, default=5, help='rounds')
    arg('--output', type=Path, help='JSON file to write')
    args = parser.parse_args()

    torch.set_num_threads(1)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    data = load_image_data(args.dataset)
    model = timm.create_model(args.model, num_classes=len(data.class_names))
    config = resolve_data_config({'img_size': args.img_size}, model=model)
    augmentation = dict(train_crop_mode='rrc', hflip=0.5, color_jitter=0.0)

    def load(transform):
        return create_loader(Images(data, 'train', transform), args.batch_size, training=True, num_workers=args.workers)

    in_bytes = load(create_train_transform(config, crop_mode='rrc', hflip=0.5, color_jitter=None))
    normalization = {name: config[name] for name in ('input_size', 'interpolation', 'mean', 'std')}
    in_floats = load(create_transform(**normalization, is_training=True, hflip=0.5, color_jitter=None))
    dataset = create_dataset(
        f'hfds/{args.dataset}', root=None, split='train', input_key=data.input_key, target_key=data.target_key)
    timms = create_timm_loader(
        dataset, batch_size=args.batch_size, is_training=True, num_workers=args.workers, device=device,
        **normalization, **augmentation)

    model = model.to(device, memory_format=torch.channels_last).train()
    task = timm_ddnn.EKDTask(model, device=device, verbose=False)
    images = torch.randn(args.batch_size, *config['input_size'], device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    target = torch.zeros(len(images), dtype=torch.long, device=device)
    training = steps(task, torch.optim.SGD(model.parameters(), lr=0.0), images, target, bfloat16=True)

    sources = {
        'loader': lambda: normalize(in_bytes, config, device),
        'normalized by workers': lambda: in_floats,
        'timm, create_loader': lambda: timms,
        'training step': lambda: training,
    }
    rates = {name: [] for name in sources}
    for _ in range(args.rounds):
        for name, source in sources.items():
            rates[name].append(rate(source(), args.batches if name != 'training step' else 2))
    print(f'{args.model}, {config["input_size"][-1]} px, {args.workers} workers, {args.rounds} rounds on {device.type}')
    for name, values in rates.items():
        print(f'{name:22} {statistics.median(values):8.1f} images/s  ({min(values):.1f} to {max(values):.1f})')
    if args.output:
        args.output.write_text(json.dumps({
            'arguments': {k: str(v) for k, v in vars(args).items()}, 'images_per_second': rates, **describe_machine(),
        }, indent=2) + '\n')


if __name__ == '__main__':
    main()
