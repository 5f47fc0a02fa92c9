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

import timm.task
from timm.task import classification
from timm.utils import unwrap_model

import timm_ddnn
from timm_ddnn.models.load import load_teacher
from timm_ddnn_cli.arguments import ArgumentParser, fail, integers, number, one_line_errors, parse_weight, run_script


def parse_args():
    parser = ArgumentParser(
        __doc__.splitlines()[0], usage='%(prog)s SCRIPT [--ekd-... VALUE] [options of SCRIPT]', add_help=False)
    loss, amount = timm_ddnn.EKDLoss(), number(float, 0)
    arg = parser.add_argument
    arg('--ekd-temperature', type=amount, default=loss.temperature, help='temperature of the KL divergence')
    arg('--ekd-alpha', type=amount, default=loss.alpha, help='weight of the KL divergence')
    arg('--ekd-beta', type=amount, default=loss.beta, help='weight of the attention')
    arg('--ekd-attention', choices=('energy', 'standardized'), default=loss.attention, help='form of the attention')
    arg('--ekd-stages', type=integers("stages such as '2,3'"), metavar='STAGE,...',
        help='stages compared, from 0, or from the last as in --ekd-stages=-1; all if not given')
    arg('--ekd-weights', type=lambda text: dict(parse_weight(pair) for pair in text.split(',')),
        metavar='DEPTH=WEIGHT,...', help='loss weights of sub-nets')
    arg('--ekd-teacher', metavar='MODEL',
        help="timm's name, the folder or hf-hub:ID of a trained net that teaches all depths, the full-net too, in the "
             "place of the full-net; for one without the maps of the model: --ekd-beta 0")
    arg('--ekd-ema-teacher', action='store_true',
        help='the averaged weights (--model-ema) teach all depths, the full-net too, in the place of the full-net')
    options, arguments = parser.parse_known_args()
    if not arguments or {'-h', '--help'} & set(arguments):
        parser.print_help()
    if not arguments or arguments[0] in ('-h', '--help'):
        sys.exit(0 if arguments else 2)
    unknown = [argument for argument in arguments if argument.startswith('--ekd-')]
    if unknown:
        known = ', '.join('--' + name.replace('_', '-') for name in vars(options))
        parser.error(f'options that begin with --ekd- must be of {known}, got {unknown[0]}')
    if options.ekd_ema_teacher and options.ekd_teacher:
        parser.error(f'--ekd-ema-teacher must be without --ekd-teacher, got {options.ekd_teacher}')
    other = [argument for argument in arguments if argument.split('=')[0] in ('--mean', '--std')]
    if options.ekd_teacher and other:
        parser.error(f"--ekd-teacher needs images of the model's own mean and std, got {other[0]}")
    if options.ekd_ema_teacher and '--model-ema' not in arguments:
        parser.error('--ekd-ema-teacher needs the average: --model-ema')
    if options.ekd_ema_teacher and '--model-ema-force-cpu' in arguments:
        parser.error('--ekd-ema-teacher needs the average where the model is, got --model-ema-force-cpu')
    return arguments[0], arguments[1:], {name.removeprefix('ekd_'): value for name, value in vars(options).items()}


def main():
    script, arguments, options = parse_args()
    ema_teacher, teacher = options.pop('ema_teacher'), options.pop('teacher')
    with one_line_errors(ValueError):
        timm_ddnn.EKDLoss(**options)  # an error better now than after the data was loaded
        teacher = load_teacher(teacher) if teacher else None

    class Task(timm_ddnn.EKDTask):
        def __init__(self, *args, **kwargs):
            with one_line_errors(ValueError):
                super().__init__(*args, **kwargs, **options)
                if teacher:
                    self.set_teacher(teacher.to(self.device, self.dtype))

        def run_teacher(self, input):
            with one_line_errors(AssertionError):  # by which timm says that the net takes images of another size
                return super().run_teacher(input)

        def setup_ema(self, *args, **kwargs):
            ema = super().setup_ema(*args, **kwargs)
            if ema_teacher:
                self.set_teacher(unwrap_model(ema))
            return ema

    def initialize(task, *args, original=timm.task.TrainingTask.__init__, **kwargs):
        if not isinstance(task, Task):
            fail(f'train_timm.py trains by EKDTask, but these options of {script} ask for {type(task).__name__}')
        original(task, *args, **kwargs)

    Task.__name__ = timm_ddnn.EKDTask.__name__  # for the log
    timm.task.TrainingTask.__init__ = initialize
    timm.task.ClassificationTask = classification.ClassificationTask = Task
    run_script(script, arguments)


if __name__ == '__main__':
    main()
