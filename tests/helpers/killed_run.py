"""Kills a training run by SIGKILL at a moment that is given.

    python killed_run.py LOG MOMENT SECONDS OPTIONS...

runs the command with these options, for launchers; a fork calls `plant` itself. Of several processes the last one is
killed.
"""
import os
import signal
import sys
import threading
import time

from timm.scheduler import CosineLRScheduler

from timm_ddnn.train.checkpoint import Checkpoints


def plant(log, moment, seconds):
    """Kill this process some seconds after a moment: 'step', the first step, or 'save', the start of a checkpoint.

    `log` gets a line with the count of updates at the start and after each update, 'save' when a checkpoint begins to
    be written, 'saved' when that has ended, and 'kill'.
    """
    is_last = int(os.environ.get('RANK', 0)) + 1 == int(os.environ.get('WORLD_SIZE', 1))
    file = os.open(log if is_last else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begun = threading.Event()

    def write(event):
        os.write(file, f'{event}\n'.encode())

    def kill():
        begun.wait()
        time.sleep(seconds)
        write('kill')
        os.kill(os.getpid(), signal.SIGKILL)

    def step_update(scheduler, num_updates, original=CosineLRScheduler.step_update):
        write(num_updates)
        if moment == 'step':
            begun.set()
        original(scheduler, num_updates)

    def save(checkpoints, state, original=Checkpoints.save):
        write('save')
        if moment == 'save':
            begun.set()
        original(checkpoints, state)
        write('saved')

    CosineLRScheduler.step_update = step_update
    Checkpoints.save = save
    if is_last:
        threading.Thread(target=kill, daemon=True).start()


if __name__ == '__main__':
    from timm_ddnn_cli.main import main

    plant(sys.argv[1], sys.argv[2], float(sys.argv[3]))
    main(['train', *sys.argv[4:]])
