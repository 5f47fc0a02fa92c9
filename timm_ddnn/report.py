"""What a training run writes: costs and results per depth, metrics by epoch, pictures, the model in timm's format.

Names of metrics, in `metrics.jsonl` (a line per epoch) and in `history`:

    epoch                 counted from 0
    updates               updates of the weights since the start of the run
    lr                    learning rate at the end of the epoch
    train_loss            the loss and its terms, means over the epoch's batches, 0 in those without the term:
    train_ce_<depth>      criterion of a depth
    train_kl_<depth>      KL divergence from the teacher, times temperature squared, without its weight
    train_attention_<depth>  distance of the attention from the teacher's, without its weight
    top1_<depth>          accuracy on the validation split in percent, likewise top5_<depth> (best k if k < 5 classes)
    ema_top1_<depth>      the same of the averaged weights, where there are any
    top1                  mean top-1 of all depths, of the averaged weights if any, highest in the best checkpoint
    seconds               time of the epoch's training, without evaluation
    images_per_second     training images of all processes in that time

A row of results per depth: depth, blocks (per stage), parameters (of the plain net of that depth), macs
(multiply-accumulates of one image), top1, top5.
"""
import copy
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.table import Table
from rich.text import Text
from timm.models import save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .dynamic_depth import eval_mode
from .hub import file_sum
from .model_card import cost_cells
from .version import __version__

__all__ = [
    'add_accuracies', 'count_costs', 'describe_machine', 'describe_run', 'plot_accuracy', 'plot_curves', 'result_table',
    'save_figure', 'save_model', 'show_macs', 'write_json', 'write_section', 'write_text',
]


def count_costs(model: nn.Module, input_size: Sequence[int]) -> list[dict[str, Any]]:
    """Count parameters and multiply-accumulates of every depth.

    Args:
        model: Dynamic-depth model.
        input_size: Size of an image, (C, H, W).

    Returns:
        Rows with depth, blocks, parameters and macs.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    rows = []
    with eval_mode(model), torch.no_grad():
        for depth in model.depths:
            with FlopCounterMode(display=False) as counter:
                model(image, depth=depth)
            rows.append({
                'depth': depth,
                'blocks': list(model.blocks(depth)),
                'parameters': sum(p.numel() for p in model.extract(depth).parameters()),
                'macs': counter.get_total_flops() // 2,
            })
    return rows


def add_accuracies(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """Add the accuracy of every depth to its row.

    Args:
        rows: Rows with depth, as `count_costs` gives them.
        metrics: top1_<depth> and top5_<depth>, as `evaluation.evaluate` gives them.

    Returns:
        Rows of results.
    """
    return [dict(row, top1=metrics[f'top1_{row["depth"]}'], top5=metrics[f'top5_{row["depth"]}']) for row in rows]


def result_table(rows: Sequence[Mapping[str, Any]], title: str, num_parameters: int) -> Table:
    """Lay out results per depth for the terminal.

    Args:
        rows: Rows of results, as above.
        title: Title.
        num_parameters: Parameters of the model that holds all depths.
    """
    table = Table(title=Text(title), caption=f'all depths in one model: {num_parameters / 1e6:.3f} M parameters')
    for column in ('depth', 'blocks', 'parameters (M)', 'MACs (M)', 'top-1 (%)', 'top-5 (%)'):
        table.add_column(column, justify='right')
    for row in rows:
        table.add_row(*cost_cells(row), f'{row["top1"]:.2f}', f'{row["top5"]:.2f}')
    return table


def describe_run(accelerator: Accelerator, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what a run was started with: arguments, processes, precision, and `describe_machine`.

    Args:
        accelerator: Accelerator of the run.
        arguments: Arguments of the script.
    """
    return {
        'arguments': {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        'processes': accelerator.num_processes,
        'device': str(accelerator.device),
        'mixed_precision': accelerator.mixed_precision,
        **describe_machine(),
    }


def describe_machine() -> dict[str, Any]:
    """Describe what a number was measured with: versions, hardware, and the commit of this library."""
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        cpu = next((line.partition(': ')[2] for line in lines if line.startswith('model name')), cpu)
    return {
        'versions': {
            'timm_ddnn': __version__,
            'python': platform.python_version(),
            'torch': torch.__version__,
            **{name: version(name) for name in ('torchvision', 'timm', 'accelerate', 'datasets')},
        },
        'hardware': {
            'cpu': cpu,
            'cpu_cores': os.cpu_count(),
            'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2 ** 30, 1),
            'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        'git': _git_state(Path(__file__)),
    }


def _git_state(file: Path) -> dict[str, Any] | None:
    """Commit of the checkout that tracks a file, and whether a tracked file differs from it; None if none does."""
    def git(*args: str) -> str:
        return subprocess.run(
            ('git', '-C', str(file.parent), *args), capture_output=True, text=True, check=True).stdout.strip()
    try:
        git('ls-files', '--error-unmatch', file.name)
        return {'commit': git('rev-parse', 'HEAD'), 'dirty': bool(git('status', '--porcelain', '--untracked-files=no'))}
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file such that it is whole or not there at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + '\n')


def write_text(path: Path, text: str) -> None:
    """Write a text file such that it is whole or not there at all."""
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.write_text(text)
    os.replace(temporary, path)


def write_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME -->` and `<!-- end of NAME -->` in a file.

    Raises:
        ValueError: If the file has not each of these lines once, in this order.
    """
    start, end = f'<!-- {name} -->\n', f'<!-- end of {name} -->'
    old = path.read_text()
    before, _, rest = old.partition(start)
    _, _, after = rest.partition(end)
    if not (old.count(start) == old.count(end) == rest.count(end) == 1):
        raise ValueError(f'{path} must have the lines {start.strip()} and {end} once each, in this order')
    write_text(path, before + start + text + end + after)


def save_model(
        model: nn.Module,
        folder: Path,
        *,
        data_config: Mapping[str, Any],
        class_names: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
) -> None:
    """Save weights and configuration such that `timm.create_model('local-dir:FOLDER', pretrained=True)` loads them.

    Args:
        model: Dynamic-depth model.
        folder: Folder that exists. Of files with the same names the new ones take the place, one by one.
        data_config: Preprocessing of the images, as `timm.data.resolve_data_config` gives it.
        class_names: Name of every class. They are left out if the model has other classes besides.
        rows: Rows of results. They become the key 'depths' of the configuration, which timm passes over.
    """
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)  # safetensors takes no other format
    label_names = list(class_names) if len(class_names) == model.num_classes else None
    with tempfile.TemporaryDirectory(dir=folder, prefix='.model-') as temporary:
        save_for_hf(
            model,
            temporary,
            safe_serialization=True,
            model_config={'label_names': label_names, 'depths': list(rows)},
            data_config=dict(data_config),
        )
        path = Path(temporary) / 'config.json'
        config = json.loads(path.read_text())
        # It stands at top level as well, and transformers cannot load a timm model that gets it twice.
        config.get('model_args', {}).pop('num_classes', None)
        config['weights_sha256'] = file_sum(Path(temporary) / 'model.safetensors')
        write_json(path, config)
        shutil.copymode(path, Path(temporary) / 'model.safetensors')  # safetensors lets nobody but the owner read it
        for name in ('model.safetensors', 'config.json'):
            os.replace(Path(temporary) / name, folder / name)


def plot_accuracy(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw top-1 accuracy over multiply-accumulates, a point per depth.

    Args:
        path: PNG file to write.
        rows: Rows of results.
        title: Title.
    """
    figure = Figure(figsize=(6, 4), layout='constrained')
    axes = figure.add_subplot()
    macs = [row['macs'] for row in rows]
    axes.plot(macs, [row['top1'] for row in rows], color='0.7')
    for i, row in enumerate(rows):
        axes.plot(row['macs'], row['top1'], 'o', color=f'C{i}', label=f'depth {row["depth"]}: {row["top1"]:.2f} %')
    figure.legend(loc='outside lower center', ncols=min(len(rows), 3))
    axes.margins(x=0.1, y=0.1)
    axes.set(title=title, xlabel='multiply-accumulates per image', ylabel='top-1 accuracy (%)')
    show_macs(axes, max(macs))
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_curves(path: Path, history: Sequence[Mapping[str, Any]], depths: Sequence[int], title: str) -> None:
    """Draw the terms of the loss and the accuracy of every depth by epoch.

    Args:
        path: PNG file to write.
        history: Metrics by epoch, see the head of this module.
        depths: Depths, the full-net's first.
        title: Title.
    """
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    figure.suptitle(title)
    losses, accuracies = figure.subplots(1, 2)
    epochs = [record['epoch'] + 1 for record in history]
    curves = [
        (losses, 'train_ce', '.-', 'cross-entropy'),
        (losses, 'train_kl', 'x--', 'KL divergence'),
        (losses, 'train_attention', '+:', 'attention'),
        (accuracies, 'top1', '.-', 'weights of the epoch'),
        (accuracies, 'ema_top1', 'x--', 'averaged weights'),
    ]
    for axes, metric, style, label in curves:
        for i, depth in enumerate(depths):
            values = [record.get(f'{metric}_{depth}', math.nan) for record in history]
            axes.plot(epochs, values, style, color=f'C{i}')
        if any(f'{metric}_{depth}' in history[-1] for depth in depths):
            axes.plot([], [], style, color='black', label=label)
    losses.set(title='training, terms of the loss without their weights', xlabel='epoch', yscale='log')
    accuracies.set(title='validation', xlabel='epoch', ylabel='top-1 accuracy (%)')
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(0.5, len(history) + 0.5)
        axes.grid(alpha=0.3)
        axes.legend(fontsize='small')
    handles = [Line2D([], [], color=f'C{i}', label=f'depth {depth}') for i, depth in enumerate(depths)]
    figure.legend(handles=handles, loc='outside lower center', ncols=len(depths))
    save_figure(figure, path)


def show_macs(axes: Axes, most: float) -> None:
    """Write the multiply-accumulates of an x-axis in millions, or in billions if the most of them are that many."""
    unit, letter = (1e9, 'G') if most >= 1e9 else (1e6, 'M')
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value / unit:g} {letter}'))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file such that it is whole or not there at all."""
    temporary = path.with_name(f'.{path.name}.tmp')
    figure.savefig(temporary, format='png', dpi=150)
    os.replace(temporary, path)
