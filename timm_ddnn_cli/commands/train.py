"""`timm-ddnn train`: all depths at once by embedded knowledge distillation; `train_ekd.py` is the same."""
import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from ..arguments import fail, number, parse_blocks, parse_option, parse_workers
from ..ekd_options import add_ekd_options, ekd_options

HELP = 'Train all depths of a dynamic-depth model at once by embedded knowledge distillation.'
EXAMPLES = """  timm-ddnn train                                                     # small model, scikit-learn's digits
  timm-ddnn train --model ddnn_resnet50 --pretrained --dataset FOLDER --mixed-precision bf16
  timm-ddnn train --output output/digits --resume auto --checkpoint-interval 500    # begins, or resumes
  timm-ddnn train --evaluate --pretrained --model output/ddnn_resnet50-food --dataset FOLDER

several processes, with the same options:
  accelerate launch --config_file train_scripts/configs/gpus.yaml --num_processes 4 train_scripts/train_ekd.py"""


# What an option is if it is not given: from random weights, and from trained ones. There fewer epochs do, and the
# learning rate is lower, so that the weights are not lost; what was tried is in docs/your-own-photos.md.
DEFAULTS = {'epochs': (15, 10), 'lr': (0.1, 0.03)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments, named as in timm's training script where that has them."""
    # Within float32 and 32-bit integers
    count, fraction, amount = number(int, 1, 2 ** 31 - 1), number(float, 0, 1), number(float, 0, 3.4e38)
    counter = number(int, 0, 2 ** 31 - 1)

    arg = parser.add_argument_group('model').add_argument
    arg('--model', default='ddnn_resnet20', help="timm's name, the folder or hf-hub:ID of a dynamic-depth model")
    arg('--subnets', nargs='*', type=parse_blocks, metavar='BLOCKS',
        help="blocks per stage of every sub-net, '2,2,2,2' '1,1,1,1'; of none: the full-net alone")
    arg('--private', nargs='+', choices=('affine', 'final_norm', 'classifier', 'conv'), metavar='WHAT',
        help="what sub-nets have for themselves: 'affine' (scale and shift of batch norms), 'final_norm', 'classifier' "
             "or 'conv' (the first convolution of each stage); nothing if not given")
    arg('--pretrained', action='store_true', help='start from published or saved weights')
    arg('--initial-checkpoint', default='', metavar='PATH',
        help='start from the weights in a file or the folder of a model, of as many classes')
    arg('--num-classes', type=number(int, 1, 10 ** 6), help='classes of the model, those of the data set if not given')
    arg('--img-size', type=number(int, 1, 8192), help="side of the images in pixels, the model's if not given")
    arg('--drop', type=fraction, default=0.0, help='dropout rate before the classifier')
    arg('--drop-path', type=fraction, default=0.0, help='stochastic depth rate')
    arg('--model-kwargs', nargs='+', type=parse_option, default=[], metavar='KEY=VALUE', help='further arguments')

    arg = parser.add_argument_group('data').add_argument
    arg('--dataset', default='digits', help="'digits', a folder of parquet or image files, or an id on the Hub")
    arg('--input-key', help='image column, found if not given')
    arg('--target-key', help='label column, found if not given')
    arg('--train-split', help="'train' if not given")
    arg('--val-split', help="the first of 'validation', 'val', 'valid' and 'test' if not given")
    arg('--val-fraction', type=number(float, 0, 1), metavar='SHARE',
        help='share of the training images of every class to validate on, where there is no split for that; the same '
             'images whatever --seed is')
    arg('-b', '--batch-size', type=count, default=64, help='images per process and step')
    arg('-vb', '--validation-batch-size', type=count, help='the batch size if not given')
    arg('-j', '--workers', type=parse_workers, default=2, help='processes that load data, per process')
    arg('--in-memory', action='store_true', help='decode once, augment by batches: small images, crop pad, flips')

    arg = parser.add_argument_group('augmentation').add_argument
    arg('--train-crop-mode', choices=('pad', 'rrc', 'rkrc', 'rkrr'), help="'pad' to 64 px, 'rrc' above, if not given")
    arg('--scale', nargs=2, type=amount, metavar='AREA', help="range of the crop's area, timm's if not given")
    arg('--ratio', nargs=2, type=amount, metavar='RATIO', help="range of the crop's aspect ratio, timm's if not given")
    arg('--hflip', type=fraction, help='probability of a horizontal flip; 0.5, for digits 0, if not given')
    arg('--color-jitter', type=amount, default=0.0, help='strength of colour jitter')
    arg('--aa', metavar='NAME', help="AutoAugment policy, such as 'rand-m9-mstd0.5'")
    arg('--reprob', type=fraction, default=0.0, help='probability of random erasing')
    arg('--mixup', type=amount, default=0.0, help='alpha of mixup')
    arg('--cutmix', type=amount, default=0.0, help='alpha of cutmix')

    group = parser.add_argument_group('loss')
    add_ekd_options(group)
    arg = group.add_argument
    arg('--full-net-epochs', type=counter, default=0, metavar='N',
        help='train the full-net alone before, for N epochs with a schedule of their own, and start from its weights; '
             'it is kept in full_net/')
    arg('--frozen-teacher', action='store_true',
        help='the full-net as it is at the start teaches all depths, the full-net too; needs trained weights to start '
             'from (--full-net-epochs, --pretrained, --initial-checkpoint)')
    arg('--smoothing', type=fraction, default=0.0, help='label smoothing')
    arg('--class-weights', action='store_true',
        help='weight the cross-entropy of a class inversely to its number of images')
    arg('--bce-loss', action='store_true', help='binary cross-entropy in the place of cross-entropy')

    arg = parser.add_argument_group('optimization').add_argument
    arg('--epochs', type=count, help=_explain('epochs', 'epochs of training'))
    arg('--opt', default='sgd', help="timm's name of an optimizer; sgd is with Nesterov momentum")
    arg('--momentum', type=fraction, default=0.9, help='momentum')
    arg('--weight-decay', type=amount, default=5e-4, help='weight decay, not on biases and norms')
    arg('--clip-grad', type=amount, help='norm that gradients are clipped to')
    arg('--grad-accum-steps', type=count, help="batches per update, accelerate launch's or 1 if not given")
    arg('--sched', choices=('cosine', 'tanh', 'constant'), default='cosine', help='schedule, stepped per update')
    arg('--lr', type=amount, help=_explain('lr', 'learning rate'))
    arg('--warmup-epochs', type=counter, default=1, help='epochs of linear warm-up')
    arg('--warmup-lr', type=amount, default=1e-5, help='learning rate at the start of the warm-up')
    arg('--min-lr', type=amount, default=0.0, help='learning rate at the end of the cosine')
    arg('--model-ema', action='store_true', help='average the weights; the average is reported and saved')
    arg('--model-ema-decay', type=fraction, default=0.9998, help='decay of the average')
    arg('--model-ema-warmup', action='store_true', help='let the decay rise to its value')

    arg = parser.add_argument_group('run').add_argument
    arg('--evaluate', action='store_true', help='report the accuracy of every depth, without training')
    arg('--output', type=Path, help='folder to write to, a new one in output/ if not given')
    arg('--best-by', type=count, metavar='DEPTH',
        help='depth whose top-1 chooses the weights in best/, the mean over depths if not given')
    arg('--resume', metavar='auto|PATH', help='resume from the newest checkpoint in --output, if any, or from that one')
    arg('--checkpoint-interval', type=counter, default=0, help='updates between checkpoints within an epoch')
    arg('--checkpoint-hist', type=count, default=2, help='newest checkpoints to keep')
    arg('--seed', type=number(int, 0, 2 ** 32 - 1), default=0, help='seed of everything random')
    arg('--mixed-precision', choices=('no', 'bf16', 'fp16'), help="accelerate launch's if not given")
    arg('--channels-last', action=argparse.BooleanOptionalAction, default=True, help='memory format')
    arg('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model for training')
    arg('--grad-checkpointing', action='store_true', help='less memory, more computation')
    arg('--sync-bn', action='store_true', help='batch-norm statistics over all processes (GPUs)')
    arg('--log-interval', type=count, default=50, help='batches between two reports of the loss')
    arg('--report-to', choices=('none', 'tensorboard', 'trackio', 'wandb'), default='none', help='experiment tracker')


def _explain(name: str, text: str) -> str:
    random, trained = DEFAULTS[name]
    return f'{text}, {random} if not given ({trained} with --pretrained)'


def run(args: argparse.Namespace, task_type: Any = None) -> dict[str, Any] | None:
    """Train or evaluate, and print the accuracy of every depth.

    Args:
        args: The arguments.
        task_type: What takes the place of `EKDTask`, if anything does.
    """
    _check(args)
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[bool(args.pretrained or args.initial_checkpoint)])
    from rich.console import Console

    from ..tables import result_table, show_status

    with show_status('starting'):
        from timm_ddnn.task import EKDTask
        from timm_ddnn.train.recipe import evaluate_only, train

    console = Console(stderr=args.json)
    options = argparse.Namespace(**{
        name: value for name, value in vars(args).items() if name not in ('command', 'json', 'run')})
    if args.evaluate:
        result = evaluate_only(options, console)
    else:
        result = train(options, ekd_options(args), console, task_type or EKDTask)
    if result and not args.json:
        title = f'{result["architecture"]} on {Path(args.dataset).resolve().name}'
        console.print(result_table(result['depths'], title, result['parameters']))
        if not args.evaluate:
            _print_end(options.output, result, args)
    return result


def _print_end(folder: Path, result: dict[str, Any], args: argparse.Namespace) -> None:
    """Print what a run wrote, and how to go on."""
    from ..tables import print_files, print_line

    model = 'config.json', 'model.safetensors', 'summary.json', 'accuracy.png'
    print_files(folder, (*model, 'metrics.jsonl', 'curves.png', 'checkpoints/'))
    print_files(folder / 'best', (*model, f'(the best epoch, {result["best_epoch"]} of {args.epochs})'))
    words = ['timm-ddnn', 'evaluate', str(folder), '--data', args.dataset]
    for name in ('input_key', 'target_key', 'val_split', 'val_fraction'):
        value = getattr(args, name)
        words += [] if value is None else ['--' + name.replace('_', '-'), str(value)]
    print_line(f'next: {shlex.join(words)}')


def _check(args: argparse.Namespace) -> None:
    """End the program if options do not go together."""
    if args.evaluate and not (args.pretrained or args.initial_checkpoint):
        fail('--evaluate needs weights: --pretrained or --initial-checkpoint')
    if os.path.isdir(args.initial_checkpoint):
        args.initial_checkpoint = os.path.join(args.initial_checkpoint, 'model.safetensors')
    if args.initial_checkpoint and not os.path.isfile(args.initial_checkpoint):
        fail(f'--initial-checkpoint must be a file, got {args.initial_checkpoint!r}')
    for name in ('scale', 'ratio'):
        low, high = getattr(args, name) or (0, 0)
        if low > high:
            fail(f'--{name} must be a lower and an upper bound, got {low} {high}')
    if args.in_memory:
        other = {name: getattr(args, name) for name in ('scale', 'ratio', 'color_jitter', 'aa', 'reprob')}
        other['train_crop_mode'] = args.train_crop_mode if args.train_crop_mode != 'pad' else None
        for name in filter(other.get, other):
            flag = '--' + name.replace('_', '-')
            fail(f'--in-memory goes with --train-crop-mode pad and --hflip alone, got {flag} {other[name]}')
    if args.class_weights and args.bce_loss:
        fail('--class-weights are of cross-entropy, got --bce-loss')
    if args.ema_teacher and not args.model_ema:
        fail('--ema-teacher needs the average: --model-ema')
    if args.frozen_teacher and not (args.full_net_epochs or args.pretrained or args.initial_checkpoint):
        fail('--frozen-teacher needs trained weights: --full-net-epochs, --pretrained or --initial-checkpoint')
    if args.frozen_teacher and (args.teacher or args.ema_teacher):
        fail(f'--frozen-teacher must be the only teacher, got {"--ema-teacher" if args.ema_teacher else args.teacher}')
    if args.full_net_epochs and args.resume not in (None, 'auto'):
        fail(f'--full-net-epochs resumes by --resume auto, got {args.resume!r}')
    if args.evaluate and args.resume:
        fail(f'--resume is for training, not for --evaluate, got {args.resume!r}')
    if args.resume == 'auto' and not args.output:
        fail('--resume auto needs --output, the folder of the run')
    if args.resume not in (None, 'auto'):
        if not os.path.isfile(os.path.join(args.resume, 'checksums.json')):
            fail(f"--resume must be 'auto' or a folder checkpoints/step-* to resume from, got {args.resume!r}")
        args.output = args.output or Path(args.resume).resolve().parent.parent
    if args.output and args.output.exists() and not args.output.is_dir():
        fail(f'--output must be a folder, got the file {args.output}')
    for folder in (args.output, args.output / 'full_net') if args.output and not (args.evaluate or args.resume) else ():
        if any(folder.glob('checkpoints/step-*')):
            fail(f'--output {folder} has checkpoints: resume by --resume auto, or choose another folder')
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        fail(f'--batch-size must be even for --mixup and --cutmix, got {args.batch_size}')
