#!/usr/bin/env python3
"""Detect objects with the feature maps of one depth: a plain timm backbone under torchvision's pyramid and FCOS.

    python examples/feature_pyramid.py                                                  # half a minute on a CPU core
    python examples/feature_pyramid.py --model ddnn_resnet50 --depth 50 --pretrained    # timm's weights, from the Hub

`features_only=True, depth=18` gives the maps of depth 18 and no other: a stock net that trains, saves and exports like
any backbone of timm, and that has left the weights that it shared. A segmentation decoder takes the same maps.

The images are made of two photographs that come with scikit-learn: the flower of one is put into the landscape of the
other, at places and sizes drawn at random, so that its box is known.
"""
import random
from collections import OrderedDict

import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.transforms.functional import to_tensor

import timm_ddnn  # noqa: F401  the import registers the models
from timm_ddnn_cli.arguments import ArgumentParser, number, run

FLOWER = (168, 83, 446, 361)  # its box in flower.jpg, in pixels
HEIGHT, WIDTH = 128, 192


class Pyramid(nn.Module):
    """Backbone and feature pyramid."""

    def __init__(self, body: nn.Module) -> None:
        """Take a backbone of timm."""
        super().__init__()
        self.body = body
        self.out_channels = 64  # FCOS asks for it
        self.pyramid = FeaturePyramidNetwork(body.feature_info.channels(), self.out_channels)

    def forward(self, x: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Map images [B, 3, H, W] to maps [B, out_channels, H_s, W_s]."""
        return self.pyramid(OrderedDict((str(i), x) for i, x in enumerate(self.body(x))))


def draw_image() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Put the flower into the landscape; the image [3, H, W] and its box and label as torchvision wants them."""
    image = Image.fromarray(load_sample_image('china.jpg')).resize((WIDTH, HEIGHT))
    side = random.randint(24, 72)
    left, top = random.randint(0, WIDTH - side), random.randint(0, HEIGHT - side)
    image.paste(Image.fromarray(load_sample_image('flower.jpg')).crop(FLOWER).resize((side, side)), (left, top))
    box = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return to_tensor(image), {'boxes': box, 'labels': torch.tensor([1])}


def main() -> None:
    """Show the maps, train for some steps, and look for the flower in a new image."""
    parser = ArgumentParser(__doc__.splitlines()[0])
    models = timm.list_models('ddnn_*')
    parser.add_argument('--model', default='ddnn_resnet34', choices=models, metavar='NAME', help="timm's name")
    parser.add_argument('--depth', type=int, default=18, help='depth of the backbone')
    parser.add_argument('--pretrained', action='store_true', help="start from timm's weights")
    parser.add_argument('--steps', type=number(int, 1), default=60, help='steps of training, 4 images each')
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)

    body = timm.create_model(
        args.model, pretrained=args.pretrained, features_only=True, depth=args.depth, out_indices=(-3, -2, -1))
    anchors = AnchorGenerator([(stride,) for stride in body.feature_info.reduction()], [(1.0,)] * 3)
    model = FCOS(Pyramid(body), 2, anchor_generator=anchors, min_size=HEIGHT, max_size=WIDTH)  # nothing and flower
    with torch.no_grad():
        for x, reduction in zip(body(torch.zeros(1, 3, HEIGHT, WIDTH)), body.feature_info.reduction(), strict=True):
            print(f'depth {args.depth}, stride {reduction}: {list(x.shape)}')

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(args.steps):
        images, targets = zip(*(draw_image() for _ in range(4)), strict=True)
        losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step + 1 == args.steps:
            terms = ', '.join(f'{name} {value:.3f}' for name, value in losses.items())
            print(f'step {step + 1}/{args.steps}: loss {loss:.3f} ({terms})')

    images, targets = zip(*(draw_image() for _ in range(8)), strict=True)
    with torch.no_grad():
        found = model.eval()(images)
    overlaps = [box_iou(f['boxes'][:1], t['boxes']).sum().item() for f, t in zip(found, targets, strict=True)]
    print(f'8 new images: the best box overlaps the flower by {100 * sum(overlaps) / 8:.0f} % on average (IoU)')


if __name__ == '__main__':
    run(main)
