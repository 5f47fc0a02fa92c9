#!/usr/bin/env python3
"""Run a script of timm (validate.py, benchmark.py, onnx_export.py, inference.py) on a depth of a dynamic-depth model.

    python train_scripts/run_timm.py --depth 18 validate.py --data-dir FOLDER --model ddnn_resnet34 --checkpoint FILE
    python train_scripts/run_timm.py --depth 18 onnx_export.py resnet18.onnx --model ddnn_resnet34 --checkpoint FILE

timm's scripts are not in its package, see train_timm.py. They run unchanged; whatever dynamic-depth model they create
is of that depth, the full-net's if none is given.
"""
import argparse
import functools

import timm
from timm.models import _factory

import timm_ddnn  # noqa: F401  the import registers the models
from timm_ddnn.weights.download import read_config
from timm_ddnn_cli.arguments import ArgumentParser, fail, number, run_script


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('--depth', type=number(int, 1), help="depth of the model, the full-net's if not given")
    parser.add_argument('script', help="path of the script, such as 'validate.py'")
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='options of the script')
    args = parser.parse_args()

    @functools.wraps(timm.create_model)
    def create_model(model_name, *positional, original=timm.create_model, **kwargs):
        try:
            name = read_config(model_name)['architecture'] if ':' in model_name else model_name.rpartition('/')[2]
            if not name.startswith('ddnn_'):
                fail(f'--depth is for dynamic-depth models (ddnn_*), got model {model_name!r}')
            return original(model_name, *positional, depth=args.depth, **kwargs)
        except (ValueError, OSError) as e:
            fail(str(e))

    if args.depth:
        timm.create_model = timm.models.create_model = _factory.create_model = create_model
    run_script(args.script, args.arguments)


if __name__ == '__main__':
    main()
