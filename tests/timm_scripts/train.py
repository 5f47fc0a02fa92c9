"""Stand-in for timm's train.py: uses `timm.task` and the helpers around it as that does, on handwritten digits."""
import argparse
import importlib
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from timm import utils
from timm.data import Mixup
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask, load_task_ema_checkpoint, resume_task_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument('data_dir', nargs='?')
parser.add_argument('--model', default='resnet50')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=utils.ParseKwargs)
parser.add_argument('--device-modules', nargs='+')
parser.add_argument('--device', default='cpu')
parser.add_argument('--mean', type=float, nargs='+')
parser.add_argument('--lr', type=float, default=0.02)
parser.add_argument('--epochs', type=int, default=2)
parser.add_argument('--smoothing', type=float, default=0.1)
parser.add_argument('--mixup', type=float, default=0)
parser.add_argument('--clip-grad', type=float)
parser.add_argument('--clip-mode', default='norm')
parser.add_argument('--grad-accum-steps', type=int, default=1)
parser.add_argument('--amp', action='store_true')
parser.add_argument('--model-ema', action='store_true')
parser.add_argument('--torchcompile')
parser.add_argument('--resume', default='')
parser.add_argument('--kd-model-name')
parser.add_argument('--criterion', action='store_true', help='hand the criterion itself, as scripts before 1.0.31')
parser.add_argument('--output', default='.')
parser.add_argument('--seed', type=int, default=42)


def main():
    utils.setup_default_logging()
    args = parser.parse_args()
    for module in args.device_modules or ():
        importlib.import_module(module)
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=10, drop_rate=0.0, **args.model_kwargs)
    model.to(device=device)
    optimizer = create_optimizer_v2(model, 'adamw', lr=args.lr)
    primary = utils.is_primary(args)

    task_args = dict(device=device, dtype=None, verbose=primary)
    criterion = dict(criterion_kwargs=dict(smoothing=args.smoothing, soft_targets=args.mixup > 0))
    if args.criterion:
        criterion = dict(criterion=torch.nn.CrossEntropyLoss())
    if args.kd_model_name:
        task = LogitDistillationTask(model, args.kd_model_name, torch.nn.CrossEntropyLoss(), **task_args)
    else:
        task = ClassificationTask(model=model, **criterion, **task_args)

    start_epoch = resume_task_checkpoint(task, args.resume, optimizer, log_info=primary) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=0.5)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        task.prepare_distributed(device_ids=None)

    saver = None
    if primary:
        Path(args.output).mkdir(exist_ok=True)
        saver = utils.CheckpointSaver(
            model=task.get_eval_model(), optimizer=optimizer, args=args, task=task, checkpoint_dir=args.output)
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16) if args.amp else nullcontext
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:1024, None]
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(-1, 3, -1, -1)
    target = torch.tensor(digits.target)[:1024]
    mixup = Mixup(args.mixup, label_smoothing=args.smoothing, num_classes=10) if args.mixup else None
    losses, keys, updates = [], set(), 32 * (start_epoch or 0)
    for epoch in range(start_epoch or 0, args.epochs):
        task.train()
        batches = torch.randperm(1024, generator=torch.Generator().manual_seed(epoch)).split(32)
        batches = batches[args.rank::args.world_size]
        for i, batch in enumerate(batches):
            last_of_update = (i + 1) % args.grad_accum_steps == 0
            x, y = images[batch], target[batch]
            if mixup:
                x, y = mixup(x.contiguous(), y)
            with nullcontext() if last_of_update else task.no_sync():
                with autocast():
                    result = task(x, y)
                (result['loss'] / args.grad_accum_steps).backward()
            keys |= set(result)
            losses.append(result['loss'].item())
            if last_of_update:
                if args.clip_grad:
                    utils.dispatch_clip_grad(
                        task.get_clip_parameters(exclude_head='agc' in args.clip_mode), args.clip_grad, args.clip_mode)
                optimizer.step()
                optimizer.zero_grad()
                updates += 1
                task.update_ema(step=updates)
        evaluator = task.create_evaluator()
        eval_model = task.get_eval_model(ema=args.model_ema)
        eval_model.eval()
        with torch.inference_mode():
            evaluator.update(eval_model(images), target)
        if args.distributed:
            utils.distribute_bn(model, args.world_size, True)
        if saver:
            saver.save_checkpoint(epoch, metric=evaluator.compute()['top1'])
    if primary:
        Path(args.output, 'log.json').write_text(json.dumps({
            'task': type(task).__name__, 'losses': losses, 'keys': sorted(keys), 'world_size': args.world_size,
            'data_dir': args.data_dir, 'mean': args.mean,
        }))
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
