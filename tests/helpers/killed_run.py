"""Runs the training script until a moment that is given, and then kills it by SIGKILL.

    python killed_run.py LOG MOMENT SECONDS SCRIPT ARGS...

MOMENT is 'step' or 'save': the kill comes SECONDS after the first step, or after a checkpoint begins to be written. Of
several processes the last is killed, and writes LOG: a line with the count of updates at the start and after each
update, 'save' when a checkpoint begins to be written, 'saved' when that has ended, and 'kill'.
"""
import os
import runpy
import signal
import sys
import threading
import time

from timm.scheduler import CosineLRScheduler

from timm_ddnn.train.checkpoint import Checkpoints

_, log, moment, seconds, script, *arguments = sys.argv
is_last = int(os.environ.get('RANK', 0)) + 1 == int(os.environ.get('WORLD_SIZE', 1))
file = os.open(log if is_last else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
begun = threading.Event()


def write(event):
    os.write(file, f'{event}\n'.encode())


def kill():
    begun.wait()
    time.sleep(float(seconds))
    write('kill')
    os.kill(os.getpid(), signal.SIGKILL)


def step_update(scheduler, num_updates, original=CosineLRScheduler.step_update):
    write(num_updates)
    if moment == 'step':
        begun.set()
    original(scheduler, num_updates)


def save(checkpoints, *args, original=Checkpoints.save, **kwargs):
    write('save')
    if moment == 'save':
        begun.set()
    original(checkpoints, *args, **kwargs)
    write('saved')


CosineLRScheduler.step_update = step_update
Checkpoints.save = save
if is_last:
    threading.Thread(target=kill, daemon=True).start()
sys.argv = [script, *arguments]
runpy.run_path(script, run_name='__main__')
