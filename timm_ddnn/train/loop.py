"""The steps of an epoch, the terms of the loss over them, and the checks that its numbers stay finite."""
import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, unwrap_model
from torch import nn
from torch.utils.data import DataLoader

from ..data.images import seeded
from ..data.loader import normalize
from ..utils.errors import InputError
from .build import memory_format
from .checkpoint import Checkpoints
from .progress import TrainProgress
from .signals import STOP_INTERVAL, StopRequest
from .state import TrainState

__all__ = ['LossMeter', 'NotFiniteError', 'check_weights', 'loss_record', 'train_one_epoch']


class NotFiniteError(InputError):
    """A loss or a weight that is not finite."""

    on_every_process = True


class LossMeter:
    """Sums the terms of the loss over the steps of an epoch.

    They stay on the device until they are asked for: reading one waits for all the work that was queued there.
    """

    def __init__(
            self,
            accelerator: Accelerator,
            steps: int = 0,
            sums: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Begin an epoch, or resume one.

        Args:
            accelerator: Accelerator of the run.
            steps: Steps that were done before.
            sums: What `sums` returned after them.
        """
        self.accelerator = accelerator
        self.steps = steps
        self.names = list(sums or ())
        mine = [sums[name][accelerator.process_index] for name in self.names]
        self._sums = torch.tensor(mine, dtype=torch.float32, device=accelerator.device)
        self._finite_steps = torch.full_like(self._sums, steps, dtype=torch.long)

    def update(self, terms: Mapping[str, torch.Tensor]) -> None:
        """Add the terms of a step, without waiting for them.

        Args:
            terms: What `EKDTask` returns, the same terms in every step. Its key 'output' is passed over.
        """
        if not self.names:
            self.names = [name for name in terms if name != 'output']
            self._sums, self._finite_steps = (values.new_zeros(len(self.names)) for values in (
                self._sums, self._finite_steps))
        self._sums += torch.stack([terms[name].detach() for name in self.names])
        self._finite_steps += self._sums.isfinite()  # a sum that is not finite never becomes so again
        self.steps += 1

    def sums(self) -> dict[str, list[float]]:
        """Sum each term over the steps of each process; to be called by all of them."""
        sums = self.accelerator.gather(self._sums).view(-1, len(self.names))
        return dict(zip(self.names, sums.T.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Average each term over steps and processes; to be called by all processes."""
        return {name: sum(sums) / len(sums) / self.steps for name, sums in self.sums().items()}

    def check(self, epoch: int) -> None:
        """Check that the loss of this process has been finite at every step.

        Args:
            epoch: The epoch, from 0.

        Raises:
            NotFiniteError: If it has not. The message names the first such step, the terms, and their depths.
        """
        first = int(self._finite_steps.min())
        if first == self.steps:
            return
        bad = [name for name, at in zip(self.names, self._finite_steps.tolist(), strict=True) if at == first]
        terms = [name.replace('_', ' of depth ') for name in bad if name != 'loss'] or ['the sum of its terms']
        raise NotFiniteError(f'loss is not finite in epoch {epoch + 1}, step {first + 1}: {", ".join(terms)}')


def check_weights(model: nn.Module, updates: int) -> None:
    """Check that parameters and buffers are finite.

    Args:
        model: The model.
        updates: Updates of its weights so far, for the message.

    Raises:
        NotFiniteError: If one is not. The message names it.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise NotFiniteError(f'{name} is not finite after update {updates}')


def train_one_epoch(
        args: argparse.Namespace,
        accelerator: Accelerator,
        task: nn.Module,
        loader: DataLoader,
        data_config: Mapping[str, Any],
        optimizer: AcceleratedOptimizer,
        scheduler: Scheduler,
        state: TrainState,
        checkpoints: Checkpoints,
        progress: TrainProgress,
        request: StopRequest,
        *,
        mixup: Mixup | None = None,
        ema: ModelEmaV3 | None = None,
) -> dict[str, float]:
    """Train for an epoch, or for what is left of one; a signal ends it early, with a checkpoint.

    Args:
        args: Options of the run.
        accelerator: Accelerator that has prepared task, loader and optimizer.
        task: `EKDTask`.
        loader: Batches of images, in bytes, and labels.
        data_config: Preprocessing of the images.
        optimizer: Optimizer.
        scheduler: Schedule of the learning rate, by updates.
        state: Position in the run, which moves on with every step.
        checkpoints: Where the state is saved within the epoch.
        progress: Shows the loss.
        request: Whether a signal asks to stop.
        mixup: Mixes a batch.
        ema: Average of the weights, updated with them.

    Returns:
        Mean terms of the loss, over steps and processes.

    Raises:
        NotFiniteError: If the loss or the weights are not finite.
        CheckpointError: If a checkpoint cannot be written.
        ImageReadError: If an image cannot be read.
    """
    start, steps, accumulated = time.perf_counter() - state.seconds, len(loader), args.grad_accum_steps
    ekd_task = unwrap_model(task)
    model = unwrap_model(ekd_task.trainable_module)
    meter = LossMeter(accelerator, state.step, state.sums)
    progress.start_epoch(state.epoch, state.step)
    if not state.step:  # else the random states are those of the checkpoint
        torch.manual_seed(hash((args.seed, state.epoch, accelerator.process_index)))
    task.train()
    batches = accelerator.skip_first_batches(loader, state.step) if state.step else loader
    batches.set_epoch(state.epoch)  # not of the loader: before 1.15, what accelerate makes of it begins at epoch 0
    for images, target in normalize(batches, data_config, accelerator.device):
        if mixup:
            with seeded(args.seed, state.epoch, state.step, accelerator.process_index + 1):
                images, target = mixup(images, target)
        images = images.contiguous(memory_format=memory_format(args))
        with accelerator.accumulate(task):
            terms = task(images, target)
            # accelerate divides by the accumulated batches, but the last update may be of fewer
            parts = min(accumulated, steps - state.step // accumulated * accumulated)
            accelerator.backward(terms['loss'] * (accumulated / parts))
            if args.clip_grad and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(task.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
        meter.update(terms)
        progress.advance()
        state.step += 1
        if accelerator.sync_gradients:
            state.updates += 1
            scheduler.step_update(state.updates)
            if ema:
                ema.update(model, step=state.updates)

        if accelerator.num_processes == 1 or state.step % STOP_INTERVAL == 0:
            request.agree()
        last = state.step == steps
        log = last or state.step % args.log_interval == 0
        due = request.agreed or (args.checkpoint_interval and state.updates % args.checkpoint_interval == 0)
        save = due and accelerator.sync_gradients and not last
        if log or save:
            meter.check(state.epoch)
        if log:
            means = meter.means()  # waits for the device
            progress.show(means)
            if not last:
                accelerator.log(loss_record(state, optimizer, means), step=state.updates)
        if save:
            state.seconds, state.sums = time.perf_counter() - start, meter.sums()
            check_weights(model, state.updates)
            checkpoints.save(state)
            if request.agreed:
                break
    state.seconds = time.perf_counter() - start
    return meter.means()


def loss_record(state: TrainState, optimizer: AcceleratedOptimizer, means: Mapping[str, float]) -> dict[str, Any]:
    """Name the mean terms of the loss, position and learning rate as in metrics.jsonl."""
    record = {'epoch': state.epoch, 'updates': state.updates, 'lr': optimizer.param_groups[0]['lr']}
    return record | {f'train_{term}': value for term, value in means.items()}
