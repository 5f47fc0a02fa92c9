"""The folder of a run: its lock, the last and the best model, metrics of every epoch, and the summary at the end.

What a run resumes from lies there too, and is written in `checkpoint.py`.
"""
import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from timm.utils import get_outdir
from torch import nn

from ..data.datasets import ImageData
from ..evaluation.metrics import add_accuracies, wilson_interval
from ..evaluation.plots import plot_accuracy, plot_curves
from ..hub.save import save_model
from ..utils.environment import describe_machine
from ..utils.errors import InputError
from ..utils.files import write_json, write_text
from ..utils.schema import read_json
from ..weights.config_checks import SAVED
from .checkpoint import CheckpointError
from .state import TrainState

__all__ = ['RunFolder', 'copy_best', 'describe_results', 'describe_run', 'open_output']


@contextmanager
def open_output(args: argparse.Namespace, name: str) -> Iterator[Path]:
    """Make the folder of a run and keep it from other runs, to be called by all processes.

    Args:
        args: Options of the run. If `output` is None it becomes a new folder in output/.
        name: Name of the new one.

    Yields:
        The folder.

    Raises:
        InputError: If another run is writing to it.
        OSError: If nothing can be written there.
    """
    with ExitStack() as stack:
        if PartialState().is_main_process:
            folder = args.output or Path(get_outdir('output', name, inc=True))
            (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(folder / 'checkpoints' / '.lock', timeout=0))
            except Timeout:
                raise InputError(f'--output {folder} must not be that of another run, which is writing to it') from None
        args.output = broadcast_object_list([folder if PartialState().is_main_process else None])[0]
        yield args.output


@dataclass(frozen=True)
class RunFolder:
    """What a run writes to its folder: the last model there, the best one in best/, and what is known of both.

    Attributes:
        path: The folder.
        net: Model that is reported and saved.
        prefix: What the names of its metrics begin with in the records of the epochs.
        costs: Costs of every depth, as `count_costs` gives them.
        data_config: Preprocessing of the images.
        class_names: Name of every class.
        best_by: Depth whose top-1 chooses the best epoch, the mean over depths if None.
    """

    path: Path
    net: nn.Module
    prefix: str
    costs: Sequence[Mapping[str, Any]]
    data_config: Mapping[str, Any]
    class_names: Sequence[str]
    best_by: int | None = None

    def rows(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Costs and accuracies of every depth after the epoch of a record."""
        return add_accuracies(self.costs, {key.removeprefix(self.prefix): value for key, value in record.items()
                                           if key.startswith(self.prefix)})

    def save_net(self, folder: Path, state: TrainState) -> None:
        """Save the model in a folder, with its results if it is that of the end of an epoch."""
        rows = self.costs if state.step or not state.history else self.rows(state.history[-1])
        save_model(self.net, folder, data_config=self.data_config, class_names=self.class_names, rows=rows,
                   epoch=state.epoch)

    def write_epoch(self, state: TrainState) -> None:
        """Write metrics and model at the end of an epoch, to best/ too if no epoch before was better.

        Which one was the best says the configuration in best/ alone: it is always that of the weights beside it.

        Raises:
            CheckpointError: If they cannot be written.
        """
        best, rows = self.path / 'best', self.rows(state.history[-1])
        try:
            for folder in (self.path, best):
                (folder / 'summary.json').unlink(missing_ok=True)  # of an earlier run
            lines = (json.dumps(record, allow_nan=False) + '\n' for record in state.history)
            write_text(self.path / 'metrics.jsonl', ''.join(lines))
            self.save_net(self.path, state)
            if state.epoch == 1 or self._score(rows) > self._score(read_results(best)['depths']):
                best.mkdir(exist_ok=True)
                self.save_net(best, state)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f'{self.path} cannot be written to: {e}. Checkpoints are intact') from e

    def write_summary(self, state: TrainState, described: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Write plots and summaries of a run that is complete.

        Args:
            state: Its end.
            described: What the summaries hold besides.
            name: Title of the plots.

        Returns:
            The summary of the last epoch.
        """
        best = read_results(self.path / 'best')
        by = f'at depth {self.best_by}' if self.best_by else 'as mean over depths'
        images, last = described['validation_images'], self.rows(state.history[-1])
        results = (
            (self.path / 'best', best['epoch'], best['depths'], f', the best top-1 {by}'),
            (self.path, state.epoch, last, ''),
        )
        speed = {
            'seconds_per_epoch': mean(record['seconds'] for record in state.history),
            'images_per_second': mean(record['images_per_second'] for record in state.history),
        }
        plot_curves(self.path / 'curves.png', state.history, _add_intervals(last, images), name)
        for folder, epoch, rows, why in results:
            averaged = ', averaged' if self.prefix else ''
            weights = f'of epoch {epoch} of {state.epoch}{why}{averaged}'
            plot_accuracy(folder / 'accuracy.png', _add_intervals(rows, images), name)
            summary = {
                **described, **speed, 'weights': weights, 'epoch': epoch, 'best_epoch': best['epoch'], 'depths': rows}
            write_json(folder / 'summary.json', summary)  # last: it means that all is there
        return summary

    def _score(self, rows: Sequence[Mapping[str, Any]]) -> float:
        tops = [row['top1'] for row in rows if self.best_by in (None, row['depth'])]
        return mean(tops) if tops else float('-inf')


def _add_intervals(rows: Sequence[Mapping[str, Any]], images: int) -> list[dict[str, Any]]:
    """Add to results on some images their confidence intervals, for plots."""
    return [{**row, 'top1_interval': wilson_interval(round(row['top1'] * images / 100), images)} for row in rows]


def read_results(folder: Path) -> dict[str, Any]:
    """Read epoch and results, the latter as 'depths', of the model in a folder; there are none if it is not there."""
    try:
        return {'epoch': None, 'depths': [], **read_json(folder / 'config.json', SAVED)}
    except (InputError, FileNotFoundError):
        return {'epoch': None, 'depths': []}


def copy_best(run: Path, other: Path, epoch: int) -> None:
    """Copy the best model of a run to the folder of one that resumes from it, if it is not of an epoch after that."""
    found = read_results(run / 'best')['epoch']
    if found and found <= epoch and run != other.resolve():
        shutil.copytree(run / 'best', other / 'best', dirs_exist_ok=True)


def describe_results(args: argparse.Namespace, model: nn.Module, data: ImageData) -> dict[str, Any]:
    """Describe what was evaluated."""
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'base_model': model.base_models,
        'parameters': sum(p.numel() for p in model.parameters()),
        'validation_images': len(data.validation),
        'validation_split': data.val_split,
        'data_on_hub': args.dataset != 'digits' and not os.path.isdir(args.dataset),
    }


def describe_run(accelerator: Accelerator, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what a run was started with: arguments, processes, precision, and `describe_machine`.

    Args:
        accelerator: Accelerator of the run.
        arguments: Options of the run.
    """
    return {
        'arguments': {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        'processes': accelerator.num_processes,
        'device': str(accelerator.device),
        'mixed_precision': accelerator.mixed_precision,
        **describe_machine(),
    }
