#!/usr/bin/env python3
"""Run timm's own train.py with embedded knowledge distillation in the place of its classification task.

    # timm's scripts are not in its package: take train.py of the release that is installed
    curl -O https://raw.githubusercontent.com/huggingface/pytorch-image-models/v1.0.31/train.py

    python train_scripts/train_timm.py train.py --data-dir FOLDER --model ddnn_resnet34 --amp --model-ema --ekd-beta 0.2
    torchrun --nproc_per_node 4 train_scripts/train_timm.py train.py --data-dir FOLDER --model ddnn_resnet50

The first argument is the script. Options that begin with --ekd- are taken, all others are passed on, and train.py does
with them what it always does. It logs and validates the full-net; the other depths by run_timm.py and validate.py.
"""
import sys

from timm_ddnn_cli.arguments import ArgumentParser, run, run_script
from timm_ddnn_cli.ekd_options import add_ekd_options, ekd_options


def parse_args():
    parser = ArgumentParser(
        __doc__.splitlines()[0], usage='%(prog)s SCRIPT [--ekd-... VALUE] [options of SCRIPT]', add_help=False)
    add_ekd_options(parser, prefix='ekd-')
    options, arguments = parser.parse_known_args()
    if not arguments or {'-h', '--help'} & set(arguments):
        parser.print_help()
    if not arguments or arguments[0] in ('-h', '--help'):
        sys.exit(0 if arguments else 2)
    unknown = [argument for argument in arguments if argument.startswith('--ekd-')]
    if unknown:
        known = ', '.join('--' + name.replace('_', '-') for name in vars(options))
        parser.error(f'options that begin with --ekd- must be of {known}, got {unknown[0]}')
    other = [argument for argument in arguments if argument.split('=')[0] in ('--mean', '--std')]
    if options.ekd_teacher and other:
        parser.error(f"--ekd-teacher needs images of the model's own mean and std, got {other[0]}")
    if options.ekd_ema_teacher and '--model-ema' not in arguments:
        parser.error('--ekd-ema-teacher needs the average: --model-ema')
    if options.ekd_ema_teacher and '--model-ema-force-cpu' in arguments:
        parser.error('--ekd-ema-teacher needs the average where the model is, got --model-ema-force-cpu')
    return arguments[0], arguments[1:], options


def main():
    script, arguments, args = parse_args()
    options = ekd_options(args, prefix='ekd-')

    import timm.task
    from timm.task import classification
    from timm.utils import unwrap_model

    import timm_ddnn
    from timm_ddnn.models.load import load_teacher
    from timm_ddnn.utils.errors import InputError

    timm_ddnn.EKDLoss(**options)  # judges the options before the data is loaded
    teacher = load_teacher(args.ekd_teacher) if args.ekd_teacher else None

    class EKDTask(timm_ddnn.EKDTask):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **options)
            if teacher:
                self.set_teacher(teacher.to(self.device, self.dtype))

        def setup_ema(self, *setup_args, **kwargs):
            ema = super().setup_ema(*setup_args, **kwargs)
            if args.ekd_ema_teacher:
                self.set_teacher(unwrap_model(ema))
            return ema

    def initialize(task, *args, original=timm.task.TrainingTask.__init__, **kwargs):
        if not isinstance(task, EKDTask):
            raise InputError(
                f'train_timm.py trains by EKDTask, but these options of {script} ask for {type(task).__name__}')
        original(task, *args, **kwargs)

    timm.task.TrainingTask.__init__ = initialize
    timm.task.ClassificationTask = classification.ClassificationTask = EKDTask
    run_script(script, arguments)


if __name__ == '__main__':
    run(main)
