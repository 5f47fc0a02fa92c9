#!/usr/bin/env python3
"""Classify images on a device, from one ONNX file of several depths: numpy, Pillow and onnxruntime are all it needs.

    timm-ddnn export RUN --depth all --format onnx --int8 --data FOLDER     # on the machine that has the model
    python device.py ddnn_resnet50-int8.onnx PHOTO.jpg [PHOTO.jpg ...]      # on the device: the deepest net
    python device.py ddnn_resnet50-int8.onnx PHOTO.jpg --depth 14
    python device.py ddnn_resnet50-int8.onnx *.jpg --budget-ms 20           # the depth keeps the time of an image

Copy this file and the model: it imports nothing of the library.
"""
import argparse
import json
import math
import os
import sys
import time
from collections import deque

import numpy as np
import onnxruntime
import PIL.Image
import PIL.ImageOps


class Classifier:
    """A file that `timm-ddnn export --depth all --format onnx` wrote."""

    def __init__(self, path: str, threads: int = 1) -> None:
        """Open the file, and read from its metadata how images are prepared."""
        if tuple(map(int, onnxruntime.__version__.split('.')[:2])) < (1, 29):  # its convolutions in int8 are wrong then
            raise ValueError(f'onnxruntime must be 1.29 or later, got {onnxruntime.__version__}')
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        about = self.session.get_modelmeta().custom_metadata_map
        try:
            self.macs = {row['depth']: row['macs'] for row in json.loads(about['depths'])}  # the deepest first
            if not self.macs:
                raise ValueError('no depths')
            self.channels, self.height, self.width = json.loads(about['input_size'])
            self.mean, self.std = (np.array(json.loads(about[key]), np.float32) for key in ('mean', 'std'))
            self.crop_pct = json.loads(about['crop_pct'])
            self.resampling = PIL.Image.Resampling[about['interpolation'].upper()]
            self.names = json.loads(about.get('label_names', '[]')) or [
                f'class {i}' for i in range(json.loads(about['num_classes']))]
        except (LookupError, TypeError, ValueError, RecursionError) as e:
            raise ValueError(
                f'{path} must be a file of several depths by `timm-ddnn export --depth all --format onnx`') from e

    def prepare(self, image: PIL.Image.Image) -> np.ndarray:
        """Scale the shorter side, crop the centre, normalize; -> [1, C, H, W]."""
        image = PIL.ImageOps.exif_transpose(image).convert('L' if self.channels == 1 else 'RGB')
        shorter = int(self.height / self.crop_pct)
        image = image.resize([int(shorter * side / min(image.size)) for side in image.size], self.resampling)
        left, top = round((image.width - self.width) / 2), round((image.height - self.height) / 2)
        pixels = np.asarray(image.crop((left, top, left + self.width, top + self.height)), np.float32)
        values = (pixels.reshape(self.height, self.width, self.channels) / 255 - self.mean) / self.std
        return values.transpose(2, 0, 1)[None].astype(np.float32)

    def __call__(self, images: np.ndarray, depth: int) -> np.ndarray:
        """Compute the probabilities, [N, classes], of prepared images at a depth."""
        logits, = self.session.run(None, {'images': images, 'depth': np.array(depth, np.int64)})
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        return exponentials / exponentials.sum(1, keepdims=True)


class Controller:
    """Moves the depth such that 9 of 10 calls keep a budget of time, by the rules of `timm_ddnn.DepthController`.

    Down when the 90th percentile of the last `window` calls exceeds the budget, to the deepest depth that is predicted
    to keep it. Up by one when that was predicted to take at most `headroom` of the budget in `patience` calls in a row;
    twice as patient, up to 32 times, where a move up did not last.
    """

    def __init__(
            self,
            costs: dict[int, float],
            budget_ms: float,
            window: int = 50,
            headroom: float = 0.8,
            patience: int = 100,
    ) -> None:
        """Begin at the deepest of the depths, of whose costs the ratios count."""
        self.costs, self.budget_ms, self.headroom, self.patience = costs, budget_ms, headroom, patience
        self.depths = sorted(costs, reverse=True)
        self.depth = self.depths[0]
        self.latencies = deque(maxlen=window)
        self.calm, self.failures, self.since_up = 0, dict.fromkeys(costs, 0), None

    def record(self, latency_ms: float) -> None:
        """Take note of a call at the present depth, and move if it is time to."""
        self.latencies.append(latency_ms)
        if self.since_up is not None:
            self.since_up += 1
            if self.since_up >= self.patience * 2 ** self.failures[self.depth]:
                self.failures[self.depth], self.since_up = 0, None
        if len(self.latencies) < self.latencies.maxlen:
            return
        rolling = sorted(self.latencies)[math.ceil(0.9 * len(self.latencies)) - 1]
        place = self.depths.index(self.depth)
        shallower, deeper = self.depths[place + 1:], self.depths[place - 1] if place else None

        def predict(depth: int) -> float:
            return rolling * self.costs[depth] / self.costs[self.depth]

        if rolling > self.budget_ms:
            if shallower:
                if self.since_up is not None:
                    self.failures[self.depth] = min(self.failures[self.depth] + 1, 5)
                self._move(next((d for d in shallower if predict(d) <= self.budget_ms), shallower[-1]))
            self.calm = 0
        elif deeper and predict(deeper) <= self.headroom * self.budget_ms:
            self.calm += 1
            if self.calm >= self.patience * 2 ** self.failures[deeper]:
                self._move(deeper)
                self.since_up = 0
        else:
            self.calm = 0

    def _move(self, depth: int) -> None:
        self.depth, self.calm, self.since_up = depth, 0, None
        self.latencies.clear()


def positive(text: str) -> float:
    """Read a number above 0 from the command line."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def main() -> None:
    """Classify the images of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog='\n'.join(__doc__.splitlines()[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='ONNX file of several depths')
    parser.add_argument('images', nargs='+', help='photographs')
    parser.add_argument('--depth', type=int, help='the deepest net that is not deeper runs; the deepest if not given')
    parser.add_argument('--budget-ms', type=positive, default=math.inf,
                        help='move the depth to keep this time of an image, in milliseconds')
    parser.add_argument('--threads', type=int, choices=range(1, 1 + (os.cpu_count() or 1)), default=1)
    args = parser.parse_args()
    try:
        classifier = Classifier(args.model, args.threads)
        fixed = args.depth is not None and max(
            (d for d in classifier.macs if d <= args.depth), default=min(classifier.macs))
        controller = Controller(classifier.macs, args.budget_ms, window=10, patience=20)
        for path in args.images:
            with PIL.Image.open(path) as photograph:
                images = classifier.prepare(photograph)
            depth = fixed or controller.depth
            start = time.perf_counter()
            probabilities, = classifier(images, depth)
            milliseconds = 1000 * (time.perf_counter() - start)
            controller.record(milliseconds)
            best = probabilities.argmax()
            print(f'{path}: {classifier.names[best]} {100 * probabilities[best]:.1f} %, '
                  f'depth {depth}, {milliseconds:.1f} ms')
    except (OSError, ValueError, SyntaxError) as e:  # Pillow raises SyntaxError for some files that are not images
        print(f'error: {e}', file=sys.stderr)
        sys.exit(2)
    except Exception as e:  # those of onnxruntime have no class in common
        if not type(e).__module__.startswith('onnxruntime'):
            raise
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
