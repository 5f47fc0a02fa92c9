"""What a training run shows: what it is, progress bars or lines while it trains, and the experiment tracker."""
import argparse
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import nn
from torch.utils.data import DataLoader

from ..data.datasets import ImageData
from ..utils.environment import describe_machine
from ..utils.errors import InputError

__all__ = ['TrainProgress', 'print_banner', 'print_line', 'start_tracker']


PRECISIONS = {'no': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}
LINE_SECONDS = 30  # without a terminal, at most, between two lines


class TrainProgress:
    """Shows where a run is: two bars on a terminal, of the epoch and of the run, else lines."""

    def __init__(self, console: Console, epochs: int, steps: int) -> None:
        """Show nothing yet.

        Args:
            console: Where to show it.
            epochs: Epochs of the run.
            steps: Batches of an epoch.
        """
        self.console = console
        self.epochs, self.steps = epochs, steps
        self.bars = Progress(
            TextColumn('{task.description}'), BarColumn(bar_width=16), MofNCompleteColumn(),
            TimeRemainingColumn(compact=True), TextColumn('{task.fields[terms]}', table_column=Column(no_wrap=True)),
            console=console, disable=console.quiet or not console.is_terminal, speed_estimate_period=300,
        )
        self._epoch = self.bars.add_task(f'epoch 1/{epochs}', total=steps, terms='')
        self._run = self.bars.add_task('run', total=epochs, terms='')
        self._done = 0
        self._line, self._printed = '', time.monotonic()

    def __enter__(self) -> 'TrainProgress':
        """Show the bars."""
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take the bars away."""
        self.bars.stop()

    def start_epoch(self, epoch: int, step: int) -> None:
        """Begin with an epoch, from 0, at a step."""
        self.bars.reset(
            self._epoch, total=self.steps, completed=step, description=f'epoch {epoch + 1}/{self.epochs}', terms='')
        if self._done != epoch * self.steps + step:  # as after a resume: these steps took no time here
            self._done = epoch * self.steps + step
            self.bars.reset(self._run, completed=self._done / self.steps)
        self._line = ''

    def advance(self) -> None:
        """Count a step."""
        self._done += 1
        self.bars.advance(self._epoch)
        self.bars.update(self._run, completed=self._done / self.steps)
        self._print_if_due(self._epoch)

    def show(self, terms: Mapping[str, float]) -> None:
        """Show the mean terms of the loss over the steps of the epoch so far: as many as there is room for."""
        self._line, room = '', self.console.width - 50
        for term, value in terms.items():
            text = f'{term} {value:.3f}  '
            if self.bars.disable or not self._line or len(self._line + text) <= room:
                self._line += text
        self.bars.update(self._epoch, terms=self._line)
        self._print_if_due(self._epoch, seconds=0)

    def validate(self, batches: DataLoader) -> Iterator[Any]:
        """Show the validation as long as its batches are taken."""
        task = self.bars.add_task('validation', total=len(batches), terms='')
        try:
            for batch in batches:
                yield batch
                self.bars.advance(task)
                self._print_if_due(task)
        finally:
            self.bars.remove_task(task)

    def _print_if_due(self, task: TaskID, seconds: float = LINE_SECONDS) -> None:
        """Print a line in the place of the bars, if the last one is some seconds old."""
        if not self.bars.disable or time.monotonic() - self._printed < seconds:
            return
        bars = {bar.id: bar for bar in self.bars.tasks}
        bar, run = bars[task], bars[self._run]
        left = '' if run.time_remaining is None else f'{timedelta(seconds=int(run.time_remaining))} left of the run'
        if bar.completed < bar.total:
            terms = self._line if task == self._epoch else ''
            line = f'{bar.description}, batch {bar.completed:.0f}/{bar.total:.0f}: {terms}{left}'
            print_line(self.console, line.rstrip(' :'))
            self._printed = time.monotonic()


def print_line(console: Console, text: str) -> None:
    """Print a line as it is, however wide the console is."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def print_banner(
        console: Console,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: nn.Module,
        data: ImageData,
        data_config: Mapping[str, Any],
        duplicates: int | None,
) -> None:
    """Print what a run trains, on what, and where it writes to.

    Args:
        console: Where to print.
        args: Options of the run.
        accelerator: Accelerator of the run.
        model: The model.
        data: The data set.
        data_config: Preprocessing of the images.
        duplicates: What `count_duplicates` gives.
    """
    hardware = describe_machine()['hardware']
    device = accelerator.device
    name = hardware['gpus'][device.index or 0] if device.type == 'cuda' else hardware['cpu']
    size = ' x '.join(map(str, data_config['input_size'][1:]))
    weights = args.initial_checkpoint or (args.model if args.pretrained else 'random')
    weights = f'weights in {args.output}/full_net' if args.full_net_epochs else f'{weights} weights'
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    batches = f'batches of {args.batch_size}' + f' x {args.grad_accum_steps}' * (args.grad_accum_steps > 1)
    lines = {
        'model': f'{model.pretrained_cfg["architecture"]}, depths {", ".join(map(str, model.depths))}, '
                 f'{parameters:.2f} M parameters, from {weights}',
        'data': f'{args.dataset}: {len(data.train):,} images to train, {len(data.validation):,} to validate '
                f'({data.val_split}), {len(data.class_names):,} classes, {size} px',
        'device': f'{accelerator.num_processes} x {device.type} ({name}), '
                  f'{PRECISIONS[accelerator.mixed_precision]}, {batches}',
        'training': f'{args.epochs} epochs, {args.opt}, learning rate {args.lr:g}, warm-up of {args.warmup_epochs}',
        'folder': str(args.output),
    }
    if duplicates:
        lines['warning'] = f'{duplicates} images to validate are also trained on: accuracies are too good'
    for label, line in lines.items():
        print_line(console, f'{label:<9}{line}')


def start_tracker(accelerator: Accelerator, args: argparse.Namespace, output: Path, name: str) -> None:
    """Start the experiment tracker of --report-to, if any.

    Args:
        accelerator: Accelerator of the run, whose `log` then reaches the tracker.
        args: Options of the run.
        output: Folder of the run.
        name: Name of the run; a run that resumes is the same run to the tracker by it.

    Raises:
        InputError: If its package is missing, or it cannot be started.
    """
    if args.report_to == 'none':
        return
    accelerator.project_configuration.logging_dir = str(output)
    accelerator.log_with = filter_trackers(args.report_to, output)
    if not accelerator.log_with:
        raise InputError(f'--report-to {args.report_to} needs its package: pip install {args.report_to}')
    kwargs: dict[str, Any] = {
        'wandb': {'name': name, 'id': name, 'resume': 'allow', 'dir': str(output)},
        'trackio': {'name': name, 'resume': 'allow'},
    }
    config = {key: value if isinstance(value, int | float) else str(value) for key, value in vars(args).items()}
    try:
        accelerator.init_trackers('tensorboard' if args.report_to == 'tensorboard' else 'timm_ddnn', config, kwargs)
    except Exception as e:  # what a tracker raises without its server, key or folder has no common type
        raise InputError(f'--report-to {args.report_to} cannot be started: {e}') from e
