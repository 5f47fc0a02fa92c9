"""Several processes, on the CPU with gloo. Each test says which fault it catches, and asserts that there were two.

Most are forks of this process, each of which finds in its environment what a launcher would have set.
"""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from helpers import frozen_run
from helpers.image_files import write_parquet
from helpers.training import (
    FAST,
    MODEL,
    ROOT,
    SCRIPT,
    assert_same_run,
    checkpoints,
    few_digits,
    fork,
    history,
    join,
    read,
    run,
    top1,
)

pytestmark = pytest.mark.usefixtures('surroundings')

HELPERS = Path(__file__).parent / 'helpers'
TORCHRUN = ['torch.distributed.run', '--standalone', '--nproc_per_node', '2']
CONFIGS = ROOT / 'train_scripts' / 'configs'
LAUNCH = ['accelerate.commands.accelerate_cli', 'launch', '--config_file']
# --cpu would start one process
ACCELERATE = [*LAUNCH, str(CONFIGS / 'gpus.yaml'), '--num_processes', '2', '--mixed_precision', 'no']


def launch(launcher, *args):
    path = os.pathsep.join([str(ROOT), str(HELPERS.parent)])
    return subprocess.Popen(
        [sys.executable, '-m', *launcher, *map(str, args)], text=True,
        env=dict(os.environ, ACCELERATE_USE_CPU='1', OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1', PYTHONPATH=path),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )


def train(launcher, *args):
    """Run to the end by a launcher, or by forks without one, and return what was printed."""
    if launcher:
        process = launch(launcher, SCRIPT, *args)
        output = process.communicate(timeout=200)[0]
        statuses = [process.returncode]
    else:
        statuses, output = join(fork(*args, processes=2))
    assert not any(statuses), output
    return output


@pytest.mark.parametrize('launcher, images, validation_images', [
    # 22 batches; 301 images in batches of 8 fill the last round of two processes with 3 that were seen before
    (None, 45, 301),
    # 11 batches, of which one process would get 6; fewer validation images than one batch for one process
    pytest.param(TORCHRUN, 23, 5, marks=pytest.mark.slow),
    pytest.param(ACCELERATE, 23, 5, marks=pytest.mark.slow),
])
def test_metrics_are_of_all_processes(launcher, images, validation_images, tmp_path):
    """Catches one process where two were asked for, images counted twice, statistics that are not saved as they were
    evaluated, a deadlock when batches do not divide evenly, and a second process that prints or writes.
    """
    write_parquet(tmp_path / 'set' / 'train.parquet', range(images))
    write_parquet(tmp_path / 'set' / 'validation.parquet', range(200, 200 + validation_images))
    options = [*FAST, '--epochs', 2, '-b', 2, '-vb', 8, '--dataset', 'set', '--output', 'out', '--model-ema']
    output = train(launcher, *options)
    summary, records = read('out'), history('out')
    assert summary['processes'] == 2
    assert output.count('epoch 2/2') == 1
    rounds = images // 4  # the rest is left out, in every epoch another one
    assert [record['updates'] for record in records] == [rounds, 2 * rounds]
    assert records[0]['images_per_second'] * records[0]['seconds'] == pytest.approx(4 * rounds)
    for accuracy in top1(summary).values():
        hits = accuracy * validation_images / 100
        assert hits == pytest.approx(round(hits), abs=1e-3)
    run('--evaluate', '--pretrained', '--model', 'local-dir:out', '--dataset', 'set', '--output', 'out', '-j', 0)
    assert read('out', 'evaluation.json')['depths'] == summary['depths']


def record(patch, folder, updates, *args, processes=1):
    """Losses and gradient of every update of a run with frozen statistics, by process."""
    folder.mkdir()
    options = [*MODEL, '-j', 0, '--sched', 'constant', '--warmup-epochs', 0, '--output', folder / 'out', *args]
    if processes > 1:
        plant = lambda: frozen_run.plant(pytest.MonkeyPatch(), folder / 'run', updates)  # noqa: E731
        join(fork(*options, processes=processes, before=plant))
    else:
        with patch.context() as context, pytest.raises(frozen_run.Recorded):
            frozen_run.plant(context, folder / 'run', updates)
            run(*options)
    return [torch.load(folder / f'run.{rank}') for rank in range(processes)]


def test_the_last_update_of_an_epoch_is_the_mean_of_fewer_batches(monkeypatch, tmp_path):
    """Catches a last update that is too small, because its batches are divided by the number of others'.

    At learning rate 0 every batch has the gradient that it has alone.
    """
    for split in ('train', 'validation'):
        write_parquet(tmp_path / 'set' / f'{split}.parquet', range(80))
    options = ['--lr', 0, '--dataset', tmp_path / 'set', '-b', 8]
    single, = record(monkeypatch, tmp_path / 'single', 10, *options)
    accumulated, = record(monkeypatch, tmp_path / 'accumulated', 3, *options, '--grad-accum-steps', '4')
    single = [gradient for _, gradient in single]
    for (_, gradient), batches in zip(accumulated, (single[:4], single[4:8], single[8:]), strict=True):
        torch.testing.assert_close(gradient, torch.stack(batches).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('processes, batch_size, accumulated', [
    (1, 8, 4), (2, 8, 2), pytest.param(2, 16, 1, marks=pytest.mark.slow),
])
def test_processes_and_accumulated_batches_equal_one_large_batch(
        processes, batch_size, accumulated, monkeypatch, tmp_path):
    """Catches a loss or gradient that is not the mean over the whole batch: summed, averaged twice, synchronized too
    late, or of other images.

    Batch norm is frozen, because its statistics are those of the images that a process has at once. 8 updates.
    """
    options = ['--lr', 0.05, *few_digits()]
    expected, = record(monkeypatch, tmp_path / 'expected', 8, *options, '-b', 32)
    assert [len(losses) for losses, _ in expected] == [1] * 8
    assert min(float(gradient.norm()) for _, gradient in expected) > 0.1
    runs = record(
        monkeypatch, tmp_path / 'runs', 8, *options, '-b', batch_size, '--grad-accum-steps', accumulated,
        processes=processes)
    for ((loss,), gradient), *updates in zip(expected, *runs, strict=True):
        losses = [loss for losses, _ in updates for loss in losses]
        assert len(losses) == processes * accumulated
        assert sum(losses) / len(losses) == pytest.approx(loss, abs=1e-5)
        for _, other in updates:
            assert torch.equal(other, updates[0][1])
            assert float((other - gradient).abs().max()) < 1e-5


@pytest.mark.slow
def test_a_configuration_for_several_machines():
    """Catches launchers that wait for each other for ever, and a process of another machine that writes.

    Two launchers stand for two machines with a process each, as their ready configuration does for four with eight.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [
        launch(
            LAUNCH, CONFIGS / 'machines.yaml', '--num_machines', 2, '--num_processes', 2, '--machine_rank', rank,
            '--main_process_ip', '127.0.0.1', '--main_process_port', port, '--mixed_precision', 'no', SCRIPT, *FAST,
            *few_digits(), '--epochs', 1, '--output', 'out',
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert ['epoch 1/1' in output for output in outputs] == [True, False]
    assert read('out')['processes'] == 2


def test_other_kinds_of_processes_are_refused(monkeypatch, capfd):
    """Catches a run of hours under FSDP or DeepSpeed whose checkpoints cannot be resumed from."""
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        monkeypatch.setattr(Accelerator, 'distributed_type', kind)
        with pytest.raises(SystemExit) as exit_info:
            run(*FAST, '--output', 'out')
        assert exit_info.value.code == 2
        assert capfd.readouterr().err == (
            f'error: several processes must be those of accelerate launch --multi_gpu, got {kind.value}\n')


@pytest.mark.slow
def test_the_full_net_trains_alone_first_in_several_processes():
    """Catches private weights that a process waits for gradients of, and a group of processes that ends too early."""
    options = [*FAST, *few_digits(), '--epochs', 1, '--full-net-epochs', 1, '--private', 'affine', 'classifier']
    output = train(None, *options, '--frozen-teacher', '--output', 'out')
    assert output.count('epoch 1/1') == 2 and read('out')['processes'] == read('out/full_net')['processes'] == 2
    assert {'train_ce_14', 'train_ce_8', 'train_kl_14'} <= history('out')[-1].keys()


@pytest.mark.parametrize('name, processes', [('cpu', 1), ('gpu', 1), ('gpus', 8), ('machines', 32)])
def test_configurations(name, processes):
    """Catches a ready configuration with a key that accelerate does not know, or that does not set the precision."""
    config = load_config_from_file(str(CONFIGS / f'{name}.yaml'))
    assert (config.num_processes, config.mixed_precision, config.use_cpu) == (processes, 'bf16', name == 'cpu')
    assert config.distributed_type == ('NO' if processes == 1 else 'MULTI_GPU')


STATEFUL = [
    *FAST, *few_digits(), '-b', 4, '--epochs', 2, '--mixup', 0.2, '--drop', 0.1, '--model-ema', '--model-ema-decay',
    0.9, '--grad-accum-steps', 2, '--checkpoint-interval', 3,
]


@pytest.mark.slow
def test_when_one_process_dies_all_end_and_the_run_resumes(tmp_path):
    """Catches a process that waits for a dead one for ever, and states of processes that are saved as those of one."""
    train(TORCHRUN, *STATEFUL, '--output', 'expected')
    for moment, seconds in [('step', 0.7), ('save', 0.01)]:
        log = tmp_path / moment
        process = launch(
            TORCHRUN, HELPERS / 'killed_run.py', log, moment, seconds, *STATEFUL, '--output', 'out', '--resume', 'auto')
        start = time.perf_counter()
        output = process.communicate(timeout=120)[0]
        print(f'{moment}: all had ended {time.perf_counter() - start:.0f} s after the start')
        assert process.returncode != 0
        assert 'Signal 9 (SIGKILL)' in output, output
        assert log.read_text().endswith('kill\n')
        assert checkpoints('out')
    output = train(TORCHRUN, *STATEFUL, '--output', 'out', '--resume', 'auto')
    assert 'resuming from' in output
    assert read('out')['processes'] == 2
    assert_same_run('out', 'expected')


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_processes():
    """Catches processes that stop at different steps, and wait for each other for ever."""
    train(TORCHRUN, *STATEFUL, '--output', 'expected')
    process = launch(TORCHRUN, SCRIPT, *STATEFUL, '--log-interval', 1, '--output', 'out')
    for line in process.stdout:
        if ', batch 5/' in line:
            process.send_signal(signal.SIGTERM)
            break
    output = process.communicate(timeout=60)[0]
    assert 'SIGTERM: stopped after update' in output
    train(TORCHRUN, *STATEFUL, '--output', 'out', '--resume', 'auto')
    assert_same_run('out', 'expected')
