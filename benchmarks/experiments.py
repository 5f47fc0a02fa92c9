#!/usr/bin/env python3
"""Train by EKD and by what competes with it, and keep the results of every run in results/EXPERIMENT/RUN.json.

    # All runs of an experiment that are not done yet, two at a time; it may be stopped and started at any moment
    python benchmarks/experiments.py FOLDER --only 'cifar10_resnet20/*' --jobs 2

    # On a machine that is lent for ten minutes at a time
    python benchmarks/experiments.py FOLDER --only 'cifar10_resnet56/*' --time-limit 540

FOLDER has the data sets in folders cifar10 and tiny_imagenet, as parquet files. Weights, logs and checkpoints go to
output/experiments/EXPERIMENT/RUN. Several of these commands may run beside each other.
"""
import fcntl
import fnmatch
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import datasets
import timm
import torch
from accelerate import Accelerator
from timm.data import resolve_data_config

import timm_ddnn
from timm_ddnn.checkpoint import EXIT_STOPPED
from timm_ddnn.cli import ArgumentParser, fail, number, one_line_errors
from timm_ddnn.commands.evaluate import evaluate_model
from timm_ddnn.data import load_image_data
from timm_ddnn.evaluation import evaluate
from timm_ddnn.images import MemoryImages, create_loader
from timm_ddnn.report import add_accuracies, count_costs, describe_machine, describe_run, write_json

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'benchmarks' / 'train_method.py'
RESULTS = ROOT / 'results'
WORK = ROOT / 'output' / 'experiments'

ROW = 'depth', 'blocks', 'parameters', 'macs', 'top1', 'top5'
RECIPE = {'--mixed-precision': 'bf16', '-b': '128', '--lr': '0.4', '--weight-decay': '5e-4', '--warmup-epochs': '2'}
CE_ONLY = {'--alpha': '0', '--beta': '0'}


class Run(NamedTuple):
    """A training run. `options` maps flags to their values; `teacher` is a run of the same experiment."""

    name: str
    data: str
    seed: int
    options: dict[str, str]
    teacher: str | None = None
    truncate: bool = False

    def identity(self):
        """What must be the same in all that is kept of a run."""
        return {'run': self.name, 'teacher': self.teacher, 'options': {'--seed': str(self.seed), **self.options}}

    def check(self, path):
        """Make sure that a file is of this run, not of one of the same name whose options were others.

        Raises:
            ValueError: If it is not.
        """
        kept = json.loads(path.read_text())
        if any(kept.get(name) != value for name, value in self.identity().items()):
            was, now = kept['options'].items(), self.identity()['options'].items()
            raise ValueError(
                f'{path} is of another run of this name, it must have {dict(now - was)}, got {dict(was - now)}: '
                f'to run it anew, remove it and {WORK / self.name}')

    def is_done(self):
        result = RESULTS / f'{self.name}.json'
        if result.exists():
            self.check(result)
        return result.exists()


def compare(experiment, model, data, recipe, methods, seeds):
    """Make the runs of the methods that are compared.

    Args:
        experiment: Name of the experiment.
        model: Name of the dynamic-depth model.
        data: Name of the data set.
        recipe: Options that all methods have in common.
        methods: Methods, see below.
        seeds: Number of seeds by method.
    """
    net = timm.create_model(model)
    single = {
        depth: {'--subnets': '', '--model-kwargs': f'layers={",".join(map(str, net.blocks(depth)))}'}
        for depth in net.depths
    }
    runs = []
    for method in methods:
        if method == 'alone':
            named = {f'alone-{depth}': single[depth] | CE_ONLY for depth in net.depths}
        elif method == 'kd':
            named = {f'kd-{depth}': single[depth] | KD for depth in net.depths[1:]}
        else:
            named = {method: METHODS[method] | (weigh(net.depths) if method in WEIGHTED else {})}
        for seed, (name, options) in product(range(seeds.get(method, 1)), named.items()):
            runs.append(Run(
                f'{experiment}/{name}-{seed}',
                data,
                seed,
                {'--model': model, **recipe, **options},
                teacher=f'{experiment}/alone-{net.depths[0]}-{seed}' if method in ('kd', 'truncation') else None,
                truncate=method == 'truncation',
            ))
    return runs


def weigh(depths):
    """Make the option that weighs the sub-nets: the shallowest has least in common with the others, so most weight."""
    *middle, shallow = depths[1:]
    return {'--weights': ' '.join([*(f'{depth}=0.25' for depth in middle), f'{shallow}=0.75'])}


# The loss of each method; how they were chosen is in results/README.md.
KD = {'--alpha': '1', '--temperature': '4'}
EKD = {'--alpha': '0.3', '--beta': '0.1', '--attention': 'energy', '--stages': '-1'}
METHODS = {
    'joint': CE_ONLY,
    'kl': {'--alpha': EKD['--alpha'], '--beta': '0'},
    'attention': EKD | {'--alpha': '0'},
    'ekd': EKD,
    'ekd_equal': EKD,
    'ekd_private': EKD | {'--model-kwargs': 'shared_affine=False'},
    'joint_weighted': CE_ONLY,
    'truncation': {},
    'kl_only': {'--subnet-ce': '0', '--alpha': '1', '--temperature': '1', '--beta': '0'},
}
# The sub-nets have the weights that `weigh` gives them
WEIGHTED = 'ekd', 'kl', 'attention', 'ekd_private', 'joint_weighted'
ALL = (
    'alone', 'joint', 'ekd', 'kd', 'kl', 'attention', 'kl_only', 'truncation',
    'ekd_equal', 'ekd_private', 'joint_weighted',
)

# What the options of the library were chosen by: (question, variant that is changed, {name: what is changed})
SINGLE = CE_ONLY | {'--subnets': ''}
UNEVEN = weigh((20, 14, 8))
ABLATIONS = [
    ('Which terms', None, {
        'alone_20': SINGLE, 'joint': CE_ONLY, 'kl': METHODS['kl'], 'attention': METHODS['attention'], 'ekd': EKD,
    }),
    ('Last norm of a block starts at zero', 'alone_20', {'zero_init': {'--model-kwargs': 'zero_init_last=True'}}),
    ('Last norm of a block starts at zero', 'joint', {'zero_init': {'--model-kwargs': 'zero_init_last=True'}}),
    ('Learning rate', 'alone_20', {'lr_0.2': {'--lr': '0.2'}}),
    ('Learning rate', 'joint', {'lr_0.2': {'--lr': '0.2'}}),
    ('Learning rate', 'ekd', {'lr_0.2': {'--lr': '0.2'}}),
    ('Scale and shift', 'joint', {'private': {'--model-kwargs': 'shared_affine=False'}}),
    ('Scale and shift', 'ekd', {'private': {'--model-kwargs': 'shared_affine=False'}}),
    ('Weight of the sub-nets', 'ekd', {
        'half_weights': {'--weights': '14=0.5 8=0.5'},
        'half_weights_alpha_1': {'--weights': '14=0.5 8=0.5', '--alpha': '1'},
        'uneven_weights': UNEVEN,
        'uneven_weights_alpha_1': UNEVEN | {'--alpha': '1'},
        'sampled': {'--sample': None},
    }),
    ('Weight of the sub-nets', 'joint', {'uneven_weights': UNEVEN}),
    ('Weight and temperature of the KL divergence', 'kl', {
        '1': {'--alpha': '1'}, 't_2': {'--temperature': '2'}, 't_4': {'--alpha': '0.1', '--temperature': '4'},
    }),
    ('Weight of the KL divergence', 'ekd', {'alpha_1': {'--alpha': '1'}}),
    ('Weight of the attention', 'ekd', {
        'beta_0.03': {'--beta': '0.03'}, 'beta_0.3': {'--beta': '0.3'}, 'beta_1': {'--beta': '1'},
    }),
    ('Form and stages of the attention', 'ekd', {
        'standardized': {'--attention': 'standardized'},
        'all_stages': {'--stages': '0 1 2'},
        'standardized_all_stages': {'--attention': 'standardized', '--stages': '0 1 2'},
    }),
    ('Linear growth of the terms in the first half', 'ekd', {'ramp': {'--ramp-updates': '460'}}),
    ('Number of sub-nets and where they are cut', 'ekd', {
        'one_subnet': {'--subnets': '1,1,1'},
        'three_subnets': {'--subnets': '3,3,2 2,2,2 1,1,1'},
        'cut_late': {'--subnets': '3,2,1 2,1,1'},
    }),
]


def ablations(seeds):
    """Make the runs by which the options were chosen, on images of the training split only."""
    recipe = {'--model': 'ddnn_resnet20', **RECIPE, '--epochs': '8'}
    variants = {}
    for _, base, changes in ABLATIONS:
        for name, options in changes.items():
            variants[f'{base}_{name}' if base else name] = variants.get(base, recipe) | options
    return [
        Run(f'ablations/{name}-{seed}', 'cifar10_part', seed, options)
        for seed in range(seeds) for name, options in variants.items()
    ]


def all_runs():
    seeds = {'alone': 3, 'joint': 3, 'ekd': 3}
    small = {**RECIPE, '--epochs': '15', '--warmup-epochs': '3'}
    whole = {**RECIPE, '--epochs': '200', '--warmup-epochs': '5'}
    tiny = {**RECIPE, '--epochs': '60', '--warmup-epochs': '3', '--img-size': '128', '-b': '256'}
    main = ('alone', 'joint', 'ekd', 'kd')
    runs = [
        *compare('cifar10_resnet20', 'ddnn_resnet20', 'cifar10', small, ALL, seeds),
        *compare('cifar10_resnet56', 'ddnn_resnet56', 'cifar10', whole, ALL, {}),
        *compare('tiny_imagenet_resnet34', 'ddnn_resnet34', 'tiny_imagenet', tiny, main, {}),
        *compare('tiny_imagenet_resnet50', 'ddnn_resnet50', 'tiny_imagenet', tiny, main, {}),
        *ablations(seeds=3),
    ]
    return {run.name: run for run in runs}


def data_folder(name, root):
    """Find a data set, and make of CIFAR-10's training images the one that options are chosen on.

    It has 15,000 images to train, 5,000 to validate after every epoch, and 30,000 for the result: with those, what the
    choice of the images adds to the error is a third of a point.
    """
    if name != 'cifar10_part':
        return root / name
    folder = WORK / 'data' / name
    if (folder / 'train.parquet').exists():  # written last
        return folder
    train = datasets.load_dataset('parquet', data_files=str(root / 'cifar10' / 'train.parquet'), split='train')
    rows = list(range(len(train)))  # the images are in random order
    parts = {'validation': rows[35_000:40_000], 'test': rows[5_000:35_000], 'train': rows[40_000:] + rows[:5_000]}
    for split, chosen in parts.items():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f'.{split}-{os.getpid()}'
        train.select(chosen).to_parquet(temporary)
        os.replace(temporary, folder / f'{split}.parquet')
    return folder


def flatten(options):
    arguments = []
    for flag, value in options.items():
        arguments += [flag] if value is None else [flag, *value.split()]
    return arguments


@contextmanager
def locked(folder):
    """Hold a run for this process and those that inherit the descriptor; yields None if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


class Runner:
    """Runs processes, and stops all of them at once."""

    def __init__(self, root, threads):
        self.root = root
        self.threads = threads
        self.processes = set()
        self.stopped = threading.Event()

    def stop(self, *_):
        self.stopped.set()
        for process in list(self.processes):
            process.terminate()

    def do(self, run):
        """Do a run, or go on with it, unless it is done, held by another process, or the run it needs is not done."""
        folder = WORK / run.name
        teacher = WORK / run.teacher if run.teacher else None
        if self.stopped.is_set() or run.is_done():
            return
        if teacher and not (teacher / 'summary.json').exists():
            print(f'{run.name} waits for {run.teacher}, whose weights are not in {teacher}', flush=True)
            return
        with locked(folder) as lock:
            if lock is None or run.is_done():
                return
            begun = folder / 'run.json'
            if begun.exists():
                run.check(begun)
            else:
                write_json(begun, {**run.identity(), 'git': describe_machine()['git']})
            print(f'{run.name} begins or goes on', flush=True)
            start = time.perf_counter()
            if run.truncate:
                summary, history = truncate(run, teacher, data_folder(run.data, self.root))
            elif self.train(run, folder, teacher, lock):
                summary = json.loads((folder / 'summary.json').read_text())
                history = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
                summary['weights_sha256'] = json.loads((folder / 'config.json').read_text())['weights_sha256']
                summary |= evaluate_test(folder, data_folder(run.data, self.root))
            else:
                return
            summary['arguments'] = {  # places on this machine are left out
                name: value for name, value in summary['arguments'].items() if name not in ('output', 'resume')
            } | {'dataset': run.data}
            result = RESULTS / f'{run.name}.json'
            result.parent.mkdir(parents=True, exist_ok=True)
            write_json(result, summary | json.loads(begun.read_text()) | {'history': history})
            tops = ', '.join(f'{row["top1"]:.2f} ({row["depth"]})' for row in summary['depths'])
            print(f'{run.name}: {tops}, {time.perf_counter() - start:.0f} s', flush=True)

    def train(self, run, folder, teacher, lock):
        command = [
            sys.executable, '-W', 'ignore', SCRIPT, *(('--teacher', teacher) if teacher else ()),
            '--dataset', os.path.relpath(data_folder(run.data, self.root)), '--in-memory', '-j', '0',
            '--checkpoint-hist', '1', '--seed', run.seed, '--output', folder, '--resume', 'auto',
            '--log-interval', '1000000', *flatten(run.options),
        ]
        environment = os.environ | {'OMP_NUM_THREADS': str(self.threads)}
        with open(folder / 'log.txt', 'a') as log:
            process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                pass_fds=[lock],  # if this process is killed, the training goes on and holds the run
            )
            self.processes.add(process)
            if self.stopped.is_set():
                process.terminate()
            status = process.wait()
            self.processes.discard(process)
        if status not in (0, EXIT_STOPPED):
            print(f'{run.name} failed with status {status}, see {folder / "log.txt"}', flush=True)
        return status == 0


def evaluate_test(run, folder):
    """Evaluate what was trained on the test images of a data set; nothing if it has none besides the validation."""
    if not (folder / 'test.parquet').exists():
        return {}
    result = evaluate_model(str(run), str(folder), val_split='test', batch_size=250, precision='bf16')
    return {
        'validation_images': result['images'], 'depths': [{key: row[key] for key in ROW} for row in result['depths']]}


def truncate(run, teacher, folder):
    """Cut the net that was trained alone to every depth, and estimate the statistics that this changes."""
    torch.manual_seed(run.seed)
    state_dict = timm.create_model(f'local-dir:{teacher}', pretrained=True).state_dict()
    model = timm.create_model(run.options['--model'])
    model.load_state_dict({name: value for name, value in state_dict.items() if not name.startswith('subnets.')})
    data = load_image_data(str(folder))
    data_config = resolve_data_config(model=model)
    accelerator = Accelerator(mixed_precision='bf16')
    model.to(accelerator.device)
    train, validation = (
        create_loader(MemoryImages(data, split, data_config, seed=run.seed), 128, training=split == 'train')
        for split in ('train', 'validation')
    )
    timm_ddnn.calibrate_bn(model, train, depth=model.depths[1:])
    metrics = evaluate(accelerator, model, accelerator.prepare(validation))
    rows = add_accuracies(count_costs(model, data_config['input_size']), metrics)
    described = describe_run(accelerator, {'dataset': run.data, 'seed': run.seed, 'model': run.options['--model']})
    return {**described, 'validation_images': len(data.validation), 'depths': rows}, []


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='folder of the data sets')
    parser.add_argument('--only', nargs='+', default=['*'], metavar='PATTERN', help='runs as cifar10_resnet20/ekd-*')
    parser.add_argument('--jobs', type=number(int, 1), default=1, help='runs at a time')
    parser.add_argument('--time-limit', type=number(int, 1), metavar='SECONDS', help='stop after, to go on later')
    parser.add_argument('--list', action='store_true', help='list the runs and whether they are done')
    args = parser.parse_args()
    runs = all_runs()
    chosen = [run for name, run in runs.items() if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)]
    if not chosen:
        fail(f'--only must match runs such as {", ".join(list(runs)[:3])}, got {" ".join(args.only)}')
    with one_line_errors(ValueError):
        done = {run.name: run.is_done() for run in chosen}
    if args.list:
        for run in chosen:
            print('done' if done[run.name] else '    ', run.name, *flatten(run.options))
        return
    if not args.folder.is_dir():
        fail(f'FOLDER must be the folder of the data sets, got {args.folder}')

    threads = int(os.environ.get('OMP_NUM_THREADS', max(1, (os.cpu_count() or 1) // args.jobs)))
    runner = Runner(args.folder.resolve(), threads)
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, runner.stop)
    if args.time_limit:
        timer = threading.Timer(args.time_limit, runner.stop)
        timer.daemon = True
        timer.start()
    for name in {run.data for run in chosen}:
        data_folder(name, runner.root)
    with one_line_errors(ValueError), ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(runner.do, chosen))
    if runner.stopped.is_set():
        sys.exit(EXIT_STOPPED)
    missing = [run.name for run in chosen if not run.is_done()]
    if missing:
        sys.exit(f'not done: {", ".join(missing)}')


if __name__ == '__main__':
    main()
