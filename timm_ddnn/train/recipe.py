"""The recipe of a training run: data, model, task, optimizer, loop, save.

Its parts are built in `build.py`. The steps of an epoch are in `loop.py`, the position in the run is in `state.py`,
what it writes in `output.py`, and what it resumes from in `checkpoint.py`.
"""
import argparse
import copy
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, set_seed
from rich.console import Console
from safetensors.torch import load_file
from timm.data import resolve_input_data_config
from timm.utils import distribute_bn
from torch import nn
from torch.utils.data import DataLoader

from ..data.content import count_duplicates
from ..data.datasets import quiet_datasets
from ..data.loader import loading, normalize
from ..evaluation.metrics import add_accuracies
from ..evaluation.predict import evaluate
from ..task import EKDTask
from ..utils.costs import count_costs
from ..utils.errors import InputError
from ..utils.files import write_json
from . import build
from .checkpoint import Checkpoints
from .loop import check_weights, loss_record, train_one_epoch
from .output import RunFolder, copy_best, describe_results, describe_run, open_output
from .progress import TrainProgress, print_banner, print_line, start_tracker
from .signals import EXIT_STOPPED, StopRequest, stop_signals
from .state import TrainState, fixed_arguments

__all__ = ['evaluate_only', 'train']


@loading()
def train(
        args: argparse.Namespace,
        ekd_options: Mapping[str, Any],
        console: Console,
        task_type: Callable[..., EKDTask] = EKDTask,
) -> dict[str, Any] | None:
    """Train a model, and write it, its metrics and its checkpoints to a folder.

    With --full-net-epochs the full-net trains alone before, as a run of its own in the folder `full_net` of this one,
    which then begins with its weights.

    Args:
        args: Options of `timm-ddnn train`.
        ekd_options: Arguments of `EKDLoss`.
        console: Where to show progress.
        task_type: `EKDTask`, or what takes its place.

    Returns:
        What summary.json holds, in the first process; None in the others.

    Raises:
        InputError: If an option is wrong, or does not go with the data, the model or the machine; if an image cannot be
            read, a checkpoint or the output cannot be written, or a number is not finite.
        SystemExit: With status 75 after a signal has stopped the run, which may be resumed.
    """
    summary = train_run(args, ekd_options, console, task_type)
    PartialState().destroy_process_group()
    return summary


def train_run(
        args: argparse.Namespace,
        ekd_options: Mapping[str, Any],
        console: Console,
        task_type: Callable[..., EKDTask],
        request: StopRequest | None = None,
) -> dict[str, Any] | None:
    """Train as `train`, and leave the group of processes as it is; `request` is that of the run around this one."""
    quiet_datasets()
    accelerator = build.create_accelerator(args)
    device, main_process = accelerator.device, accelerator.is_main_process
    console = console if main_process else Console(quiet=True)

    # Data, model, task, optimizer
    with console.status('preparing'):
        data = build.load_data(args, accelerator)
        teacher, data = build.create_teacher(args, data, device)
        set_seed(args.seed)
        model, data = build.create_model(args, data, device, console)
        teacher = copy.deepcopy(model) if args.frozen_teacher else teacher
        data_config = resolve_input_data_config(model, args={'img_size': args.img_size})
        task = build.create_task(args, model, data, device, ekd_options, task_type)
        build.set_teacher(args, task, teacher, data, data_config)
        optimizer = build.create_optimizer(args, model)
        train_loader = build.create_train_loader(args, data, data_config, device)
        val_loader = build.create_val_loader(args, data, data_config, device)
        ema = build.create_ema(args, model, task)
        mixup = build.create_mixup(args, model.num_classes)
        task, optimizer, train_loader, val_loader = accelerator.prepare(task, optimizer, train_loader, val_loader)
        build.check_sizes(args, accelerator, model, data, data_config, batches=len(train_loader))
        scheduler = build.create_scheduler(args, optimizer, batches=len(train_loader))

        names = model.pretrained_cfg['architecture'], Path(args.dataset).resolve().name
        nets = {'': model, 'ema_': ema.module} if ema else {'': model}
        prefix, net = list(nets.items())[-1]  # what is reported and saved
        costs = count_costs(model, data_config['input_size'])
    progress = TrainProgress(console, args.epochs, len(train_loader))
    with ExitStack() as stack:
        output = stack.enter_context(open_output(args, '-'.join(names)))
        request = request or stack.enter_context(stop_signals())
        if args.full_net_epochs:
            model.load_state_dict(train_full_net(args, ekd_options, console, task_type, request))
            for copied in filter(None, (ema and ema.module, args.frozen_teacher and teacher)):
                copied.load_state_dict(model.state_dict())
        arguments = fixed_arguments(args, accelerator, data, teacher)
        stack.enter_context(progress)
        folder = RunFolder(output, net, prefix, costs, data_config, data.class_names, args.best_by)
        checkpoints = Checkpoints(
            accelerator, output / 'checkpoints', model, folder.save_net, ema=ema.module if ema else None,
            keep=args.checkpoint_hist)
        duplicates = count_duplicates(data) if main_process else None
        print_banner(console, args, accelerator, model, data, data_config, duplicates)
        state = resume(args, checkpoints, arguments, len(train_loader), console) or TrainState(arguments)
        start_tracker(accelerator, args, output, f'{output.name}-{state.run}')
        scheduler.step_update(state.updates)

        # Loop: every epoch is evaluated and saved
        while state.epoch < args.epochs and not request.agreed:
            means = train_one_epoch(
                args, accelerator, task, train_loader, data_config, optimizer, scheduler, state, checkpoints, progress,
                request, mixup=mixup, ema=ema)
            if state.step < len(train_loader):  # stopped
                break
            check_weights(model, state.updates)
            record = loss_record(state, optimizer, means) | evaluate_nets(
                accelerator, nets, val_loader, data_config, progress)
            rows = folder.rows(record)
            record |= {
                'top1': mean(row['top1'] for row in rows),
                'seconds': state.seconds,
                'images_per_second': len(train_loader) * train_loader.total_batch_size / state.seconds,
            }
            state.end_epoch(record)
            accelerator.log(record, step=state.updates)
            if main_process:
                folder.write_epoch(state)
            checkpoints.save(state)  # last: a run that resumes from it has all that the epoch writes
            print_line(console, describe_epoch(args, state, rows))
            request.agree()
        for tracker in accelerator.trackers:
            tracker.finish()
        if request.agreed:
            print_line(console, f'{request.agreed}: stopped after update {state.updates}, --resume auto resumes')
            PartialState().destroy_process_group()
            sys.exit(EXIT_STOPPED)

        if not main_process:
            return None
        augmentation = {**build.choose_augmentation(args, data_config), 'mixup': args.mixup, 'cutmix': args.cutmix}
        return folder.write_summary(state, {
            **describe_run(accelerator, vars(args)),
            **describe_results(args, model, data),
            'training_images': len(data.train),
            'augmentation': {name: value for name, value in augmentation.items() if value},
            'duplicates': duplicates,
            'teacher_sha256': arguments['teacher_sha256'],
        }, ' on '.join(names))


def train_full_net(
        args: argparse.Namespace,
        ekd_options: Mapping[str, Any],
        console: Console,
        task_type: Callable[..., EKDTask],
        request: StopRequest,
) -> dict[str, torch.Tensor]:
    """Train the full-net alone for --full-net-epochs, or resume that; return its weights.

    Args:
        args: Options of the run that begins with the weights.
        ekd_options: Arguments of `EKDLoss`.
        console: Where to show progress.
        task_type: `EKDTask`, or what takes its place.
        request: Whether a signal asks to stop.
    """
    folder = args.output / 'full_net'
    print_line(console, f'the full-net alone, {args.full_net_epochs} epochs, in {folder}')
    alone = argparse.Namespace(**{
        **vars(args), 'epochs': args.full_net_epochs, 'full_net_epochs': 0, 'output': folder,
        'warmup_epochs': round(args.warmup_epochs * args.full_net_epochs / args.epochs),
        # What is of sub-nets alone
        'subnets': [], 'frozen_teacher': False, 'best_by': None,
        'model_kwargs': [(name, value) for name, value in args.model_kwargs if name != 'depth'],
    })
    train_run(alone, {**ekd_options, 'weights': {}}, console, task_type, request)
    return load_file(folder / 'model.safetensors')


@loading()
def evaluate_only(args: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    """Evaluate saved weights, and write evaluation.json if there is a folder for it.

    Args:
        args: Options of `timm-ddnn train --evaluate`.
        console: Where to show messages.

    Returns:
        What evaluation.json holds, in the first process; None in the others.

    Raises:
        InputError: If an option is wrong, or does not go with the data, the model or the machine, or an image cannot
            be read.
    """
    quiet_datasets()
    accelerator = build.create_accelerator(args)
    console = console if accelerator.is_main_process else Console(quiet=True)
    with console.status('evaluating'):
        data = build.load_data(args, accelerator)
        model, data = build.create_model(args, data, accelerator.device, console)
        data_config = resolve_input_data_config(model, args={'img_size': args.img_size})
        val_loader = accelerator.prepare(build.create_val_loader(args, data, data_config, accelerator.device))
        if args.output and accelerator.is_main_process:
            args.output.mkdir(parents=True, exist_ok=True)  # an error better now than after the evaluation
        metrics = evaluate(accelerator, model, normalize(val_loader, data_config, accelerator.device))
    rows = add_accuracies(count_costs(model, data_config['input_size']), metrics)
    result = {**describe_run(accelerator, vars(args)), **describe_results(args, model, data), 'depths': rows}
    if args.output and accelerator.is_main_process:
        write_json(args.output / 'evaluation.json', result)
    return result if accelerator.is_main_process else None


def resume(
        args: argparse.Namespace,
        checkpoints: Checkpoints,
        arguments: Mapping[str, Any],
        batches: int,
        console: Console,
) -> TrainState | None:
    """Load the checkpoint of --resume, to be called by all processes; None if there is none.

    Args:
        args: Options of the run.
        checkpoints: Checkpoints of the run.
        arguments: What decides its weights.
        batches: Batches of an epoch.
        console: Where to say what is resumed from.

    Raises:
        InputError: If the checkpoint is damaged, of another run or other data, or the end of a run whose model is
            elsewhere.
    """
    path, damaged = checkpoints.find(args.resume) if PartialState().is_main_process else (None, [])
    for line in damaged:
        print_line(console, line)
    path = broadcast_object_list([path])[0]
    if path is None:
        return None
    saved = checkpoints.read_state(path)
    if saved['step'] >= batches:
        raise InputError(f'--resume {path} is at batch {saved["step"]} of an epoch, of which the data have {batches}')
    state = TrainState.from_dict(saved, arguments)
    output = checkpoints.folder.parent
    if PartialState().is_main_process:
        copy_best(path.resolve().parent.parent, output, state.epoch)
    if state.epoch == args.epochs and not (output / 'model.safetensors').exists():
        raise InputError(f'--resume {path} is the end of a run, whose model is not in --output {output}')
    checkpoints.load(path)
    place = f'batch {state.step}/{batches} of epoch {state.epoch + 1}' if state.epoch < args.epochs else 'its end'
    print_line(console, f'resuming from {path}: {place}')
    return state


def evaluate_nets(
        accelerator: Accelerator,
        nets: Mapping[str, nn.Module],
        loader: DataLoader,
        data_config: Mapping[str, Any],
        progress: TrainProgress,
) -> dict[str, float]:
    """Measure the accuracy of every depth of some nets, to be called by all processes.

    Args:
        accelerator: Accelerator of the run.
        nets: The nets, by what the names of their metrics begin with. Their statistics become those of all processes.
        loader: Loader of the validation images.
        data_config: Preprocessing of the images.
        progress: Shows how far it is.
    """
    metrics = {}
    for prefix, net in nets.items():
        if accelerator.num_processes > 1:
            distribute_bn(net, accelerator.num_processes, reduce=True)
        found = evaluate(accelerator, net, normalize(progress.validate(loader), data_config, accelerator.device))
        metrics |= {prefix + metric: value for metric, value in found.items()}
    return metrics


def describe_epoch(args: argparse.Namespace, state: TrainState, rows: list[dict[str, Any]]) -> str:
    """Describe what an epoch gave, in a line."""
    record = state.history[-1]
    tops = ' '.join(f'{row["top1"]:.2f} ({row["depth"]})' for row in rows)
    averaged = ' of averaged weights' if args.model_ema else ''
    return (
        f'epoch {state.epoch}/{args.epochs}: loss {record["train_loss"]:.3f}, top-1 {tops}{averaged}, '
        f'{record["images_per_second"]:.0f} images/s'
    )
