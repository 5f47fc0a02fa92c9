#!/usr/bin/env python3
"""Serve one ONNX file of several depths over HTTP; the depth follows the load, so that answers keep a budget of time.

    pip install fastapi uvicorn 'onnxruntime>=1.29'
    python examples/server.py ddnn_resnet56-int8.onnx --budget-ms 300           # the deepest net that the queue allows
    python examples/server.py ddnn_resnet56-int8.onnx --budget-ms 300 --depth 56    # fixed, to compare

    POST /classify    images as a .npy file, uint8 [N, H, W, C], of the size of the net
                      -> {"classes": [3, 8], "names": ["cat", "ship"], "depth": 20, "milliseconds": 41.2}
    GET /             what the file says of itself

One thread runs one request at a time. Before each it asks the controller for the deepest net at which every request
that waits is predicted to be answered in time.
"""
import asyncio
import io
import os
import threading
import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Request

from timm_ddnn import DepthController
from timm_ddnn.deploy.profile_file import read_metadata
from timm_ddnn.utils.errors import InputError
from timm_ddnn_cli.arguments import ArgumentParser, number, run


class Job(NamedTuple):
    """A request that waits: its images [N, C, H, W], when it came, and where its answer goes."""
    images: np.ndarray
    arrival: float
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future


class Server:
    """A session of onnxruntime and the requests that wait for it."""

    def __init__(self, path: str, budget_ms: float, depth: int | None = None, threads: int = 1) -> None:
        """Open the file and start the thread that runs it, at one depth if it is given."""
        about = self.about = read_metadata(path)
        if 'depth' in about:
            raise InputError(f'{path} must be a file of several depths, got one of depth {about["depth"]}')
        depths = [row['depth'] for row in about['depths']]
        if depth not in (None, *depths):
            raise InputError(f'depth must be of {depths}, got {depth}')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        self.mean, self.std = (np.array(about[key], np.float32) for key in ('mean', 'std'))
        self.names = about.get('label_names') or [f'class {i}' for i in range(about['num_classes'])]
        self.budget_ms, self.depth = budget_ms, depth
        self.controller = DepthController(self._measure_costs(), budget_ms)
        self.jobs: deque[Job] = deque()
        self.arrived = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def _run(self, images: np.ndarray, depth: int) -> np.ndarray:
        return self.session.run(None, {'images': images, 'depth': np.array(depth, np.int64)})[0]

    def _measure_costs(self) -> dict[int, float]:
        """Find the median milliseconds of an image at every depth, whose ratios the controller goes by."""
        image, costs = np.zeros((1, *self.about['input_size']), np.float32), {}
        for row in self.about['depths']:
            times = []
            for _ in range(10):
                start = time.perf_counter()
                self._run(image, row['depth'])
                times.append(1000 * (time.perf_counter() - start))
            costs[row['depth']] = sorted(times)[5]
        return costs

    async def classify(self, pixels: np.ndarray) -> dict[str, Any]:
        """Wait for the answer to images, uint8 [N, H, W, C]."""
        images = ((pixels / np.float32(255) - self.mean) / self.std).transpose(0, 3, 1, 2)
        loop = asyncio.get_running_loop()
        job = Job(np.ascontiguousarray(images), time.perf_counter(), loop, loop.create_future())
        with self.arrived:
            self.jobs.append(job)
            self.arrived.notify()
        return await job.answer

    def _work(self) -> None:
        while True:
            with self.arrived:
                self.arrived.wait_for(lambda: self.jobs)
                start = time.perf_counter()
                remaining = [self.budget_ms - 1000 * (start - job.arrival) for job in self.jobs]
                job = self.jobs.popleft()
            depth = self.controller.choose(remaining) if self.depth is None else self.depth
            classes = self._run(job.images, depth).argmax(1).tolist()
            milliseconds = 1000 * (time.perf_counter() - start)
            self.controller.record(milliseconds, depth)
            answer = {
                'classes': classes, 'names': [self.names[i] for i in classes], 'depth': depth,
                'milliseconds': milliseconds,
            }
            job.loop.call_soon_threadsafe(lambda job=job, answer=answer: job.answer.cancelled() or
                                          job.answer.set_result(answer))


def create_app(server: Server) -> FastAPI:
    """Make the routes."""
    app = FastAPI(title='timm_ddnn')

    @app.get('/')
    def about() -> dict[str, Any]:
        return server.about

    @app.post('/classify')
    async def classify(request: Request) -> dict[str, Any]:
        channels, height, width = server.about['input_size']
        try:
            pixels = np.load(io.BytesIO(await request.body()), allow_pickle=False)
        except (ValueError, OSError, EOFError) as e:
            raise HTTPException(422, f'the body must be a .npy file: {e}') from e
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (height, width, channels) or not len(pixels):
            raise HTTPException(
                422, f'images must be uint8 [N, {height}, {width}, {channels}], got {pixels.dtype} {[*pixels.shape]}')
        return await server.classify(pixels)

    return app


def main() -> None:
    """Serve until interrupted."""
    parser = ArgumentParser(__doc__.splitlines()[0])
    parser.add_argument('model', help='ONNX file of several depths, by `timm-ddnn export --depth all --format onnx`')
    parser.add_argument('--budget-ms', type=number(float, 0.001), required=True,
                        help='milliseconds from a request to its answer')
    parser.add_argument('--depth', type=int, help='fixed depth, that of the load if not given')
    parser.add_argument('--threads', type=number(int, 1, os.cpu_count()), default=1, help='threads of onnxruntime')
    parser.add_argument('--port', type=number(int, 1, 65535), default=8000)
    args = parser.parse_args()
    app = create_app(Server(args.model, args.budget_ms, args.depth, args.threads))
    uvicorn.run(app, host='127.0.0.1', port=args.port, log_level='warning')


if __name__ == '__main__':
    run(main)
