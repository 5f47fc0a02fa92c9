#!/usr/bin/env python3
"""Train as `timm-ddnn train` does, with another method in the place of EKD, for comparison.

    # The sub-nets learn from the full-net only
    python benchmarks/train_method.py --subnet-ce 0 --beta 0 --alpha 1 ...

It has the options of `timm-ddnn train`, and those below. What turned out to be of use is in the library.
"""
import argparse
from functools import partial

import torch
from timm.utils import ModelEmaV3, unwrap_model

import timm_ddnn
from timm_ddnn_cli.arguments import ArgumentParser, number, run
from timm_ddnn_cli.commands import train


def parse_args(arguments=None):
    parser = ArgumentParser(__doc__.splitlines()[0])
    train.add_arguments(parser)
    arg, amount = parser.add_argument_group('method').add_argument, number(float, 0)
    arg('--subnet-ce', type=amount, default=1.0, help='weight of cross-entropy in the sub-nets')
    arg('--ramp-updates', type=number(int, 0), default=0, help='steps of linear growth of alpha, beta')
    arg('--average-teacher', type=number(float, 0, 1), metavar='DECAY',
        help='decay of an average of the weights, whose full-net teaches the sub-nets, and not as by --ema-teacher all')
    arg('--sample', action='store_true', help='in a step the full-net and one sub-net, at random')
    args = parser.parse_args(arguments, argparse.Namespace(json=False))
    if args.average_teacher and (args.teacher or args.ema_teacher or args.frozen_teacher or args.full_net_epochs):
        parser.error(f'--average-teacher must be without a teacher or --full-net-epochs, got {args.average_teacher}')
    return args


class MethodTask(timm_ddnn.EKDTask):
    """`EKDTask` with further options of the loss, and an average that teaches the sub-nets alone."""

    def __init__(self, model, *args, method, **kwargs):
        super().__init__(model, *args, **kwargs)
        self.method = method
        self.full, *self.subnets = model.depths
        used = {'ce': 1.0, 'kl': self.loss_fn.alpha, 'attention': self.loss_fn.beta}
        self.parts = [name for name, weight in used.items() if weight]
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))
        self.average = None
        if method.average_teacher:
            self.average = ModelEmaV3(model, method.average_teacher, use_warmup=True).requires_grad_(False)
            # It is a module of the task, too, and so in the mode of the net in training
            self.set_teacher(self.average.module)

    def forward(self, input, target):
        run = self.subnets
        if self.method.sample and run:
            run = [self.subnets[torch.randint(len(self.subnets), ()).item()]]
        outputs = self.trainable_module(input, depth=(self.full, *run))
        loss_fn = self.loss_fn
        if self.average:
            self.average.update(unwrap_model(self.trainable_module), step=self.steps.item())
        terms = loss_fn.terms(outputs, target, self.teacher and self.teacher(input))
        if self.average:
            for name in ('kl', 'attention'):
                terms.pop(f'{name}_{self.full}', None)
        self.steps += 1
        ramp = torch.clamp(self.steps / max(self.method.ramp_updates, 1), max=1.0)
        loss = 0
        for depth in (self.full, *run):
            part = (1.0 if depth == self.full else self.method.subnet_ce) * terms[f'ce_{depth}']
            for name, weight in (('kl', loss_fn.alpha), ('attention', loss_fn.beta)):
                if weight and f'{name}_{depth}' in terms:
                    part = part + ramp * weight * terms[f'{name}_{depth}']
            loss = loss + loss_fn.weights.get(depth, 1.0) * part
        if self.method.sample and run:  # such that the means over an epoch are those of the steps that ran
            scale = len(self.subnets)
            for depth in self.subnets:
                for name in self.parts:
                    terms[f'{name}_{depth}'] = terms[f'{name}_{run[0]}'] * (scale if depth == run[0] else 0)
        return {
            **{name: term.detach() for name, term in terms.items()},
            'loss': loss,
            'output': outputs[self.full].logits,
        }


def main():
    args = parse_args()
    train.run(args, partial(MethodTask, method=args))


if __name__ == '__main__':
    run(main)
