#!/usr/bin/env python3
"""Measure exported ONNX files on this CPU: one file of all depths against a file for each, in float and int8.

    python benchmarks/device.py                              # size, memory and latency; weights do not matter for them
    python benchmarks/device.py --only accuracy --data FOLDER   # top-1 of the weights that come with the library

It writes results/device.json and the table of devices in README.md. As in benchmark.py a ratio is of medians of calls
that run in turn, and a section takes the place of an older one.
"""
import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from benchmark import HERE, exact, name_machine, row, table

from timm_ddnn.deploy.export import export
from timm_ddnn.deploy.int8 import load_int8_images
from timm_ddnn.deploy.onnx_graph import merge_nets, trace_net
from timm_ddnn.deploy.peak_memory import onnx_function
from timm_ddnn.deploy.quantize import quantize_nets
from timm_ddnn.models.ddnn_resnet import WEIGHTS
from timm_ddnn.utils.files import write_json, write_section
from timm_ddnn.utils.modules import find_norms
from timm_ddnn_cli.arguments import ArgumentParser, number

MODELS = {'ddnn_resnet50': 224, 'ddnn_resnet34': 224, 'ddnn_resnet20': 32}
LARGE = ('ddnn_resnet50', 'ddnn_resnet34')  # the others take less than a millisecond: stated, not aimed at
MEMORY = """
import ctypes, gc, json, sys
import numpy as np, onnxruntime
def resident():
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)  # what was freed is not held
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS:')).split()[1]) * 1024
path, shape, depths = json.loads(sys.argv[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
before = resident()
session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
images = np.zeros(shape, np.float32)
for depth in depths or [None]:
    session.run(None, {'images': images} if depth is None else {'images': images, 'depth': np.array(depth)})
print(resident() - before)
"""
START_ONNX = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])
size = int(sys.argv[2])
session.run(None, {'images': np.zeros((1, 3, size, size), np.float32), 'depth': np.array(int(sys.argv[3]))})
"""
START_TORCH = """
import sys
import timm, timm_ddnn, torch
model = timm.create_model(sys.argv[1]).eval()
model.load_state_dict(torch.load(sys.argv[4], weights_only=True))
size = int(sys.argv[2])
with torch.inference_mode():
    model(torch.zeros(1, 3, size, size), depth=int(sys.argv[3]))
"""


def write_files(name, folder):
    """Write float-DEPTH, int8-DEPTH, float and int8 .onnx of a model whose norms do something."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for norm in find_norms(model):
        if norm._parameters:
            torch.nn.init.uniform_(norm.weight, 0.3, 0.7)
        torch.nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    images = torch.randn(8, 3, MODELS[name], MODELS[name])
    nets = {d: model.extract(d).eval() for d in model.depths}
    floats = {d: trace_net(net, images, True) for d, net in nets.items()}
    for depth, graph in floats.items():
        onnx.save(graph, folder / f'float-{depth}.onnx')
    onnx.save(merge_nets({d: trace_net(net, images, True, False) for d, net in nets.items()}), folder / 'float.onnx')
    ints = quantize_nets(floats, images)
    for depth, graph in ints.items():
        onnx.save(graph, folder / f'int8-{depth}.onnx')
    onnx.save(merge_nets(ints), folder / 'int8.onnx')
    torch.save(model.state_dict(), folder / 'weights.pt')
    return model.depths


def call_in_turn(functions, rounds):
    """Seconds of the first and of the second call of each function in every round; a round before does not count."""
    first, second = {name: [] for name in functions}, {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            for seconds in (first, second):
                start = time.perf_counter()
                function()
                if i:
                    seconds[name].append(time.perf_counter() - start)
    return first, second


def run_child(code, *arguments):
    command = [sys.executable, '-c', code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure_sizes(name, folder, depths):
    size = {path.stem: path.stat().st_size for path in folder.glob('*.onnx')}
    full = f'float-{depths[0]}'
    for kind, aim in (('int8', 0.27), ('float', 1.02)):
        case = f'{name}, {size[kind]:,} of {size[full]:,}'
        yield exact(f'bytes, all depths, {kind}, against the float file of the full-net', case, size[kind] / size[full],
                    aim, bytes=size)
        apart = sum(size[f'{kind}-{d}'] for d in depths)
        case = f'{name}, {size[kind]:,} of {apart:,}'
        yield exact(f'bytes, all depths, {kind}, against a file for each', case, size[kind] / apart)


def measure_memory(name, folder, depths):
    shape = (1, 3, MODELS[name], MODELS[name])

    def resident(file, *wanted):
        return int(run_child(MEMORY, json.dumps([str(folder / f'{file}.onnx'), shape, wanted])))

    for kind in ('int8', 'float'):
        together, alone = resident(kind, *depths), [resident(f'{kind}-{d}') for d in depths]
        aim = 1.10 if kind == 'int8' and name in LARGE else None
        for what, other, limit in (('the full-net', alone[0], aim), ('a session for each', sum(alone), None)):
            case = f'{name}, {together / 2 ** 20:.1f} of {other / 2 ** 20:.1f} MiB'
            yield exact(f'memory, all depths, {kind}, against {what}', case, together / other, limit)


def measure_latency(name, folder, depths, batch_size, threads, rounds):
    images = np.random.default_rng(0).standard_normal((batch_size, 3, MODELS[name], MODELS[name]), np.float32)
    shared = {kind: onnx_function(folder / f'{kind}.onnx', threads) for kind in ('float', 'int8')}
    functions = {}
    for depth in depths:
        for kind in shared:
            own = onnx_function(folder / f'{kind}-{depth}.onnx', threads)
            functions[f'{kind}-{depth}'] = functools.partial(own, images)
            functions[f'{kind}, {depth}'] = functools.partial(shared[kind], images, depth)
    _, seconds = call_in_turn(functions, rounds)
    switched, stayed = call_in_turn({d: functions[f'int8, {d}'] for d in depths}, rounds)
    large = name in LARGE
    for depth in depths:
        case = f'{name} depth {depth}, batch {batch_size}, threads {threads}'
        one, own, plain = f'int8, {depth}', f'int8-{depth}', f'float-{depth}'
        yield row('latency of the one file, int8, against a file of its own', case, seconds, one, own,
                  1.03 if large else None)
        yield row('latency of the one file, int8, against float of its own', case, seconds, one, plain,
                  0.35 if large else None)
        yield row('latency of the one file, float, against a file of its own', case, seconds, f'float, {depth}', plain)
        both = {'switch': switched[depth], 'stay': stayed[depth]}
        yield row('first call after a switch, int8, against the second', case, both, 'switch', 'stay', 1.10)


def measure_start(name, folder, depths):
    """Processes that import, load and answer once at the shallowest depth."""
    arguments = [name, MODELS[name], depths[-1], folder / 'weights.pt']
    functions = {
        'file': lambda: run_child(START_ONNX, folder / 'int8.onnx', *arguments[1:3]),
        'torch': lambda: run_child(START_TORCH, *arguments),
    }
    _, seconds = call_in_turn(functions, 4)
    found = row('start to first answer, int8 file, against torch', name, seconds, 'file', 'torch')
    case = '{}, {file:.2f} of {torch:.2f} s'.format(name, **found['seconds'])
    yield found | {'case': case}


def measure_model(name, args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        depths = write_files(name, folder)
        yield from measure_sizes(name, folder, depths)
        yield from measure_memory(name, folder, depths)
        for batch_size in (1, 8):
            for threads in (1, 2):
                yield from measure_latency(name, folder, depths, batch_size, threads, args.rounds)
        yield from measure_start(name, folder, depths)


def measure_accuracy(args):
    """Top-1 of int8 on the validation split, of all weights that come with the library."""
    for tag in sorted(path.name for path in WEIGHTS.iterdir() if path.is_dir()):
        model = timm.create_model(tag, pretrained=True)
        with tempfile.TemporaryDirectory() as folder:
            rows = export(
                model, 'all', folder, format='onnx', images=torch.randn(4, 3, 32, 32), max_loss=100,
                int8=load_int8_images(model, args.data))
        for r in rows:
            case = f'{tag} depth {r["depth"]}, {r["top1"]:.2f} of {r["float_top1"]:.2f} %'
            yield exact('points of top-1 lost by int8', case, r['float_top1'] - r['top1'], 0.5)


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    sections = [*MODELS, 'accuracy']
    parser.add_argument('--only', nargs='+', choices=sections, metavar='SECTION', help=f'of {", ".join(sections)}')
    parser.add_argument('--rounds', type=number(int, 3), default=15, help='rounds per figure')
    parser.add_argument('--data', help='data set of the accuracy, CIFAR-10')
    args = parser.parse_args()
    if 'accuracy' in (args.only or ()) and not args.data:
        parser.error('--data must be given for the accuracy')
    path = HERE / 'results' / 'device.json'
    for name in args.only or MODELS:
        section = {'machine': f'{name_machine()}; onnxruntime {onnxruntime.__version__}', 'figures': []}
        for figure in measure_accuracy(args) if name == 'accuracy' else measure_model(name, args):
            section['figures'].append(figure)
            print(f'{figure["figure"]}: {figure["case"]}: {figure["ratio"]:.3f} (aim {figure["aim"]})', flush=True)
        result = {**(json.loads(path.read_text()) if path.exists() else {}), name: section}
        result = {name: result[name] for name in sections if name in result}
        write_json(path, result)
        write_section(HERE / 'README.md', 'device', table(result))


if __name__ == '__main__':
    main()
