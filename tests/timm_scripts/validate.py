"""Stand-in for timm's validate.py, benchmark.py and inference.py: creates a model as they do, and runs it on digits."""
import argparse
import json
import sys

import torch
from sklearn.datasets import load_digits
from timm import utils
from timm.models import create_model, is_model, load_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument('--model', default='dpn92')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)
parser.add_argument('--checkpoint', default='')
parser.add_argument('--use-ema', action='store_true')
parser.add_argument('--torchscript', action='store_true')


def main():
    args = parser.parse_args()
    assert is_model(args.model)
    model = create_model(
        args.model, pretrained=False, num_classes=10, in_chans=3, global_pool=None, scriptable=False,
        **args.model_kwargs)
    if args.checkpoint:
        load_checkpoint(model, args.checkpoint, args.use_ema)
    if args.torchscript:
        model = torch.jit.script(model)
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:1024, None]
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    with torch.inference_mode():
        accuracy = (model.eval()(images).argmax(1) == torch.tensor(digits.target)[:1024]).double().mean()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({'top1': float(accuracy) * 100, 'arguments': sys.argv[1:], 'parameters': parameters}))


if __name__ == '__main__':
    main()
