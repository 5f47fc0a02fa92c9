#!/usr/bin/env python3
"""Run a script of timm (validate.py, benchmark.py, onnx_export.py, inference.py) on a depth of a dynamic-depth model.

    python train_scripts/run_timm.py --depth 18 validate.py --data-dir FOLDER --model ddnn_resnet34 --checkpoint FILE
    python train_scripts/run_timm.py --depth 18 onnx_export.py resnet18.onnx --model ddnn_resnet34 --checkpoint FILE

timm's scripts are not in its package, see train_timm.py. They run unchanged: whatever dynamic-depth model they create
is the plain net of that depth, which loads the checkpoints of the model. Without --depth it is the model, which runs
its full-net.
"""
import argparse
import functools

from timm_ddnn_cli.arguments import ArgumentParser, number, run, run_script


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('--depth', type=number(int, 1), help="depth of the model, the full-net's if not given")
    parser.add_argument('script', help="path of the script, such as 'validate.py'")
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help='options of the script')
    args = parser.parse_args()

    import timm
    from timm.models import _factory

    import timm_ddnn  # noqa: F401  the import registers the models
    from timm_ddnn.models.dynamic_depth import DynamicDepthMixin
    from timm_ddnn.utils.errors import InputError

    @functools.wraps(timm.create_model)
    def create_model(model_name, *positional, original=timm.create_model, **kwargs):
        model = original(model_name, *positional, **kwargs)
        if not isinstance(model, DynamicDepthMixin):
            raise InputError(f'--depth is for dynamic-depth models (ddnn_*), got model {model_name!r}')
        net = model.extract(args.depth)

        def select_depth(_, state_dict, *__):
            if state_dict.keys() != net.state_dict().keys():
                selected = model.extract_state_dict(state_dict, args.depth)
                state_dict.clear()
                state_dict.update(selected)

        net.register_load_state_dict_pre_hook(select_depth)
        return net

    if args.depth:
        timm.create_model = timm.models.create_model = _factory.create_model = create_model
    run_script(args.script, args.arguments)


if __name__ == '__main__':
    run(main)
