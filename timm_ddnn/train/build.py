"""The parts of a training run, each built from the options of `timm-ddnn train`."""
import argparse
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from rich.console import Console
from timm.data import Mixup, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn
from torch.utils.data import DataLoader

from ..data.cached import MemoryImages
from ..data.datasets import ImageData, count_classes, load_image_data, match_classes
from ..data.images import Images, create_train_transform
from ..data.loader import create_loader
from ..models.load import create_ddnn, load_teacher, resolve_name
from ..task import EKDTask
from ..utils.environment import find_device
from ..utils.errors import InputError
from .progress import print_line

__all__ = [
    'check_sizes', 'choose_augmentation', 'create_accelerator', 'create_ema', 'create_mixup', 'create_model',
    'create_optimizer', 'create_scheduler', 'create_task', 'create_teacher', 'create_train_loader', 'create_val_loader',
    'load_data', 'memory_format', 'set_teacher',
]


def create_accelerator(args: argparse.Namespace) -> Accelerator:
    """Create the accelerator, which knows device, processes and precision.

    Some of its settings come from `accelerate launch`, a configuration file or the environment. Options that are given
    win over them; `args.grad_accum_steps` is then what is used.

    Raises:
        InputError: If the machine, the kind of processes or another setting does not go with the options.
    """
    plugin = GradientAccumulationPlugin(num_steps=args.grad_accum_steps) if args.grad_accum_steps else None
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=plugin,
            # Processes wait while one of them downloads and converts a large data set for the first time
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        )
    except (ValueError, ImportError, RuntimeError) as e:  # by which accelerate and torch judge their surroundings
        raise InputError(f'accelerate cannot be set up: {e}') from e
    find_device(accelerator.device.type)  # which the environment may have named
    args.grad_accum_steps = accelerator.gradient_accumulation_steps
    if args.grad_accum_steps < 1:
        raise InputError(f'gradient_accumulation_steps of accelerate must be at least 1, got {args.grad_accum_steps}')
    if accelerator.mixed_precision not in ('no', 'bf16', 'fp16'):
        raise InputError(f'mixed_precision of accelerate must be no, bf16 or fp16, got {accelerator.mixed_precision}')
    backend = accelerator.state.dynamo_plugin.backend.value
    if backend != 'NO':
        raise InputError(f'dynamo_backend of accelerate must be NO, because --torchcompile compiles, got {backend}')
    if accelerator.parallelism_config:
        raise InputError('parallelism_config of accelerate must not be used: every process has a whole model')
    if accelerator.device.type == 'cpu' and (accelerator.mixed_precision == 'fp16' or args.sync_bn):
        raise InputError("--mixed-precision fp16 and --sync-bn are for GPUs, on a CPU there are 'no' and 'bf16'")
    if accelerator.distributed_type in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
        got = accelerator.distributed_type.value
        raise InputError(f'several processes must be those of accelerate launch --multi_gpu, got {got}')
    return accelerator


def load_data(args: argparse.Namespace, accelerator: Accelerator) -> ImageData:
    """Find the data set; on each machine one process converts it, and the others wait."""
    with accelerator.local_main_process_first():
        return load_image_data(
            args.dataset,
            input_key=args.input_key,
            target_key=args.target_key,
            train_split=args.train_split,
            val_split=args.val_split,
            val_fraction=args.val_fraction,
            training=not args.evaluate,
        )


def create_model(
        args: argparse.Namespace,
        data: ImageData,
        device: torch.device,
        console: Console,
) -> tuple[nn.Module, ImageData]:
    """Create the model on its device.

    Args:
        args: Options of the run.
        data: The data set.
        device: Device of the model.
        console: Where to say that weights which are there are not used.

    Returns:
        The model, and the data with the labels that the model has for their classes.

    Raises:
        InputError: If there is no such model, an option does not go with it, or the data do not.
    """
    num_classes = args.num_classes or len(data.class_names)
    options = dict(
        pretrained=args.pretrained,
        checkpoint_path=args.initial_checkpoint,
        # Saved weights are evaluated with the classifier that they have
        num_classes=None if args.evaluate and args.pretrained else num_classes,
        subnets=args.subnets,
        private=args.private,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
    )
    twice = [name for name, _ in args.model_kwargs if name in options]
    if twice:
        raise InputError(
            f'--model-kwargs must be other arguments than {", ".join(options)}, which have options of their own, got '
            f'{twice[0]}')
    if not args.evaluate and num_classes < len(data.class_names):
        raise InputError(f'--num-classes must be at least {len(data.class_names)} for this data set, got {num_classes}')
    given = {name: value for name, value in options.items() if value is not None} | dict(args.model_kwargs)
    model = create_ddnn(args.model, **given)
    if args.img_size and model.pretrained_cfg.get('fixed_input_size') and 'img_size' not in given:
        model = create_ddnn(args.model, **given, img_size=args.img_size)  # as that of a ViT's position embedding
    if args.pretrained or args.initial_checkpoint:
        data = match_classes(data, model, more=bool(args.num_classes))
    elif ':' in resolve_name(args.model):
        print_line(
            console, f'{args.model}: without --pretrained its weights are not used, training begins with random ones')
    model.set_grad_checkpointing(args.grad_checkpointing)
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device, memory_format=memory_format(args)), data


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Memory format of model and images."""
    return torch.channels_last if args.channels_last else torch.contiguous_format


def create_teacher(
        args: argparse.Namespace,
        data: ImageData,
        device: torch.device,
) -> tuple[nn.Module | None, ImageData]:
    """Load the net of --teacher, if there is one.

    Returns:
        The net or None, and the data with the labels that the net has for their classes.

    Raises:
        InputError: If there is no such net, it has no weights, or was trained on other classes.
    """
    if not args.teacher:
        return None, data
    try:
        teacher = load_teacher(args.teacher)
        data = match_classes(data, teacher, same_names=True)
    except InputError as e:
        raise InputError(f'--teacher {args.teacher}: {e}') from e
    return teacher.to(device, memory_format=memory_format(args)), data


def create_val_loader(
        args: argparse.Namespace,
        data: ImageData,
        data_config: Mapping[str, Any],
        device: torch.device,
) -> DataLoader:
    """Create the loader of the validation images, which are prepared as timm does for inference."""
    if args.in_memory:
        images = MemoryImages(data, 'validation', data_config, num_workers=args.workers, device=device)
    else:
        transform = create_transform(**data_config, normalize=False)
        images = Images(data, 'validation', transform, in_chans=data_config['input_size'][0], seed=None)
    batch_size = args.validation_batch_size or args.batch_size
    return create_loader(images, batch_size, training=False, num_workers=args.workers)


def create_train_loader(
        args: argparse.Namespace,
        data: ImageData,
        data_config: Mapping[str, Any],
        device: torch.device,
) -> DataLoader:
    """Create the loader of the training images.

    Raises:
        InputError: If an option of the augmentation has no such value.
    """
    augmentation = choose_augmentation(args, data_config)
    if args.in_memory:
        images = MemoryImages(
            data, 'train', data_config, hflip=augmentation['hflip'], seed=args.seed, num_workers=args.workers,
            device=device)
    else:
        transform = create_train_transform(data_config, **augmentation)
        images = Images(data, 'train', transform, in_chans=data_config['input_size'][0], seed=args.seed)
    return create_loader(images, args.batch_size, training=True, num_workers=args.workers)


def choose_augmentation(args: argparse.Namespace, data_config: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the arguments of `create_train_transform`: those of the command line, and defaults for the others."""
    return {
        'crop_mode': args.train_crop_mode or ('pad' if max(data_config['input_size'][-2:]) <= 64 else 'rrc'),
        'scale': args.scale,
        'ratio': args.ratio,
        'hflip': args.hflip if args.hflip is not None else 0.0 if args.dataset == 'digits' else 0.5,
        'color_jitter': args.color_jitter or None,
        'auto_augment': args.aa,
        're_prob': args.reprob,
    }


def create_task(
        args: argparse.Namespace,
        model: nn.Module,
        data: ImageData,
        device: torch.device,
        ekd_options: Mapping[str, Any],
        task_type: Callable[..., EKDTask] = EKDTask,
) -> EKDTask:
    """Create the task: the model with its loss.

    Args:
        args: Options of the run.
        model: The model.
        data: The data set with the labels of the model, for --class-weights.
        device: Device of the model.
        ekd_options: Arguments of `EKDLoss`.
        task_type: `EKDTask`, or what takes its place.

    Raises:
        InputError: If an option has no such value.
    """
    soft_targets = args.mixup > 0 or args.cutmix > 0
    if args.class_weights:
        counts = torch.from_numpy(count_classes(data, model.num_classes)).float()
        weight = torch.where(counts > 0, counts.sum() / (counts.count_nonzero() * counts), 0.0)
        criterion = {'criterion': nn.CrossEntropyLoss(weight, label_smoothing=0.0 if soft_targets else args.smoothing)}
    else:
        criterion = {'criterion_kwargs': dict(
            loss_type='bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=soft_targets)}
    task = task_type(model, device=device, verbose=False, **criterion, **ekd_options)
    if args.torchcompile:
        if args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
            known = ', '.join(torch.compiler.list_backends())
            raise InputError(f'--torchcompile must be a backend such as {known}, got {args.torchcompile}')
        task.trainable_module = torch.compile(model, backend=args.torchcompile)
    return task


def set_teacher(
        args: argparse.Namespace,
        task: EKDTask,
        teacher: nn.Module | None,
        data: ImageData,
        data_config: Mapping[str, Any],
) -> None:
    """Let a trained net teach, if there is one; its base models are then the student's, too.

    Args:
        args: Options of the run.
        task: The task.
        teacher: The net.
        data: The data set with the labels of the model.
        data_config: Preprocessing of the images.

    Raises:
        InputError: If the net does not go with the model or the images.
    """
    if not teacher:
        return
    student, flag = unwrap_model(task.trainable_module), f'--teacher {args.teacher}'
    learns_before = args.frozen_teacher and args.full_net_epochs  # the classes of the data
    if args.frozen_teacher:
        flag, classes = '--frozen-teacher', student.pretrained_cfg['num_classes']
        if args.pretrained and not learns_before and classes != student.num_classes:
            raise InputError(
                f'{flag} needs weights of {student.num_classes} classes, those of {args.model} are of {classes}: '
                '--full-net-epochs trains the full-net before')
    if not learns_before:
        try:
            matched = match_classes(data, teacher, more=args.frozen_teacher and bool(args.num_classes), same_names=True)
        except InputError as e:
            raise InputError(f'{flag}: {e}') from e
        if matched is not data:
            raise InputError(f'{flag}: its classes must be in the order of those of the model')
    try:
        task.set_teacher(teacher)
        task.teacher(torch.zeros(1, *data_config['input_size'], device=next(teacher.parameters()).device))
    except InputError as e:
        raise InputError(f'{flag}: {e}') from e
    student.base_models = list(dict.fromkeys([*student.base_models, *teacher.base_models]))


def create_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Create what mixes batches, None without --mixup and --cutmix."""
    if not (args.mixup or args.cutmix):
        return None
    return Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)


def create_ema(args: argparse.Namespace, model: nn.Module, task: EKDTask) -> ModelEmaV3 | None:
    """Create the average of the weights, which may teach; None without --model-ema.

    Raises:
        InputError: If it is to teach and the loss has nothing to teach.
    """
    if not args.model_ema:
        return None
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.ema_teacher:
        task.set_teacher(ema.module)
    return ema


def create_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Create the optimizer.

    Raises:
        InputError: If timm has none of this name for these values.
    """
    try:
        optimizer = create_optimizer_v2(
            model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum)
    except (ValueError, ImportError, AssertionError) as e:  # by which timm and its optimizers judge them
        raise InputError(f'--opt {args.opt}: {e}') from e
    if getattr(optimizer, 'is_second_order', False):
        raise InputError(f'--opt must be an optimizer of first order, got {args.opt}')
    return optimizer


def create_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, batches: int) -> Scheduler:
    """Create the schedule of the learning rate, by updates.

    Args:
        args: Options of the run.
        optimizer: The optimizer.
        batches: Batches of an epoch.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=math.ceil(batches / args.grad_accum_steps),
    )
    return scheduler


def check_sizes(
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: nn.Module,
        data: ImageData,
        data_config: Mapping[str, Any],
        batches: int,
) -> None:
    """Check options that depend on the sizes of data and model, and on the count of processes.

    Args:
        args: Options of the run.
        accelerator: Accelerator of the run.
        model: The model.
        data: The data set.
        data_config: Preprocessing of the images.
        batches: Batches of an epoch.

    Raises:
        InputError: If one does not go with them.
    """
    height, width = data_config['input_size'][1:]
    if args.batch_size == 1 and max(height, width) <= model.feature_info[-1]['reduction']:
        raise InputError(
            f'--batch-size must be at least 2 for images of {width} px, whose last map is one pixel: batch norm needs '
            'more than one value, got 1')
    if not batches:
        most = len(data.train) // accelerator.num_processes
        raise InputError(f'--batch-size must be at most {most} for {len(data.train)} images, got {args.batch_size}')
    if args.best_by not in (None, *model.depths):
        raise InputError(f'--best-by must be one of the depths {model.depths}, got {args.best_by}')
