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

    # The accuracy of every depth of a trained model
    accelerate launch train_scripts/train_ekd.py --evaluate --pretrained --model local-dir:output/ddnn_resnet20-digits

What a run writes, and the names of the metrics, stand at the head of `timm_ddnn/report.py`. The options are named as in
timm's training script; random augmentation is a function of --seed, epoch and image, whatever the number of --workers.
"""
import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from timm.data import Mixup, create_transform, resolve_input_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, get_outdir

import timm_ddnn
from timm_ddnn.cli import ArgumentParser, create_ddnn, number, one_line_errors, parse_blocks, parse_option, parse_weight
from timm_ddnn.data import load_image_data
from timm_ddnn.evaluation import evaluate
from timm_ddnn.images import ImageReadError, Images, create_loader, create_train_transform, seeded
from timm_ddnn.report import count_costs, describe_run, plot_accuracy, plot_curves, result_table, save_model, write_json


def parse_args():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    count, fraction, amount = number(int, 1), number(float, 0, 1), number(float, 0)

    arg = parser.add_argument_group('model').add_argument
    arg('--model', default='ddnn_resnet20', help="timm's name, local-dir:FOLDER or hf-hub:ID of a dynamic-depth model")
    arg('--subnets', nargs='+', type=parse_blocks, help="blocks per stage of every sub-net, '2,2,2,2' '1,1,1,1'")
    arg('--pretrained', action='store_true', help='start from published or saved weights')
    arg('--initial-checkpoint', default='', metavar='FILE', help='start from the weights in a file')
    arg('--num-classes', type=count, help='classes of the model, those of the data set if not given')
    arg('--img-size', type=count, help="side of the images in pixels, the model's if not given")
    arg('--drop', type=fraction, default=0.0, help='dropout rate before the classifier')
    arg('--drop-path', type=fraction, default=0.0, help='stochastic depth rate')
    arg('--model-kwargs', nargs='+', type=parse_option, default=[], metavar='KEY=VALUE', help='further arguments')

    arg = parser.add_argument_group('data').add_argument
    arg('--dataset', default='digits', help="'digits', a folder of parquet or image files, or an id on the Hub")
    arg('--input-key', help='image column, found if not given')
    arg('--target-key', help='label column, found if not given')
    arg('--train-split', help="'train' if not given")
    arg('--val-split', help="the first of 'validation', 'val', 'valid' and 'test' if not given")
    arg('-b', '--batch-size', type=count, default=64, help='images per process and step')
    arg('-vb', '--validation-batch-size', type=count, help='the batch size if not given')
    arg('-j', '--workers', type=number(int, 0), default=2, help='processes that load data, per process')

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

    arg = parser.add_argument_group('loss').add_argument
    loss = timm_ddnn.EKDLoss()
    arg('--temperature', type=amount, default=loss.temperature, help='temperature of the KL divergence')
    arg('--alpha', type=amount, default=loss.alpha, help='weight of the KL divergence')
    arg('--beta', type=amount, default=loss.beta, help='weight of the attention')
    arg('--attention', choices=('energy', 'standardized'), default=loss.attention, help='form of the attention')
    arg('--stages', nargs='+', type=int, help='stages whose attention is compared, from 0, all if not given')
    arg('--weights', nargs='+', type=parse_weight, default=[], metavar='DEPTH=WEIGHT', help='loss weights of sub-nets')
    arg('--smoothing', type=fraction, default=0.0, help='label smoothing')
    arg('--bce-loss', action='store_true', help='binary cross-entropy in the place of cross-entropy')

    arg = parser.add_argument_group('optimization').add_argument
    arg('--epochs', type=count, default=15, help='epochs of training')
    arg('--opt', default='sgd', help="timm's name of an optimizer; sgd is with Nesterov momentum")
    arg('--momentum', type=fraction, default=0.9, help='momentum')
    arg('--weight-decay', type=amount, default=5e-4, help='weight decay, not on biases and norms')
    arg('--clip-grad', type=amount, help='norm that gradients are clipped to')
    arg('--grad-accum-steps', type=count, default=1, help='batches per update')
    arg('--sched', choices=('cosine', 'tanh', 'constant'), default='cosine', help='schedule, stepped per update')
    arg('--lr', type=amount, default=0.1, help='learning rate')
    arg('--warmup-epochs', type=number(int, 0), default=1, help='epochs of linear warm-up')
    arg('--warmup-lr', type=amount, default=1e-5, help='learning rate at the start of the warm-up')
    arg('--min-lr', type=amount, default=0.0, help='learning rate at the end of the cosine')
    arg('--model-ema', action='store_true', help='average the weights; the average is reported and saved')
    arg('--model-ema-decay', type=fraction, default=0.9998, help='decay of the average')
    arg('--model-ema-warmup', action='store_true', help='let the decay rise to its value')

    arg = parser.add_argument_group('run').add_argument
    arg('--evaluate', action='store_true', help='report the accuracy of every depth, without training')
    arg('--output', type=Path, help='folder to write to, a new one in output/ if not given')
    arg('--seed', type=number(int, 0, 2 ** 32 - 1), default=0, help='seed of everything random')
    arg('--mixed-precision', choices=('no', 'bf16', 'fp16'), help="accelerate launch's if not given")
    arg('--channels-last', action=argparse.BooleanOptionalAction, default=True, help='memory format')
    arg('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='compile the model for training')
    arg('--grad-checkpointing', action='store_true', help='less memory, more computation')
    arg('--sync-bn', action='store_true', help='batch-norm statistics over all processes (GPUs)')
    arg('--log-interval', type=count, default=50, help='batches between two reports of the loss')
    args = parser.parse_args()
    if args.evaluate and not (args.pretrained or args.initial_checkpoint):
        parser.error('--evaluate needs weights: --pretrained or --initial-checkpoint')
    if args.initial_checkpoint and not os.path.isfile(args.initial_checkpoint):
        parser.error(f'--initial-checkpoint must be a file, got {args.initial_checkpoint!r}')
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f'--batch-size must be even for --mixup and --cutmix, got {args.batch_size}')
    return args


def main():
    args = parse_args()
    console = Console()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()

    # Set-up: whatever is wrong with the arguments is found here
    with one_line_errors(ValueError, OSError, AssertionError):
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.grad_accum_steps)
        device, main_process = accelerator.device, accelerator.is_main_process
        if device.type == 'cpu' and (accelerator.mixed_precision == 'fp16' or args.sync_bn):
            raise ValueError("--mixed-precision fp16 and --sync-bn are for GPUs, on a CPU there are 'no' and 'bf16'")

        with accelerator.main_process_first():
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
        model = create_ddnn(
            args.model,
            pretrained=args.pretrained,
            checkpoint_path=args.initial_checkpoint,
            # Saved weights are evaluated with the classifier that they have
            num_classes=None if args.evaluate and args.pretrained else num_classes,
            subnets=args.subnets,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **dict(args.model_kwargs),
        )
        if not len(data.class_names) <= num_classes == model.num_classes:
            raise ValueError(
                f'the data set has {len(data.class_names)} classes, got --num-classes {args.num_classes} and a model '
                f'of {model.num_classes}'
            )
        model.set_grad_checkpointing(args.grad_checkpointing)
        num_stages = len(model.blocks(None))
        if any(not -num_stages <= stage < num_stages for stage in args.stages or ()):
            raise ValueError(f'--stages must be from {-num_stages} to {num_stages - 1}, got {args.stages}')
        if args.sync_bn:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
        model = model.to(device, memory_format=memory_format)
        data_config = resolve_input_data_config(model, args={'img_size': args.img_size})
        image_args = dict(in_chans=data_config['input_size'][0], seed=args.seed)
        images = Images(data, 'validation', create_transform(**data_config), **image_args)
        batch_size = args.validation_batch_size or args.batch_size
        val_loader = create_loader(images, batch_size, training=False, num_workers=args.workers)

        name = f'{model.pretrained_cfg["architecture"]}-{Path(args.dataset).resolve().name}'
        output = args.output
        if main_process and (output or not args.evaluate):
            output = output or Path(get_outdir('output', name, inc=True))
            output.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=output).close()  # an error better now than after the training

    costs = count_costs(model, data_config['input_size'])

    def add_results(metrics):
        return [dict(row, top1=metrics[f'top1_{row["depth"]}'], top5=metrics[f'top5_{row["depth"]}']) for row in costs]

    def finish(file, metrics, **results):
        if main_process:
            console.print(result_table(add_results(metrics), name, sum(p.numel() for p in model.parameters())))
        if main_process and output:
            write_json(output / file, {
                **describe_run(accelerator, vars(args)),
                'validation_images': len(data.validation),
                'depths': add_results(metrics),
                **results,
            })
            files = sorted(path.name for path in output.iterdir())
            console.print(f'{output}:', *files, soft_wrap=True, markup=False, highlight=False)
        accelerator.end_training()

    if args.evaluate:
        with one_line_errors(ImageReadError, every_process=True):
            return finish('evaluation.json', evaluate(accelerator, model, accelerator.prepare(val_loader)))

    with one_line_errors(ValueError, AssertionError, RuntimeError):
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
        if args.torchcompile:
            task.compile(backend=args.torchcompile)
        optimizer = create_optimizer_v2(
            model, args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum)
        transform = create_train_transform(
            data_config,
            crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip if args.hflip is not None else 0.0 if args.dataset == 'digits' else 0.5,
            color_jitter=args.color_jitter or None,
            auto_augment=args.aa,
            re_prob=args.reprob,
        )
        images = Images(data, 'train', transform, **image_args)
        train_loader = create_loader(images, args.batch_size, training=True, num_workers=args.workers)
        task, optimizer, train_loader, val_loader = accelerator.prepare(task, optimizer, train_loader, val_loader)
        if not len(train_loader):
            most = len(data.train) // accelerator.num_processes
            raise ValueError(f'--batch-size must be at most {most} for {len(data.train)} images, got {args.batch_size}')
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=math.ceil(len(train_loader) / args.grad_accum_steps),
    )
    ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup) if args.model_ema else None

    history, updates = [], 0
    progress = Progress(
        TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn('{task.fields[terms]}'), console=console, disable=not (main_process and console.is_terminal),
    )
    # An image that does not decode, or a loss that is not finite, is met by some processes and not by others
    with one_line_errors(ImageReadError, FloatingPointError, every_process=True), progress:
        bar = progress.add_task('', terms='')
        for epoch in range(args.epochs):
            torch.manual_seed(hash((args.seed, epoch, accelerator.process_index)))  # of dropout and the like
            task.train()
            train_loader.set_epoch(epoch)
            sums, start = {}, time.perf_counter()
            progress.reset(bar, total=len(train_loader), description=f'epoch {epoch + 1}/{args.epochs}')
            for step, (images, target) in enumerate(train_loader):
                if use_mixup:
                    with seeded(args.seed, epoch, step, accelerator.process_index + 1):
                        images, target = mixup(images, target)
                images = images.contiguous(memory_format=memory_format)
                with accelerator.accumulate(task):
                    terms = task(images, target)
                    accelerator.backward(terms['loss'])
                    if args.clip_grad and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(task.parameters(), args.clip_grad)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    updates += 1
                    scheduler.step_update(updates)
                    if ema:
                        ema.update(model, step=updates)
                # The sums stay on the device: reading one waits for all the work that was queued there
                for term, value in terms.items():
                    if term != 'output':
                        sums[term] = sums.get(term, 0) + value.detach()
                progress.advance(bar)
                if (step + 1) % args.log_interval == 0 or step + 1 == len(train_loader):
                    if not sums['loss'].isfinite():
                        raise FloatingPointError(f'loss is not finite in epoch {epoch + 1}, try a lower --lr')
                    line = '  '.join(f'{term} {float(value) / (step + 1):.3f}' for term, value in sums.items())
                    progress.update(bar, terms=line)
                    if progress.disable and main_process and step + 1 < len(train_loader):
                        console.print(f'batch {step + 1}/{len(train_loader)}: {line}', soft_wrap=True, highlight=False)
            seconds = time.perf_counter() - start

            record = {'epoch': epoch, 'lr': optimizer.param_groups[0]['lr']}
            means = accelerator.reduce(sums, reduction='mean')
            record |= {f'train_{term}': float(value) / len(train_loader) for term, value in means.items()}
            for prefix, net in [('', model), ('ema_', ema.module)] if ema else [('', model)]:
                if accelerator.num_processes > 1:
                    distribute_bn(net, accelerator.num_processes, reduce=True)
                metrics = evaluate(accelerator, net, val_loader)
                record |= {prefix + metric: value for metric, value in metrics.items()}
            images_seen = len(train_loader) * args.batch_size * accelerator.num_processes
            record |= {'seconds': seconds, 'images_per_second': images_seen / seconds}
            history.append(record)
            if main_process:
                tops = ', '.join(f'{metrics[f"top1_{depth}"]:.2f} (depth {depth})' for depth in model.depths)
                console.print(
                    f'epoch {epoch + 1}/{args.epochs}: loss {record["train_loss"]:.3f}, top-1 {tops}'
                    f'{" of averaged weights" if ema else ""}, {images_seen / seconds:.0f} images/s',
                    soft_wrap=True, highlight=False,
                )
                (output / 'summary.json').unlink(missing_ok=True)  # of an earlier run
                with open(output / 'metrics.jsonl', 'a' if epoch else 'w') as file:
                    file.write(json.dumps(record, allow_nan=False) + '\n')
                save_model(
                    net, output, data_config=data_config, class_names=data.class_names, rows=add_results(metrics))

    if main_process:  # pictures first: a summary means that the run is complete
        plot_accuracy(output / 'accuracy.png', add_results(metrics), name)
        plot_curves(output / 'curves.png', history, model.depths, name)
    finish(
        'summary.json',
        metrics,
        weights='averaged' if ema else 'last',
        training_images=len(data.train),
        seconds_per_epoch=sum(record['seconds'] for record in history) / len(history),
        images_per_second=sum(record['images_per_second'] for record in history) / len(history),
    )


if __name__ == '__main__':
    main()
