#!/usr/bin/env python3
"""Train all depths of a dynamic-depth model at once by embedded knowledge distillation.

    # One or two minutes on two CPU cores: a small model on scikit-learn's handwritten digits
    accelerate launch train_scripts/train_ekd.py

    # CIFAR-10 from the Hugging Face Hub, the same on every machine that `accelerate launch` knows
    accelerate launch --mixed_precision bf16 train_scripts/train_ekd.py \
        --model ddnn_resnet56 --dataset uoft-cs/cifar10 --epochs 200

    # ImageNet-style folders train/CLASS/*.jpg and val/CLASS/*.jpg, four GPUs, sub-nets of one's own
    accelerate launch --multi_gpu --num_processes 4 --mixed_precision bf16 train_scripts/train_ekd.py \
        --model ddnn_resnet50 --subnets 2,2,2,2 1,2,2,1 --dataset FOLDER --epochs 100 -b 256 --lr 0.4 --warmup-epochs 5

    # Go on from the newest checkpoint of the folder, or begin if there is none: for machines that may stop at any time
    accelerate launch train_scripts/train_ekd.py --output FOLDER --resume auto --checkpoint-interval 500

    # The accuracy of every depth of a trained model
    accelerate launch train_scripts/train_ekd.py --evaluate --pretrained --model output/ddnn_resnet20-digits

What a run writes, and the names of the metrics, stand at the head of `timm_ddnn/report.py`. The options are named as in
timm's training script; random augmentation is a function of --seed, epoch and image, whatever the number of --workers.
On SIGTERM and SIGINT a run saves a checkpoint and ends with status 75. `accelerate launch` passes signals on to several
processes only, so start a single one that may be stopped by `python train_scripts/train_ekd.py`.
"""
import json
import math
import os
import secrets
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from timm.data import Mixup, create_transform, resolve_input_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, get_outdir

import timm_ddnn
from timm_ddnn.data.cached import MemoryImages
from timm_ddnn.data.datasets import align_labels, load_image_data, quiet_datasets
from timm_ddnn.data.images import ImageReadError, Images, create_train_transform, seeded
from timm_ddnn.data.loader import create_loader
from timm_ddnn.evaluation.metrics import add_accuracies
from timm_ddnn.evaluation.plots import plot_accuracy, plot_curves
from timm_ddnn.evaluation.predict import evaluate
from timm_ddnn.hub.save import save_model
from timm_ddnn.models.load import create_ddnn, load_teacher, resolve_name
from timm_ddnn.train.checkpoint import CheckpointError, Checkpoints
from timm_ddnn.train.loop import LossMeter, check_weights
from timm_ddnn.train.options import UNESSENTIAL, parse_args
from timm_ddnn.train.recipe import describe_run
from timm_ddnn.train.signals import EXIT_STOPPED, stop_signals
from timm_ddnn.utils.costs import count_costs
from timm_ddnn.utils.files import write_json, write_text
from timm_ddnn.utils.modules import state_dict_sha256
from timm_ddnn_cli.arguments import one_line_errors
from timm_ddnn_cli.tables import result_table

# Steps between two times that processes ask each other for a signal to stop
STOP_INTERVAL = 10


@contextmanager
def named(flag, value):
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as e:  # timm's, of names that it does not know
        raise ValueError(f'{flag} {value}: {e}') from e


def check_classes(teacher, class_names):
    for name, got in zip(class_names, teacher.pretrained_cfg.get('label_names') or (), strict=False):
        if name != got:
            raise ValueError(f'its classes must be those of the data in their order, got {got!r} in place of {name!r}')


def make_output(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # an error better now than after the training


def find_checkpoint(resume, checkpoints, console):
    if resume == 'auto':
        path, damaged = checkpoints.newest()
        for other, damage in damaged.items():
            aside = other.with_name(f'damaged-{other.name}')
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(other, aside)
            console.print(f'{other} is damaged, left aside as {aside.name}: {damage}', soft_wrap=True, highlight=False)
        return path
    if resume:
        newer = [path.name for path in checkpoints.list() if path.name > Path(resume).resolve().name]
        if newer:
            raise ValueError(
                f'--resume {resume} is older than {", ".join(newer)} in {checkpoints.folder}: choose another --output')
        return Path(resume)
    return None


def first_signal(request):
    return next(filter(None, gather_object([request.signal])), None)


def start_tracker(accelerator, args, output, name):
    accelerator.project_configuration.logging_dir = str(output)
    accelerator.log_with = filter_trackers(args.report_to, output)
    if not accelerator.log_with:
        raise ValueError(f'--report-to {args.report_to} needs its package: pip install {args.report_to}')
    # A run that goes on is the same run to the tracker
    kwargs = {
        'wandb': {'name': name, 'id': name, 'resume': 'allow', 'dir': str(output)},
        'trackio': {'name': name, 'resume': 'allow'},
    }
    config = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
    try:
        accelerator.init_trackers('tensorboard' if args.report_to == 'tensorboard' else 'timm_ddnn', config, kwargs)
    except Exception as e:  # they raise many types, and none that they share
        raise ValueError(f'--report-to {args.report_to} cannot be started: {e}') from e


def main():
    args = parse_args(__doc__.splitlines()[0])
    console = Console()
    quiet_datasets()

    # Set-up: whatever is wrong with the arguments is found here
    with one_line_errors(ValueError, OSError, AssertionError):
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.grad_accum_steps,
            # Processes wait while one of them downloads and converts a large data set for the first time
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],
        )
        device, main_process = accelerator.device, accelerator.is_main_process
        if device.type == 'cpu' and (accelerator.mixed_precision == 'fp16' or args.sync_bn):
            raise ValueError("--mixed-precision fp16 and --sync-bn are for GPUs, on a CPU there are 'no' and 'bf16'")
        if accelerator.distributed_type in ('FSDP', 'DEEPSPEED', 'MEGATRON_LM'):
            got = accelerator.distributed_type.value
            raise ValueError(f'several processes must be those of accelerate launch --multi_gpu, got {got}')

        with accelerator.local_main_process_first():
            data = load_image_data(
                args.dataset,
                input_key=args.input_key,
                target_key=args.target_key,
                train_split=args.train_split,
                val_split=args.val_split,
                training=not args.evaluate,
            )
        num_classes = args.num_classes or len(data.class_names)
        set_seed(args.seed)
        model_args = dict(
            pretrained=args.pretrained,
            checkpoint_path=args.initial_checkpoint,
            # Saved weights are evaluated with the classifier that they have
            num_classes=None if args.evaluate and args.pretrained else num_classes,
            subnets=args.subnets,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
        )
        twice = [name for name, _ in args.model_kwargs if name in model_args]
        if twice:
            raise ValueError(
                f'--model-kwargs must be other arguments than {", ".join(model_args)}, which have options of their '
                f'own, got {twice[0]}')
        model = create_ddnn(args.model, **model_args, **dict(args.model_kwargs))
        if main_process and ':' in resolve_name(args.model) and not (args.pretrained or args.initial_checkpoint):
            console.print(
                f'{args.model}: without --pretrained its weights are not used, training begins with random ones',
                soft_wrap=True, highlight=False)
        if args.evaluate:
            data = align_labels(data, model.pretrained_cfg.get('label_names') or ())
            num_classes = args.num_classes or len(data.class_names)
        if not len(data.class_names) <= num_classes == model.num_classes:
            raise ValueError(
                f'the model must have the {len(data.class_names)} classes of the data set, or more by --num-classes, '
                f'got {model.num_classes}'
            )
        model.set_grad_checkpointing(args.grad_checkpointing)
        if args.sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        model = model.to(device, memory_format=memory_format)
        data_config = resolve_input_data_config(model, args={'img_size': args.img_size})
        in_chans = data_config['input_size'][0]
        if args.in_memory:
            images = MemoryImages(data, 'validation', data_config, num_workers=args.workers, device=device)
        else:
            images = Images(data, 'validation', create_transform(**data_config), in_chans=in_chans, seed=None)
        batch_size = args.validation_batch_size or args.batch_size
        val_loader = create_loader(images, batch_size, training=False, num_workers=args.workers)

    name, output = f'{model.pretrained_cfg["architecture"]}-{Path(args.dataset).resolve().name}', args.output
    add_results = partial(add_accuracies, count_costs(model, data_config['input_size']))

    def finish(file, metrics, **results):
        if main_process:
            console.print(result_table(add_results(metrics), name, sum(p.numel() for p in model.parameters())))
        if main_process and output:
            write_json(output / file, {
                **describe_run(accelerator, vars(args)),
                'validation_images': len(data.validation),
                'validation_split': str(data.validation.split),
                'data_on_hub': args.dataset != 'digits' and not os.path.isdir(args.dataset),
                'depths': add_results(metrics),
                **results,
            })
            files = sorted(path.name for path in output.iterdir())
            console.print(f'{output}:', *files, soft_wrap=True, markup=False, highlight=False)
        accelerator.end_training()

    if args.evaluate:
        with one_line_errors(ValueError, OSError):
            if main_process and output:
                make_output(output)
        with one_line_errors(ImageReadError, every_process=True):
            return finish('evaluation.json', evaluate(accelerator, model, accelerator.prepare(val_loader)))

    with one_line_errors(ValueError, AssertionError, RuntimeError):
        if args.batch_size == 1 and max(data_config['input_size'][1:]) <= model.feature_info[-1]['reduction']:
            raise ValueError(
                f'--batch-size must be at least 2 for images of {data_config["input_size"][-1]} px, whose last map is '
                'one pixel: batch norm needs more than one value, got 1')
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=num_classes)
        use_mixup = args.mixup > 0 or args.cutmix > 0
        task = timm_ddnn.EKDTask(
            model,
            criterion_kwargs=dict(
                loss_type='bce' if args.bce_loss else 'ce', smoothing=args.smoothing, soft_targets=use_mixup),
            device=device,
            verbose=False,
            temperature=args.temperature,
            alpha=args.alpha,
            beta=args.beta,
            attention=args.attention,
            stages=args.stages,
            weights=dict(args.weights),
        )
        teacher_sum = None
        if args.teacher:
            with named('--teacher', args.teacher):
                teacher = load_teacher(args.teacher)
                teacher_sum = state_dict_sha256(teacher)
                check_classes(teacher, data.class_names)
                task.set_teacher(teacher.to(device, memory_format=memory_format))
                task.run_teacher(torch.zeros(1, *data_config['input_size'], device=device))
        if args.torchcompile:
            with named('--torchcompile', args.torchcompile):
                task.trainable_module = torch.compile(model, backend=args.torchcompile)
        with named('--opt', args.opt):
            optimizer = create_optimizer_v2(
                model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum)
        if getattr(optimizer, 'is_second_order', False):
            raise ValueError(f'--opt must be an optimizer of first order, got {args.opt}')
        hflip = args.hflip if args.hflip is not None else 0.0 if args.dataset == 'digits' else 0.5
        if args.in_memory:
            images = MemoryImages(
                data, 'train', data_config, hflip=hflip, seed=args.seed, num_workers=args.workers, device=device)
        else:
            with named('--aa', args.aa) if args.aa else nullcontext():
                transform = create_train_transform(
                    data_config,
                    crop_mode=args.train_crop_mode,
                    scale=args.scale,
                    ratio=args.ratio,
                    hflip=hflip,
                    color_jitter=args.color_jitter or None,
                    auto_augment=args.aa,
                    re_prob=args.reprob,
                )
            images = Images(data, 'train', transform, in_chans=in_chans, seed=args.seed)
        train_loader = create_loader(images, args.batch_size, training=True, num_workers=args.workers)
        ekd_task = task
        task, optimizer, train_loader, val_loader = accelerator.prepare(task, optimizer, train_loader, val_loader)
        if not len(train_loader):
            most = len(data.train) // accelerator.num_processes
            raise ValueError(f'--batch-size must be at most {most} for {len(data.train)} images, got {args.batch_size}')
        updates_per_epoch = math.ceil(len(train_loader) / args.grad_accum_steps)
        if args.full_net_updates >= args.epochs * updates_per_epoch:
            raise ValueError(
                f'--full-net-updates must be less than the {args.epochs * updates_per_epoch} updates of the run, got '
                f'{args.full_net_updates}')
        if args.full_net_updates and accelerator.num_processes > 1 and not model.shared_affine:
            raise ValueError(
                '--full-net-updates is for one process, or for scale and shift that the depths share, got '
                f'{accelerator.num_processes} processes and shared_affine=False')
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None
    if args.ema_teacher:
        with one_line_errors(ValueError):
            ekd_task.set_teacher(ema.module)

    # Go on from a checkpoint, or begin
    with one_line_errors(CheckpointError, OSError, ValueError):
        if main_process:
            output = output or Path(get_outdir('output', name, inc=True))
            make_output(output)
        output = Path(broadcast_object_list([str(output)])[0])
        checkpoints = Checkpoints(
            accelerator, output / 'checkpoints', ema=ema.module if ema else None, keep=args.checkpoint_hist)
        fixed = {name: value for name, value in vars(args).items() if name not in UNESSENTIAL}
        fixed |= {
            'processes': accelerator.num_processes, 'mixed_precision': accelerator.mixed_precision,
            'device': device.type, 'visible_gpus': torch.cuda.device_count(), 'teacher_sha256': teacher_sum,
        }
        fixed = json.loads(json.dumps(fixed, default=str))
        state = {'epoch': 0, 'step': 0, 'updates': 0, 'history': [], 'run': secrets.token_hex(4)}
        resumed = find_checkpoint(args.resume, checkpoints, console) if main_process else None
        resumed = broadcast_object_list([resumed])[0]
        if resumed:
            state = checkpoints.read_state(resumed)
            was = state['arguments']
            changed = [f'{name} was {was.get(name)!r}, got {fixed.get(name)!r}'
                       for name in sorted(was | fixed) if was.get(name) != fixed.get(name)]
            if changed:
                raise ValueError(f'--resume needs the arguments of the run that it goes on with: {"; ".join(changed)}')
            if state['epoch'] == args.epochs and not (output / 'model.safetensors').exists():
                raise ValueError(f'--resume {resumed} is the end of a run, whose model is not in --output {output}')
            checkpoints.load(resumed)
            if main_process:
                console.print(f'going on from {resumed}', soft_wrap=True, highlight=False)
        if args.report_to != 'none':
            start_tracker(accelerator, args, output, f'{output.name}-{state["run"]}')
    history, updates = state['history'], state['updates']
    scheduler.step_update(updates)

    def save_checkpoint(**position):
        check_weights(model, updates)
        best = max(history, key=lambda record: record['top1'], default={}).get('updates')
        whole = dict(position, updates=updates, history=history, run=state['run'], arguments=fixed)
        checkpoints.save(updates, whole, best)

    progress = Progress(
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn('{task.fields[terms]}'), console=console, disable=not (main_process and console.is_terminal),
    )
    # An image that does not decode, or a loss that is not finite, is met by some processes and not by others
    met = ImageReadError, FloatingPointError, CheckpointError
    with one_line_errors(*met, every_process=True), stop_signals() as request, progress:
        bar, stop, steps = progress.add_task('', terms=''), None, len(train_loader)
        for epoch in range(state['epoch'], args.epochs):
            first = state['step'] if epoch == state['epoch'] else 0
            train_loader.set_epoch(epoch)
            if first:  # the random states are those of the checkpoint
                loader = accelerator.skip_first_batches(train_loader, first)
                meter = LossMeter(accelerator, first, state['sums'])
                start = time.perf_counter() - state['seconds']
            else:
                torch.manual_seed(hash((args.seed, epoch, accelerator.process_index)))  # of dropout and the like
                loader, meter, start = train_loader, LossMeter(accelerator), time.perf_counter()
            task.train()
            progress.reset(bar, total=steps, completed=first, description=f'epoch {epoch + 1}/{args.epochs}')
            for step, (images, target) in enumerate(loader, start=first):
                if use_mixup:
                    with seeded(args.seed, epoch, step, accelerator.process_index + 1):
                        images, target = mixup(images, target)
                images = images.contiguous(memory_format=memory_format)
                ekd_task.depth = model.depths[:1] if updates < args.full_net_updates else 'all'
                with accelerator.accumulate(task):
                    terms = task(images, target)
                    # accelerate divides by --grad-accum-steps, but the last update may be of fewer batches
                    batches = min(args.grad_accum_steps, steps - step // args.grad_accum_steps * args.grad_accum_steps)
                    accelerator.backward(terms['loss'] * (args.grad_accum_steps / batches))
                    if args.clip_grad and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(task.parameters(), args.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    updates += 1
                    scheduler.step_update(updates)
                    if ema:
                        ema.update(model, step=updates)
                meter.update(terms)
                progress.advance(bar)

                last = step + 1 == steps
                log = last or (step + 1) % args.log_interval == 0
                if accelerator.num_processes == 1 or (step + 1) % STOP_INTERVAL == 0:
                    stop = stop or first_signal(request)
                save = stop or (args.checkpoint_interval and updates % args.checkpoint_interval == 0)
                save = save and accelerator.sync_gradients and not last
                if log or save:
                    meter.check(epoch)
                if log:
                    means = meter.means()
                    line = '  '.join(f'{term} {value:.3f}' for term, value in means.items())
                    progress.update(bar, terms=line)
                    if progress.disable and main_process and not last:
                        console.print(f'batch {step + 1}/{steps}: {line}', soft_wrap=True, highlight=False)
                    record = {'epoch': epoch, 'updates': updates, 'lr': optimizer.param_groups[0]['lr']}
                    record |= {f'train_{term}': value for term, value in means.items()}
                    if not last:
                        accelerator.log(record, step=updates)
                if save:
                    seconds = time.perf_counter() - start
                    save_checkpoint(epoch=epoch, step=step + 1, seconds=seconds, sums=meter.sums())
                    if stop:
                        break
            if not last:
                break

            seconds = time.perf_counter() - start
            check_weights(model, updates)
            for prefix, net in [('', model), ('ema_', ema.module)] if ema else [('', model)]:
                if accelerator.num_processes > 1:
                    distribute_bn(net, accelerator.num_processes, reduce=True)
                metrics = evaluate(accelerator, net, val_loader)
                record |= {prefix + metric: value for metric, value in metrics.items()}
            images_per_second = steps * args.batch_size * accelerator.num_processes / seconds
            record |= {
                'top1': sum(metrics[f'top1_{depth}'] for depth in model.depths) / len(model.depths),
                'seconds': seconds,
                'images_per_second': images_per_second,
            }
            history.append(record)
            accelerator.log(record, step=updates)
            if main_process:
                try:
                    (output / 'summary.json').unlink(missing_ok=True)  # of an earlier run
                    write_text(output / 'metrics.jsonl', ''.join(
                        json.dumps(record, allow_nan=False) + '\n' for record in history))
                    save_model(
                        net, output, data_config=data_config, class_names=data.class_names, rows=add_results(metrics))
                except (OSError, SafetensorError) as e:
                    raise CheckpointError(f'{output} cannot be written to: {e}. Checkpoints are intact') from e
            save_checkpoint(epoch=epoch + 1, step=0)  # last: a run that goes on from it has all that the epoch writes
            if main_process:
                tops = ', '.join(f'{metrics[f"top1_{depth}"]:.2f} (depth {depth})' for depth in model.depths)
                console.print(
                    f'epoch {epoch + 1}/{args.epochs}: loss {record["train_loss"]:.3f}, top-1 {tops}'
                    f'{" of averaged weights" if ema else ""}, {images_per_second:.0f} images/s',
                    soft_wrap=True, highlight=False,
                )
            stop = first_signal(request)
            if stop:
                break

    if stop:
        if main_process:
            console.print(f'{stop}: stopped after update {updates}, --resume auto goes on', soft_wrap=True)
        accelerator.end_training()
        sys.exit(EXIT_STOPPED)
    prefix = 'ema_' if ema else ''
    metrics = {name.removeprefix(prefix): value for name, value in history[-1].items() if name.startswith(prefix)}
    with one_line_errors(OSError):
        if main_process:  # pictures first: a summary means that the run is complete
            plot_accuracy(output / 'accuracy.png', add_results(metrics), name)
            plot_curves(output / 'curves.png', history, model.depths, name)
        finish(
            'summary.json',
            metrics,
            weights='averaged' if ema else 'last',
            training_images=len(data.train),
            teacher_sha256=teacher_sum,
            seconds_per_epoch=sum(record['seconds'] for record in history) / len(history),
            images_per_second=sum(record['images_per_second'] for record in history) / len(history),
        )


if __name__ == '__main__':
    main()
