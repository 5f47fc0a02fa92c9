"""The loader: the order of an epoch, batches, worker processes that end with the program, and normalization.

Images cross from the workers as bytes and are normalized on the device of the model, as by timm's `PrefetchLoader`.
"""
import atexit
import copy
import multiprocessing
import signal
import threading
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..utils.errors import InputError

__all__ = ['EpochSampler', 'LoaderError', 'create_loader', 'loading', 'normalize']


# In errors of torch, when a worker was killed, or the memory that it shares with the main process is full
WORKER_ENDED = (
    'killed by signal', 'exited unexpectedly', 'No space left on device', 'unable to allocate shared memory',
    'unable to open shared memory', 'unable to write to file', 'unable to resize file', 'Too many open files',
    'Cannot allocate memory',
)


class LoaderError(InputError):
    """A worker process that has ended, for want of memory as a rule."""

    on_every_process = True


@contextmanager
def loading() -> Iterator[None]:
    """End the workers that a block starts when it ends, and turn torch's errors of those that ended before into one.

    torch raises them wherever the main process is when a worker ends, so what uses batches has to be inside too.

    Raises:
        LoaderError: If a worker has ended.
    """
    others = set(_workers)
    try:
        yield
    except (RuntimeError, OSError) as e:
        message = str(e)
        if 'DataLoader worker' not in message or not any(sign in message for sign in WORKER_ENDED):
            raise
        reason = message.strip().splitlines()[-1] if 'in DataLoader worker process' in message else message
        raise LoaderError(
            'a worker process that loads images has ended, for want of memory or of /dev/shm as a rule: use fewer '
            f'--workers, 0 for none, or a larger /dev/shm ({reason})'
        ) from e
    finally:
        _kill_workers(others)


class EpochSampler(Sampler):
    """Yields (epoch, index) pairs in an order that is a function of (seed, epoch)."""

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0) -> None:
        """Begin at epoch 0.

        Args:
            length: Number of images.
            shuffle: Whether the order is random, and another one in every epoch.
            seed: Seed of the order, >= 0.
        """
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Count the images."""
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (epoch, index) once for every image."""
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        return ((self.epoch, index) for index in order.tolist())

_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()


def _ignore_stop_signals(worker_id: int) -> None:
    # They reach the whole group of processes, and the main one must be able to end its step. Workers end with it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _kill_workers(others: Container[BaseProcess] = ()) -> None:
    """End the workers of all loaders at once.

    Else they live until the garbage collector finds their loader, and ignore the SIGTERM by which they are ended, then
    and at the end of the program.

    Args:
        others: Workers that stay.
    """
    workers = [worker for worker in multiprocessing.active_children() if worker in _workers and worker not in others]
    if not workers or threading.current_thread() is not threading.main_thread():
        return
    handler = None
    if hasattr(signal, 'SIGCHLD'):
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise for each of them
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    if handler:
        signal.signal(signal.SIGCHLD, handler)


def _worker_context() -> BaseContext:
    """Make a context of multiprocessing that remembers its processes, to tell them from the host program's own."""
    context = copy.copy(multiprocessing.get_context(multiprocessing.get_start_method()))

    def create(*args: Any, process: type = context.Process, **kwargs: Any) -> BaseProcess:
        worker = process(*args, **kwargs)
        worker.terminate = worker.kill  # by which torch ends those that it has waited for
        _workers.add(worker)
        return worker

    context.Process = create
    return context


def _keep(batch: Any) -> Any:
    return batch  # `MemoryImages` gives whole batches


def _collate(batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack images in the memory format channels_last, in which PIL gives them: they are copied as a whole."""
    images, target = default_collate([(image.permute(1, 2, 0), label) for image, label in batch])
    return images.permute(0, 3, 1, 2), target


def create_loader(
        images: Dataset,
        batch_size: int,
        *,
        training: bool,
        num_workers: int = 0,
) -> DataLoader:
    """Create a loader of batches: images [B, C, H, W] and labels [B]. Those of bytes are for `normalize`.

    Args:
        images: The images.
        batch_size: Images per batch, >= 1.
        training: Whether the order is random, and a last batch that is not full is left out.
        num_workers: Worker processes, >= 0; none are used for images that are on a GPU. Batches do not depend on them.
            They end with the block of `loading` around.
    """
    in_memory = hasattr(images, '__getitems__')  # whole batches
    on_cpu = not in_memory or images.device.type == 'cpu'
    if not on_cpu:
        num_workers = 0
    return DataLoader(
        images,
        batch_size=batch_size,
        sampler=EpochSampler(len(images), shuffle=training, seed=images.seed or 0),
        collate_fn=_keep if in_memory else _collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_ignore_stop_signals,
        multiprocessing_context=_worker_context() if num_workers else None,
        pin_memory=on_cpu and torch.cuda.is_available(),
        drop_last=training,
        generator=torch.Generator(),  # else it draws from the global one, and more or less often with the workers
    )


def normalize(
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        data_config: Mapping[str, Any],
        device: torch.device | str,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Move batches to a device, and normalize their images there.

    Args:
        batches: Images [B, C, H, W] or [B, C + 1, H, W], bytes, and labels [B]. What is 0 in the channel that the model
            has not, see `create_train_transform`, is erased: 0 in all channels after normalization.
        data_config: As `timm.data.resolve_data_config` gives it.
        device: The device.

    Yields:
        Images [B, C, H, W], float32, and labels [B].
    """
    channels = data_config['input_size'][0]
    mean, std = (255 * torch.tensor(data_config[key], device=device)[:, None, None] for key in ('mean', 'std'))
    for images, target in batches:
        images, target = images.to(device, non_blocking=True), target.to(device, non_blocking=True)
        normalized = images[:, :channels].float().sub_(mean).div_(std)
        if images.shape[1] > channels:
            normalized *= images[:, channels:]
        yield normalized, target
