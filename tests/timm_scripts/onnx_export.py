"""Stand-in for timm's onnx_export.py: creates a model as that does, by an attribute of timm, and exports it."""
import argparse

import timm
import torch

parser = argparse.ArgumentParser()
parser.add_argument('output')
parser.add_argument('--model', default='mobilenetv3_large_100')


def main():
    args = parser.parse_args()
    model = timm.create_model(args.model, num_classes=10, in_chans=3, pretrained=False, exportable=True)
    program = torch.export.export(model.eval(), (torch.randn(1, 3, 32, 32),))
    torch.export.save(program, args.output)


if __name__ == '__main__':
    main()
