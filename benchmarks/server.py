#!/usr/bin/env python3
"""Replay a load on examples/server.py that rises beyond what the full-net can serve and falls again.

    python benchmarks/server.py ddnn_resnet56-int8.onnx --data FOLDER

The same requests, at the same moments, go to three servers in turn: with the depth that the load allows, with the
full-net alone and with the shallowest net alone. A request is a batch of images; it is in time if its answer is back
within the budget, `--budget` times what the full-net takes for a request. It writes server.json, server.csv (a row for
each request) and server.png, and the table of the replay in README.md unless `--output` is another folder.
"""
import asyncio
import csv
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import matplotlib.pyplot as plt
import numpy as np

from timm_ddnn.data.datasets import load_image_data
from timm_ddnn.deploy.profile_file import read_metadata
from timm_ddnn.utils.environment import describe_machine
from timm_ddnn.utils.files import staged_folder, write_json, write_section
from timm_ddnn_cli.arguments import ArgumentParser, number, run

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results'
FIGURES = {'late': 2, 'top1': 2, 'median_ms': 0, 'p99_ms': 0}  # of the table, with digits
TIMES = 0, 0.15, 0.4, 0.65, 0.85, 1  # parts of the replay, at which the load is low, low, high, high, low, low


class Served:
    """The server in a process of its own, until the block ends."""

    def __init__(self, path, budget_ms, depth, port):
        self.url = f'http://127.0.0.1:{port}'
        command = [sys.executable, HERE.parent / 'examples/server.py', path, '--budget-ms', budget_ms, '--port', port]
        self.command = [*map(str, command), *(['--depth', str(depth)] if depth else [])]

    def __enter__(self):
        self.process = subprocess.Popen(self.command)
        for _ in range(600):
            try:
                httpx.get(self.url)
                return self.url
            except httpx.TransportError:
                if self.process.poll() is not None:
                    raise RuntimeError(f'the server ended with status {self.process.returncode}') from None
                time.sleep(0.1)
        raise RuntimeError('the server does not answer')

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def load_requests(data, count, size, shape):
    """Bodies of requests and their labels, at most 64 of them, which are used again and again."""
    validation = load_image_data(data, training=False)
    rows = validation.validation.select(range(min(len(validation.validation), 64 * size)))
    channels, height, width = shape
    pixels = np.stack([
        np.asarray(image.convert('L' if channels == 1 else 'RGB').resize((width, height)))
        for image in rows[validation.input_key]]).reshape(-1, height, width, channels)
    labels, bodies = np.array(rows[validation.target_key]), []
    for start in range(0, len(pixels) - size + 1, size):
        body = io.BytesIO()
        np.save(body, pixels[start:start + size])
        bodies.append((body.getvalue(), labels[start:start + size]))
    return [bodies[i % len(bodies)] for i in range(count)]


def draw_arrivals(seconds, rates, seed=0):
    """Moments of requests, in seconds: a Poisson process whose rate is given at TIMES."""
    generator, moments, now = np.random.default_rng(seed), [], 0.0
    while True:
        now += generator.exponential(1 / max(rates))
        if now >= seconds:
            return moments
        if generator.random() < np.interp(now / seconds, TIMES, rates) / max(rates):
            moments.append(now)


def measure_service(url, request, times=15):
    """Median seconds of a request that nothing else waits with."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        httpx.post(f'{url}/classify', content=request[0], timeout=60).raise_for_status()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


async def replay(url, moments, requests):
    """Send every request at its moment, whether those before are answered or not; -> rows."""
    async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        begin = time.perf_counter()

        async def send(moment, body, labels):
            await asyncio.sleep(max(0, begin + moment - time.perf_counter()))
            start = time.perf_counter()
            answer = (await client.post(f'{url}/classify', content=body)).raise_for_status().json()
            return {
                'moment': moment,
                'latency_ms': 1000 * (time.perf_counter() - start),
                'depth': answer['depth'],
                'top1': 100 * float(np.mean(np.array(answer['classes']) == labels)),
            }
        return await asyncio.gather(*(
            send(moment, *request) for moment, request in zip(moments, requests, strict=True)))


def summarize(rows, budget_ms):
    latencies = [row['latency_ms'] for row in rows]
    return {
        'requests': len(rows),
        'late': 100 * float(np.mean(np.array(latencies) > budget_ms)),
        'top1': statistics.mean(row['top1'] for row in rows),
        'median_ms': statistics.median(latencies),
        'p99_ms': float(np.percentile(latencies, 99)),
        'depths': {str(d): sum(row['depth'] == d for row in rows) for d in sorted({row['depth'] for row in rows})},
    }


def table(result):
    """The picture of a replay, and what became of each server."""
    versions = ', '.join(f'{name} {result["versions"][name]}' for name in ('python', 'onnxruntime'))
    lines = [
        f'![Load, latency, depth and accuracy of three servers over {result["seconds"]:g} seconds](results/server.png)',
        '',
        f'{result["title"]}; {result["hardware"]["cpu"]}; {versions}.',
        '',
        '| server | late (%) | mean top-1 (%) | median (ms) | 99th percentile (ms) | requests at each depth |',
        '|---|---|---|---|---|---|',
    ]
    for name, server in result['servers'].items():
        figures = ' | '.join(f'{server[key]:.{digits}f}' for key, digits in FIGURES.items())
        depths = ', '.join(f'{depth}: {count}' for depth, count in reversed(server['depths'].items()))
        lines.append(f'| {name} | {figures} | {depths} |')
    return '\n'.join(lines) + '\n'


def write_csv(path, replays):
    """A row for every request."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['server', *replays['controller'][0]])
        writer.writerows(
            [name, *(round(value, 4) for value in row.values())] for name, rows in replays.items() for row in rows)


def draw(path, result, replays):
    figure, panels = plt.subplots(4, 1, figsize=(8, 9), sharex=True, layout='constrained')
    panels[0].plot([result['seconds'] * t for t in TIMES], result['rates'], color='black')
    panels[0].axhline(result['capacity'], color='grey', linestyle=':')
    panels[0].set(ylabel='requests per second', title=result['title'])
    for i, (name, rows) in enumerate(replays.items()):
        style = dict(color=f'C{i}', label=name)
        moments = np.array([row['moment'] for row in rows])
        panels[1].plot(moments, [row['latency_ms'] for row in rows], '.', markersize=3, **style)
        bins = np.linspace(0, result['seconds'], 25)
        centres, place = (bins[1:] + bins[:-1]) / 2, np.digitize(moments, bins)
        for panel, key in ((panels[2], 'depth'), (panels[3], 'top1')):
            values = np.array([row[key] for row in rows])
            means = [values[place == b].mean() if (place == b).any() else np.nan for b in range(1, len(bins))]
            panel.plot(centres, means, **style)
    panels[1].axhline(result['budget_ms'], color='grey', linestyle=':')
    panels[1].set(ylabel='latency (ms)', yscale='log')
    panels[2].set(ylabel='mean depth')
    panels[3].set(ylabel='top-1 (%)', xlabel='seconds')
    panels[3].legend(fontsize='small')
    figure.savefig(path, dpi=100, format='png')


def main():
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('file', help='ONNX file of several depths')
    parser.add_argument('--data', required=True, help='data set whose validation images are sent')
    parser.add_argument('--images', type=number(int, 1), default=32, help='images of a request')
    parser.add_argument('--budget', type=number(float, 1), default=6, help="budget, in times of the full-net's request")
    parser.add_argument('--low', type=number(float, 0), default=0.4, help='load at first, of what the full-net serves')
    parser.add_argument('--high', type=number(float, 0), default=1.6, help='load at its highest, likewise')
    parser.add_argument('--seconds', type=number(float, 1), default=90, help='length of the replay')
    parser.add_argument('--port', type=number(int, 1, 65535), default=8123)
    parser.add_argument('--output', type=Path, default=RESULTS)
    args = parser.parse_args()
    metadata = read_metadata(args.file)
    depths = [row['depth'] for row in metadata['depths']]
    request, = load_requests(args.data, 1, args.images, metadata['input_size'])
    with Served(args.file, 1000, depths[0], args.port) as url:
        service = measure_service(url, request)
    budget_ms, capacity = 1000 * args.budget * service, 1 / service
    low, high = args.low * capacity, args.high * capacity
    rates = [low, low, high, high, low, low]
    moments = draw_arrivals(args.seconds, rates)
    requests = load_requests(args.data, len(moments), args.images, metadata['input_size'])
    result = {
        'title': f'{Path(args.file).name}, requests of {args.images} images, budget {budget_ms:.0f} ms',
        'file': Path(args.file).name, 'images': args.images, 'seconds': args.seconds, 'budget_ms': budget_ms,
        'capacity': capacity, 'rates': rates, 'servers': {}, **describe_machine(),
    }
    replays = {}
    for name, depth in (('controller', None), (f'depth {depths[0]}', depths[0]), (f'depth {depths[-1]}', depths[-1])):
        with Served(args.file, budget_ms, depth, args.port) as url:
            measure_service(url, request)
            replays[name] = asyncio.run(replay(url, moments, requests))
        result['servers'][name] = summarize(replays[name], budget_ms)
        print(f'{name}: {json.dumps(result["servers"][name])}', flush=True)
    with staged_folder(args.output) as folder:
        write_json(folder / 'server.json', result)
        write_csv(folder / 'server.csv', replays)
        draw(folder / 'server.png', result, replays)
    if args.output == RESULTS:
        write_section(HERE / 'README.md', 'server', table(result))


if __name__ == '__main__':
    run(main)
