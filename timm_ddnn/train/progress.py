"""What a training run shows while it trains: a progress bar or lines, and the experiment tracker."""
import argparse
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..utils.errors import InputError

__all__ = ['TrainProgress', 'print_line', 'start_tracker']


class TrainProgress:
    """Shows the loss during an epoch: beside a bar on a terminal, else in lines."""

    def __init__(self, console: Console, epochs: int, steps: int) -> None:
        """Show nothing yet.

        Args:
            console: Where to show it.
            epochs: Epochs of the run.
            steps: Batches of an epoch.
        """
        self.console = console
        self.epochs, self.steps = epochs, steps
        self.bar = Progress(
            TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn('{task.fields[terms]}'), console=console, disable=console.quiet or not console.is_terminal,
        )
        self._row = self.bar.add_task('', terms='')

    def __enter__(self) -> 'TrainProgress':
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take the bar away."""
        self.bar.stop()

    def start_epoch(self, epoch: int, step: int) -> None:
        """Begin with the bar of an epoch, from 0, at a step."""
        self.bar.reset(self._row, total=self.steps, completed=step, description=f'epoch {epoch + 1}/{self.epochs}')

    def advance(self) -> None:
        """Count a step."""
        self.bar.advance(self._row)

    def show(self, step: int, terms: Mapping[str, float]) -> None:
        """Show the mean terms of the loss after some steps of the epoch."""
        line = '  '.join(f'{term} {value:.3f}' for term, value in terms.items())
        self.bar.update(self._row, terms=line)
        if self.bar.disable and step < self.steps:
            print_line(self.console, f'batch {step}/{self.steps}: {line}')


def print_line(console: Console, text: str) -> None:
    """Print a line as it is, however wide the console is."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


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
