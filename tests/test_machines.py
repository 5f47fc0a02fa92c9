"""Two machines: network namespaces with a cable between them, each with a launcher of its own, and gloo."""
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.training import FAST, ROOT, SCRIPT, assert_same_run, checkpoints, few_digits, read

pytestmark = pytest.mark.slow

CONFIG = ROOT / 'train_scripts' / 'configs' / 'machines.yaml'
ADDRESSES = '10.213.77.1', '10.213.77.2'
TIMEOUT = 240  # seconds


def ip(*args):
    subprocess.run(['ip', *args], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of two network namespaces, each with the interface eth0."""
    if not shutil.which('ip'):
        pytest.skip('network namespaces need the program ip, of iproute2')
    names = [f'ddnn-{os.getpid()}-{rank}' for rank in range(2)]
    cable = [f'dd{os.getpid() % 100_000}-{rank}' for rank in range(2)]
    try:
        try:
            for name in names:
                ip('netns', 'add', name)
            ip('link', 'add', cable[0], 'type', 'veth', 'peer', 'name', cable[1])
        except subprocess.CalledProcessError as e:
            pytest.skip(f'network namespaces are not permitted here: {e.stderr.strip()}')
        for name, end, address in zip(names, cable, ADDRESSES, strict=True):
            ip('link', 'set', end, 'netns', name)
            ip('-n', name, 'link', 'set', end, 'name', 'eth0')
            ip('-n', name, 'address', 'add', f'{address}/24', 'dev', 'eth0')
            for device in ('eth0', 'lo'):
                ip('-n', name, 'link', 'set', device, 'up')
            # How often a lost packet is sent again: a connection fails after seconds, not a quarter of an hour
            subprocess.run(
                ['ip', 'netns', 'exec', name, 'sh', '-c', 'echo 3 > /proc/sys/net/ipv4/tcp_retries2'], check=True)
        yield names
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'delete', name], capture_output=True)


def launch(machines, *args):
    """Start the same command on both machines, as the head of the configuration file says."""
    environment = {
        **os.environ, 'ACCELERATE_USE_CPU': '1', 'GLOO_SOCKET_IFNAME': 'eth0', 'OMP_NUM_THREADS': '1',
        'PYTHONPATH': str(ROOT),
    }
    return [
        subprocess.Popen(
            [
                'ip', 'netns', 'exec', name, sys.executable, '-m', 'accelerate.commands.accelerate_cli', 'launch',
                '--config_file', str(CONFIG), '--num_machines', '2', '--num_processes', '2', '--mixed_precision', 'no',
                '--main_process_ip', ADDRESSES[0], '--machine_rank', str(rank), str(SCRIPT), *map(str, args),
            ],
            text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank, name in enumerate(machines)
    ]


def join(processes):
    """Wait for both; return their exit statuses and what they printed."""
    try:
        outputs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


@pytest.mark.timeout(5 * TIMEOUT)
def test_a_machine_that_is_cut_off_ends_the_run_which_resumes(machines, tmp_path, monkeypatch):
    """Catches a configuration that does not reach the other machine, a run that hangs when one is gone, a checkpoint
    that the failure damages, and a resumed run that differs from one that was not cut off.
    """
    monkeypatch.chdir(tmp_path)
    options = [*FAST, *few_digits(), '-b', 8, '--epochs', 6, '--checkpoint-interval', 5, '--resume', 'auto']
    statuses, outputs = join(launch(machines, *options, '--output', 'expected'))
    assert statuses == [0, 0], outputs
    assert read('expected')['processes'] == 2

    processes = launch(machines, *options, '--output', 'out')
    deadline = time.monotonic() + TIMEOUT
    while not (Path('out').exists() and any(name.startswith('step-') for name in checkpoints('out'))):
        assert time.monotonic() < deadline and None in [process.poll() for process in processes]
        time.sleep(0.1)
    ip('-n', machines[1], 'link', 'set', 'eth0', 'down')
    statuses, outputs = join(processes)
    assert 0 not in statuses, outputs
    assert not Path('out/summary.json').exists()

    ip('-n', machines[1], 'link', 'set', 'eth0', 'up')
    statuses, outputs = join(launch(machines, *options, '--output', 'out'))
    assert statuses == [0, 0], outputs
    assert 'resuming from' in outputs[0]
    assert_same_run('out', 'expected')
