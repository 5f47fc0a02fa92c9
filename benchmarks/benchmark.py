#!/usr/bin/env python3
"""Measure what dynamic depth and embedded knowledge distillation cost, on the CPU or the GPU that is there.

    python benchmarks/benchmark.py                          # all figures, and the table of this device in README.md
    python benchmarks/benchmark.py --only step loss         # some of them, which take the places of older ones

A figure is a ratio of medians. The variants that it compares run in turn in one process, so that what else the machine
does hits all of them; `spread` is the range of the middle half of the ratios of single rounds. What the figures mean,
and what was learned from them, is in benchmarks/README.md.
"""
import gc
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import timm_ddnn
from timm_ddnn.utils.environment import describe_machine
from timm_ddnn.utils.files import write_json, write_section
from timm_ddnn_cli.arguments import ArgumentParser, number

HERE = Path(__file__).resolve().parent
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
GPU = DEVICE.type == 'cuda'
# Without instructions for it, bfloat16 is ten times slower on a CPU
PRECISION = torch.bfloat16 if GPU or torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
# Images per step by size: what a GPU is busy with, and what a CPU does in a second or two
STEP_BATCH = {224: 256, 64: 256} if GPU else {224: 8, 64: 32}
# A model of each other family: name, arguments, px
FAMILIES = [
    ('convnext_atto', {}, 224), ('vit_tiny_patch16_224', {}, 224), ('regnety_004', {}, 224),
    ('efficientnet_b0', {}, 224), ('swin_tiny_patch4_window7_224', {'img_size': 64}, 64)]
TRAINED = {
    'ddnn_resnet20': (32, 1024 if GPU else 128), 'ddnn_resnet56': (32, 1024 if GPU else 64),
    'ddnn_resnet34': (224, 256 if GPU else 8), 'ddnn_resnet50': (224, 256 if GPU else 8),
}


def compare(variants, rounds, inner=1):
    """Time variants in turn: a list of seconds per call for each."""
    threads = torch.get_num_threads()
    timers = {name: Timer('f()', globals={'f': f}, num_threads=threads) for name, f in variants.items()}
    for timer in timers.values():
        timer.timeit(1)
    seconds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(inner).median)
    return seconds


def row(figure, case, seconds, name, reference, aim=None, scale=1.0):
    """One figure: the median of `name` over the median of `reference` times `scale`."""
    ratios = [a / b / scale for a, b in zip(seconds[name], seconds[reference], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = {key: statistics.median(seconds[key]) for key in (name, reference)}
    return {
        'figure': figure, 'case': case, 'ratio': medians[name] / medians[reference] / scale, 'aim': aim,
        'spread': [low, high], 'rounds': len(ratios), 'seconds': medians,
    }


def exact(figure, case, ratio, aim=None, **values):
    """One figure that is counted, not timed."""
    return {'figure': figure, 'case': case, 'ratio': ratio, 'aim': aim, **values}


def batch(size, count):
    images = torch.randn(count, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (count,), device=DEVICE)


def create(name, **kwargs):
    torch.manual_seed(0)
    make = timm.create_model if name.startswith('ddnn_') else timm_ddnn.make_dynamic
    return make(name, num_classes=10, **kwargs).to(DEVICE, memory_format=torch.channels_last)


def autocast():
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=PRECISION is torch.bfloat16)


def count_macs(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2


def plain_step(net, images, target):
    """Training step of a stock net, without the optimizer."""
    def step():
        with autocast():
            loss = F.cross_entropy(net(images).float(), target)
        loss.backward()
    return step


def ekd_step(task, images, target):
    def step():
        with autocast():
            loss = task(images, target)['loss']
        loss.backward()
    return step


def with_sgd(module, step):
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, nesterov=True)

    def full_step():
        step()
        optimizer.step()
        optimizer.zero_grad()
    return full_step


def separate_steps(model, loss_fn, images, target, at_once):
    """The same step with a forward per depth: backward after each, or of the sum when all graphs are held."""
    full, *others = model.depths

    def step():
        with autocast():
            outputs = {full: model(images, depth=(full,))[full]}
        if not at_once:
            loss_fn(outputs, target).backward()
            teacher = outputs[full]
            outputs = {full: timm_ddnn.SubNetOutput(teacher.logits.detach(), [f.detach() for f in teacher.features])}
        for depth in others:
            with autocast():
                outputs[depth] = model(images, depth=(depth,))[depth]
            if not at_once:
                pair = {full: outputs[full], depth: outputs.pop(depth)}
                loss_fn(pair, target).backward()
                del pair
        if at_once:
            loss_fn(outputs, target).backward()
    return step


def measure_latency(args):
    for name in ('ddnn_resnet50', 'ddnn_resnet34'):
        model = create(name).eval()
        for depth in model.depths:
            stock = model.extract(depth).eval()
            for count in (1, 16):
                images, _ = batch(224, count)
                with torch.inference_mode():
                    for mode in ('eager', 'compiled') if args.compiled else ('eager',):
                        torch._dynamo.reset()
                        ours, plain = (torch.compile(f) if mode == 'compiled' else f for f in (model, stock))
                        seconds = compare({
                            'ddnn': lambda f=ours, x=images, d=depth: f(x, depth=d),
                            'stock': lambda f=plain, x=images: f(x),
                        }, args.rounds, inner=1 if count > 1 and not GPU else 5)
                        case = f'{name} depth {depth}, batch {count}, {mode}'
                        yield row('latency, against the stock net', case, seconds, 'ddnn', 'stock', 1.02)


def measure_families(args):
    """Latency and the EKD step of a model of each family but ResNets."""
    for name, kwargs, size in FAMILIES:
        model = create(name, **kwargs).eval()
        images, target = batch(size, 1)
        for depth in model.depths:
            stock = model.extract(depth).eval()
            with torch.inference_mode():
                seconds = compare({
                    'ddnn': lambda d=depth, model=model, x=images: model(x, depth=d),
                    'stock': lambda net=stock, x=images: net(x),
                }, args.rounds, inner=5)
            case = f'{name} depth {depth}, {size} px, batch 1, eager'
            yield row('latency, against the stock net', case, seconds, 'ddnn', 'stock', 1.02)
        images, target = batch(size, STEP_BATCH[size])
        task = timm_ddnn.EKDTask(model.train(), verbose=False)
        seconds = compare({
            'ekd': ekd_step(task, images, target),
            'one by one': separate_steps(model, task.loss_fn, images, target, at_once=False),
        }, args.rounds)
        case = f'{name} {model.depths}, {size} px, batch {len(images)}, eager'
        yield row('EKD step, against one by one', case, seconds, 'ekd', 'one by one', 0.90)


def measure_switching(args):
    model = create('ddnn_resnet50').eval()
    images, _ = batch(224, 1)
    for mode in ('eager', 'compiled') if args.compiled else ('eager',):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        net = torch.compile(model) if mode == 'compiled' else model
        order = [d for d in model.depths for _ in range(2)]

        def run(depths, net=net):
            for depth in depths:
                net(images, depth=depth)

        with torch.inference_mode():
            seconds = compare({
                'switching': lambda: run(model.depths * 2), 'staying': lambda order=order: run(order),
            }, args.rounds * 2)
        graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
        case = f'ddnn_resnet50, batch 1, {mode}'
        yield row('switching depth, against staying', case, seconds, 'switching', 'staying', 1.01) | {'graphs': graphs}
        if mode == 'compiled' and graphs != len(model.depths):
            raise RuntimeError(f'{graphs} graphs were compiled for {len(model.depths)} depths')


def measure_step(args):
    model = create('ddnn_resnet50').train()
    full = model.extract(50).train()
    for size, count in STEP_BATCH.items():
        images, target = batch(size, count)
        for mode in ('eager', 'compiled') if args.compiled and GPU else ('eager',):
            torch._dynamo.reset()
            task = timm_ddnn.EKDTask(model, verbose=False)
            ekd, stock = task, full
            if mode == 'compiled':
                ekd, stock = torch.compile(task, fullgraph=True), torch.compile(full, fullgraph=True)
            variants = {
                'ekd': ekd_step(ekd, images, target),
                'full-net': plain_step(stock, images, target),
            }
            if mode == 'eager':
                variants['one by one'] = separate_steps(model, task.loss_fn, images, target, at_once=False)
            seconds = compare(variants, args.rounds)
            case = f'ddnn_resnet50 (50, 26, 14), {size} px, batch {count}, {mode}'
            if mode == 'eager':
                macs = {name: count_macs(f) for name, f in variants.items()}
                ratio = macs['ekd'] / macs['one by one']
                yield exact('MACs of the EKD step, against one by one', case, ratio, macs=macs)
                yield row('EKD step, against one by one', case, seconds, 'ekd', 'one by one', 0.90)
            yield row('EKD step, against the full-net times MACs', case, seconds, 'ekd', 'full-net', 1.05,
                      scale=macs['ekd'] / macs['full-net']) | {
                'images_per_second': {name: count / statistics.median(s) for name, s in seconds.items()}}
            model.zero_grad()
            full.zero_grad()


def measure_loss(args):
    model = create('ddnn_resnet50').train()
    task = timm_ddnn.EKDTask(model, verbose=False)
    for size, count in STEP_BATCH.items():
        images, target = batch(size, count)
        with autocast(), torch.no_grad():
            outputs = model(images, depth='all')

        def leaf(tensor):
            return tensor.detach().requires_grad_()

        leaves = {d: timm_ddnn.SubNetOutput(leaf(o.logits), [leaf(f) for f in o.features]) for d, o in outputs.items()}
        inputs = [t for o in leaves.values() for t in (o.logits, *o.features)]

        def terms(leaves=leaves, inputs=inputs, target=target):
            torch.autograd.grad(task.loss_fn(leaves, target), inputs, allow_unused=True)

        def cross_entropy(leaves=leaves, target=target):
            logits = [o.logits for o in leaves.values()]
            torch.autograd.grad(sum(F.cross_entropy(z.float(), target) for z in logits), logits)

        seconds = compare({
            'terms': terms, 'cross-entropy': cross_entropy, 'step': ekd_step(task, images, target)}, args.rounds)
        case = f'ddnn_resnet50, {size} px, batch {count}'
        yield row('loss and its backward, against the step', case, seconds, 'terms', 'step', 0.02)
        yield row('cross-entropy alone, against the step', case, seconds, 'cross-entropy', 'step')


def peak_memory(step, model):
    """Peak of the bytes that tensors hold during a step, weights included, as the allocator sees them."""
    step()
    model.zero_grad()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return sum(t.nbytes for t in model.state_dict().values()) + max(itertools.accumulate(changes))


def measure_memory(args):
    model = create('ddnn_resnet50').train()
    task = timm_ddnn.EKDTask(model, verbose=False)
    for size, count in STEP_BATCH.items():
        images, target = batch(size, count)
        peaks = {}
        for name, step in {
            'ekd': ekd_step(task, images, target),
            'held together': separate_steps(model, task.loss_fn, images, target, at_once=True),
            'one by one': separate_steps(model, task.loss_fn, images, target, at_once=False),
            'full-net': plain_step(model, images, target),
        }.items():
            peaks[name] = peak_memory(step, model)
        model.set_grad_checkpointing(True)
        peaks['ekd, checkpointing'] = peak_memory(ekd_step(task, images, target), model)
        model.set_grad_checkpointing(False)
        case = f'ddnn_resnet50, {size} px, batch {count}'
        for reference, aim in (('held together', 0.75), ('one by one', None), ('full-net', None)):
            yield exact(f'peak memory of the step, against {reference}', case, peaks['ekd'] / peaks[reference], aim,
                        bytes=peaks)
        yield exact('peak memory with gradient checkpointing, against without', case,
                    peaks['ekd, checkpointing'] / peaks['ekd'], bytes=peaks)


def measure_size(args):
    with tempfile.TemporaryDirectory() as folder:
        sizes = {}
        for name in ('ddnn_resnet50', 'resnet50'):
            save_model(timm.create_model(name), f'{folder}/{name}')
            sizes[name] = Path(folder, name).stat().st_size
    ratio = sizes['ddnn_resnet50'] / sizes['resnet50']
    yield exact('size of the saved model, against stock', 'ddnn_resnet50', ratio, 1.01, bytes=sizes)


def measure_training(args):
    """A training step with SGD, against those of the nets of all depths."""
    for name, (size, count) in TRAINED.items():
        model = create(name).train()
        images, target = batch(size, count)
        nets = [model.extract(depth).train() for depth in model.depths]
        task = timm_ddnn.EKDTask(model, verbose=False)
        plain = [with_sgd(net, plain_step(net, images, target)) for net in nets]
        seconds = compare({
            'one DDNN': with_sgd(model, ekd_step(task, images, target)),
            'each depth': lambda plain=plain: [step() for step in plain],
            'full-net alone': plain[0],
        }, args.rounds)
        case = f'{name} {model.depths}, {size} px, batch {count}'
        rates = {key: count / statistics.median(s) for key, s in seconds.items()}
        yield row('training, against one net after another', case, seconds, 'one DDNN', 'each depth') | {
            'images_per_second': rates}
        yield row('training, against the full-net alone', case, seconds, 'one DDNN', 'full-net alone')


def measure_script(args):
    """train_ekd.py on handwritten digits, which no decoding slows, against its bare step."""
    name, size, count = ('ddnn_resnet50', 224, 128) if GPU else ('ddnn_resnet20', 32, 64)
    model = create(name).train()
    images, target = batch(size, count)
    bare = with_sgd(model, ekd_step(timm_ddnn.EKDTask(model, verbose=False), images, target))
    rates, bare_rates = [], []
    for _ in range(3):
        bare_rates += [count / s for s in compare({'bare': bare}, args.rounds)['bare']]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([
                sys.executable, HERE.parent / 'train_scripts' / 'train_ekd.py', '--model', name, '-b', str(count),
                '--epochs', '3', '--img-size', str(size), '-j', '12' if GPU else '0', '--output', folder,
                '--mixed-precision', 'bf16' if PRECISION is torch.bfloat16 else 'no',
            ], check=True, capture_output=True)
            lines = Path(folder, 'metrics.jsonl').read_text().splitlines()
            rates += [json.loads(line)['images_per_second'] for line in lines[1:]]  # the first epoch starts the workers
    ratio = statistics.median(rates) / statistics.median(bare_rates)
    yield exact('train_ekd.py, images/s against the bare step', f'{name}, {size} px, batch {count}', ratio,
                0.95 if GPU else None, images_per_second={'train_ekd.py': rates, 'bare': bare_rates})


def measure_ceilings(args):
    """What the chip reaches in a multiplication of matrices and in a copy, and what of that a training step reaches."""
    side = 8192 if GPU else 2048
    a = torch.randn(side, side, device=DEVICE, dtype=PRECISION)
    memory = torch.randn(2 ** (30 if GPU else 26), device=DEVICE, dtype=PRECISION)
    target_memory = torch.empty_like(memory)
    seconds = compare({'matmul': lambda: a @ a, 'copy': lambda: target_memory.copy_(memory)}, args.rounds, inner=5)
    peak = 2 * side ** 3 / statistics.median(seconds['matmul'])
    bandwidth = 2 * memory.nbytes / statistics.median(seconds['copy'])
    size, count = max(STEP_BATCH.items())
    images, target = batch(size, count)
    model = create('ddnn_resnet50').train()
    task, full = timm_ddnn.EKDTask(model, verbose=False), model.extract(50).train()
    for name, step in {'EKD': ekd_step(task, images, target), 'resnet50': plain_step(full, images, target)}.items():
        flops, moved = 2 * count_macs(step), MovedBytes.count(step)
        median = statistics.median(compare({'step': step}, args.rounds)['step'])
        case = f'{name} step, {size} px, batch {count}, eager'
        ceilings = {'flops_per_second': peak, 'bytes_per_second': bandwidth}
        yield exact('arithmetic per second, of a matrix multiplication', case, flops / median / peak, **ceilings)
        yield exact('bytes of all operators per second, of a copy', case, moved / median / bandwidth, **ceilings)


class MovedBytes(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the bytes that operators read and write, views left out."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.total += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return result

    @classmethod
    def count(cls, step):
        with cls() as mode:
            step()
        return mode.total


SECTIONS = {
    'size': measure_size, 'loss': measure_loss, 'step': measure_step, 'memory': measure_memory,
    'training': measure_training, 'script': measure_script, 'ceilings': measure_ceilings,
    'switching': measure_switching, 'latency': measure_latency, 'families': measure_families,
}


def table(result):
    """Lay out a result as Markdown, headed by the machine."""
    lines = []
    for machine in dict.fromkeys(section['machine'] for section in result.values()):
        names = [name for name, section in result.items() if section['machine'] == machine]
        lines += [
            f'{", ".join(names)}: {machine}.', '',
            '| figure | case | ratio | aim | middle half | rounds |', '|---|---|---|---|---|---|',
        ]
        for r in itertools.chain.from_iterable(result[name]['figures'] for name in names):
            spread = '{:.3f} to {:.3f}'.format(*r['spread']) if 'spread' in r else ''
            aim = '' if r['aim'] is None else f'{r["aim"]:.2f}'
            cells = r['figure'], r['case'], f'{r["ratio"]:.3f}', aim, spread, str(r.get('rounds', ''))
            lines.append(f'| {" | ".join(cells)} |')
        lines.append('')
    return '\n'.join(lines)


def free_memory():
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def name_machine():
    about = describe_machine()
    chip = ', '.join(about['hardware']['gpus']) or f'{torch.get_num_threads()} threads of {about["hardware"]["cpu"]}'
    commit = (about['git'] or {}).get('commit', 'unknown')[:12]
    versions = ', '.join(f'{name} {about["versions"][name]}' for name in ('python', 'torch', 'timm'))
    return f'{chip}; {str(PRECISION).removeprefix("torch.")}; {versions}; commit {commit}'


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', choices=SECTIONS, metavar='FIGURE', help=f'of {", ".join(SECTIONS)}')
    parser.add_argument('--rounds', type=number(int, 3), default=20 if GPU else 9, help='rounds per figure')
    parser.add_argument('--no-compiled', dest='compiled', action='store_false', help='leave out torch.compile')
    args = parser.parse_args()
    path, readme = HERE / 'results' / f'{DEVICE.type}.json', HERE / 'README.md'
    path.parent.mkdir(exist_ok=True)
    for name in args.only or SECTIONS:
        section = {'machine': name_machine(), 'figures': []}
        free_memory()
        for figure in SECTIONS[name](args):
            section['figures'].append(figure)
            print(f'{figure["figure"]}: {figure["case"]}: {figure["ratio"]:.3f} (aim {figure["aim"]})', flush=True)
        # After each section, so that a run that is cut short leaves what it has, and --only goes on
        result = {**(json.loads(path.read_text()) if path.exists() else {}), name: section}
        result = {name: result[name] for name in SECTIONS if name in result}
        write_json(path, result)
        write_section(readme, DEVICE.type, table(result))


if __name__ == '__main__':
    main()
