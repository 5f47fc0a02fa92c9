#!/usr/bin/env python3
"""Train by EKD and by what competes with it, and keep the results of every run in results/EXPERIMENT/RUN.json.

    # All runs of an experiment that are not done yet, two at a time; it may be stopped and started at any moment
    python benchmarks/experiments.py FOLDER --only 'cifar10_resnet20/*' --jobs 2

    # On a GPU that is lent for ten minutes at a time; so small nets fill it only several at once, under NVIDIA's MPS
    nvidia-cuda-mps-control -d
    python benchmarks/experiments.py FOLDER --only 'cifar10_resnet56/*' --jobs 13 --time-limit 540

FOLDER has the data sets in folders cifar10, cifar100, photos and tiny_imagenet, as parquet files. Weights, logs and
checkpoints go to output/experiments/EXPERIMENT/RUN. Several of these commands may run beside each other.
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
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import timm
import torch
from accelerate import Accelerator
from matrix import LOADER, all_runs, forward_macs
from timm.data import resolve_data_config

import timm_ddnn
from timm_ddnn.data.cached import MemoryImages
from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.data.loader import create_loader, normalize
from timm_ddnn.evaluation.evaluate import evaluate_model
from timm_ddnn.evaluation.metrics import add_accuracies
from timm_ddnn.evaluation.predict import evaluate
from timm_ddnn.models.load import load_teacher
from timm_ddnn.train.output import describe_run
from timm_ddnn.train.signals import EXIT_STOPPED
from timm_ddnn.utils.costs import count_costs as count_depths
from timm_ddnn.utils.environment import describe_machine
from timm_ddnn.utils.errors import InputError
from timm_ddnn.utils.files import file_sha256, write_json
from timm_ddnn_cli import arguments
from timm_ddnn_cli.arguments import ArgumentParser, number

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / 'benchmarks' / 'train_method.py'
RESULTS = ROOT / 'results'
WORK = ROOT / 'output' / 'experiments'

ROW = 'depth', 'blocks', 'parameters', 'macs', 'top1', 'top5'

# Of a data set, rows of its training images, which are in random order: those trained on, and others to choose by
TUNING = {
    'cifar10': ('cifar10', range(45_000), range(45_000, 50_000)),
    'cifar100': ('cifar100', range(45_000), range(45_000, 50_000)),
    'cifar10_10k': ('cifar10', range(10_000), range(40_000, 50_000)),
    'cifar100_10k': ('cifar100', range(10_000), range(40_000, 50_000)),
    'cifar10_2500': ('cifar10', range(2_500), range(40_000, 50_000)),
    'photos': ('photos', range(2_557), range(2_557, 3_157)),
}
# Data set and splits by name. 'validation' is evaluated after every epoch, 'test' once, at the end of a run: by
# NAME_tuning the images to choose by, by NAME_judged (None) the validation images of the data set. See
# results/PROTOCOL.md. cifar10_part is what options were chosen on before it.
PARTS = {
    'cifar10_part': ('cifar10', {
        'validation': range(35_000, 40_000), 'test': range(5_000, 35_000), 'few': range(5_000),
        'train': [*range(40_000, 50_000), *range(5_000)]}),
    **{
        f'{name}_{kind}': (source, {'validation': choose[:500], 'test': test, 'train': train})
        for name, (source, train, choose) in TUNING.items() for kind, test in (('tuning', choose), ('judged', None))
    },
}


def check(run, path):
    """Make sure that a file is of this run, not of one of the same name whose options were others.

    Raises:
        InputError: If it is not.
    """
    kept = json.loads(path.read_text())
    was, now = (
        {'run': identity['run'], 'teacher': identity['teacher'], **identity['options']}.items()
        for identity in (kept, run.identity())
    )
    if was != now:
        raise InputError(
            f'{path} is of another run of this name, it must have {dict(now - was)}, got {dict(was - now)}: '
            f'to run it anew, remove it and {WORK / run.name}')


def check_weights(name):
    """Make sure that the weights in a run's folder are those whose result was kept, if it says which they were.

    Raises:
        OSError: If there are none.
        InputError: If they are others.
    """
    weights, kept = WORK / name / 'model.safetensors', json.loads((RESULTS / f'{name}.json').read_text())
    got = file_sha256(weights)
    if 'weights_sha256' not in kept:
        print(f'{name} was kept without the SHA-256 of its weights: those in {weights} may be others', flush=True)
    elif got != kept['weights_sha256']:
        raise InputError(f'{weights} must have the SHA-256 {kept["weights_sha256"]} of the kept result, got {got}')


def is_done(run):
    result = RESULTS / f'{run.name}.json'
    if result.exists():
        check(run, result)
    return result.exists()


def data_folder(name, root):
    """Find a data set, or make it of the images of another, see `PARTS`."""
    if name not in PARTS:
        return root / name
    folder = WORK / 'data' / name
    if (folder / 'train.parquet').exists():  # written last
        return folder
    source, parts = PARTS[name]
    files = {split: str(root / source / f'{split}*.parquet') for split in ('train', 'validation')}
    images = datasets.load_dataset('parquet', data_files=files)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in parts.items():
        temporary = folder / f'.{split}-{os.getpid()}'
        (images['validation'] if rows is None else images['train'].select(rows)).to_parquet(temporary)
        os.replace(temporary, folder / f'{split}.parquet')
    return folder


def count_costs(run, summary, folder, teacher):
    """Count the multiply-accumulates of a run: three forwards of what a step trains, and one of a frozen teacher.

    Those by which the teacher was trained before are counted apart, None if that is not known.
    """
    args, model = summary['arguments'], timm.create_model(f'local-dir:{folder}', device='meta')
    size = resolve_data_config({'img_size': args['img_size']}, model=model)['input_size']
    full = forward_macs(model, model.depths[:1], size)
    teaching, trained_by = 0, 0
    if teacher:
        trained_by = json.loads((RESULTS / f'{run.teacher}.json').read_text()).get('training_macs')
    if args['ema_teacher'] or args['frozen_teacher'] or '--average-teacher' in run.options:
        teaching = full
    elif args['teacher']:
        net = load_teacher(str(teacher or args['teacher']))
        teaching = forward_macs(net, net.depths[:1], size)
        trained_by = trained_by if teacher else None
    images = summary['training_images'] // args['batch_size'] * args['batch_size']
    alone = 3 * full + (0 if args['frozen_teacher'] else teaching)
    together = 3 * forward_macs(model, 'all', size) + teaching
    return {
        'training_macs': images * (args['epochs'] * together + args['full_net_epochs'] * alone),
        'teacher_training_macs': trained_by,
    }


def flatten(options):
    """Make arguments of options."""
    return [word for flag, value in options.items() for word in (flag, *(value or '').split())]


def read_history(folder):
    """Read the metrics of every epoch of a run, none if there is no run."""
    path = folder / 'metrics.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


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


def terminate(process):
    with suppress(ProcessLookupError):  # not by Popen, which would wait for it, too
        os.kill(process, signal.SIGTERM)


class Runner:
    """Runs processes, and stops all of them at once."""

    def __init__(self, runs, root, threads):
        self.runs = runs
        self.root = root
        self.threads = threads
        self.processes = set()  # their ids
        self.stopped = threading.Event()

    def stop(self, *_):
        self.stopped.set()
        for process in list(self.processes):
            terminate(process)

    def do(self, run):
        """Do a run, or go on with it, unless it is done, held by another process, or the run it needs is not done."""
        folder = WORK / run.name
        teacher = WORK / run.teacher if run.teacher else None
        if self.stopped.is_set() or is_done(run):
            return
        if teacher and not (is_done(self.runs[run.teacher]) and (teacher / 'summary.json').exists()):
            print(f'{run.name} waits for {run.teacher}, which is not done or not in {teacher}', flush=True)
            return
        if teacher:
            check_weights(run.teacher)
        with locked(folder) as lock:
            if lock is None or is_done(run):
                return
            begun = folder / 'run.json'
            if begun.exists():
                check(run, begun)
            else:
                write_json(begun, {**run.identity(), 'git': describe_machine()['git']})
            print(f'{run.name} begins or goes on', flush=True)
            start = time.perf_counter()
            if run.truncate:
                summary, history = truncate(run, teacher, data_folder(run.data, self.root))
            elif memory := self.train(run, folder, teacher, lock):
                summary = json.loads((folder / 'summary.json').read_text())
                history = read_history(folder)
                summary['weights_sha256'] = json.loads((folder / 'config.json').read_text())['weights_sha256']
                summary |= evaluate_test(folder, data_folder(run.data, self.root), summary['mixed_precision'])
                summary |= count_costs(run, summary, folder, teacher)
                records = history + read_history(folder / 'full_net')
                summary |= {'training_seconds': sum(record['seconds'] for record in records), 'peak_memory': memory}
            else:
                return
            places = 'output', 'resume', 'teacher'  # on this machine
            summary['arguments'] = {
                name: value for name, value in summary['arguments'].items() if name not in places
            } | {'dataset': run.data}
            result = RESULTS / f'{run.name}.json'
            result.parent.mkdir(parents=True, exist_ok=True)
            write_json(result, summary | json.loads(begun.read_text()) | {'history': history})
            tops = ', '.join(f'{row["top1"]:.2f} ({row["depth"]})' for row in summary['depths'])
            print(f'{run.name}: {tops}, {time.perf_counter() - start:.0f} s', flush=True)

    def train(self, run, folder, teacher, lock):
        """Train until the end, and return the peak memory of the process in bytes; None if it was stopped or failed."""
        teacher = teacher and os.path.relpath(teacher, ROOT)
        command = [
            sys.executable, '-W', 'ignore', SCRIPT,
            # Without attention, which the options of `kd` do not say
            *(('--teacher', teacher, '--beta', '0') if teacher else ()),
            '--dataset', os.path.relpath(data_folder(run.data, self.root), ROOT), *LOADER,
            '--checkpoint-hist', '1', '--seed', run.seed, '--output', folder, '--resume', 'auto',
            '--log-interval', '1000000', *flatten(run.options),
        ]
        # The library beside the scripts, whichever is installed: it is the one whose commit the result names
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
        environment = os.environ | {'OMP_NUM_THREADS': str(self.threads), 'PYTHONPATH': path}
        with open(folder / 'log.txt', 'a') as log:
            process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                cwd=ROOT,  # from wherever this is started, the data's path is the same: a run goes on by its arguments
                pass_fds=[lock],  # if this process is killed, the training goes on and holds the run
            )
            self.processes.add(process.pid)
            if self.stopped.is_set():
                terminate(process.pid)
            _, status, usage = os.wait4(process.pid, 0)  # as Popen.wait, which does not give the memory
            status = process.returncode = os.waitstatus_to_exitcode(status)
            self.processes.discard(process.pid)
        if status not in (0, EXIT_STOPPED) and not self.stopped.is_set():  # stopped before it could catch the signal
            print(f'{run.name} failed with status {status}, see {folder / "log.txt"}', flush=True)
        return usage.ru_maxrss * 1024 if status == 0 else None


def evaluate_test(run, folder, precision):
    """Evaluate what was trained on the test images of a data set; nothing if it has none besides the validation."""
    if not (folder / 'test.parquet').exists():
        return {}
    result = evaluate_model(str(run), str(folder), val_split='test', batch_size=250, precision=precision)
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
    timm_ddnn.calibrate_bn(model, normalize(train, data_config, accelerator.device), depth=model.depths[1:])
    validation = normalize(accelerator.prepare(validation), data_config, accelerator.device)
    metrics = evaluate(accelerator, model, validation)
    rows = add_accuracies(count_depths(model, data_config['input_size']), metrics)
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
        raise InputError(f'--only must match runs such as {", ".join(list(runs)[:3])}, got {" ".join(args.only)}')
    done = {run.name: is_done(run) for run in chosen}
    if args.list:
        for run in chosen:
            print('done' if done[run.name] else '    ', run.name, *flatten(run.options))
        return
    if not args.folder.is_dir():
        raise InputError(f'FOLDER must be the folder of the data sets, got {args.folder}')

    threads = int(os.environ.get('OMP_NUM_THREADS', max(1, (os.cpu_count() or 1) // args.jobs)))
    runner = Runner(runs, args.folder.resolve(), threads)
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, runner.stop)
    if args.time_limit:
        timer = threading.Timer(args.time_limit, runner.stop)
        timer.daemon = True
        timer.start()
    for name in {run.data for run in chosen}:
        data_folder(name, runner.root)
    futures = {}

    def do_after_its_teacher(run):
        if run.teacher in futures:
            futures[run.teacher].result()
        runner.do(run)

    with ThreadPoolExecutor(args.jobs) as pool:
        for run in sorted(chosen, key=lambda run: bool(run.teacher)):  # a teacher has a thread before what waits for it
            futures[run.name] = pool.submit(do_after_its_teacher, run)
        for future in futures.values():
            future.result()
    if runner.stopped.is_set():
        sys.exit(EXIT_STOPPED)
    missing = [run.name for run in chosen if not is_done(run)]
    if missing:
        sys.exit(f'not done: {", ".join(missing)}')


if __name__ == '__main__':
    arguments.run(main)
