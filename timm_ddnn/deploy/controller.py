"""Adapter that moves the depth of a running program, such that latency keeps a budget under a changing load.

It does not know models: a program asks it for a depth and reports latencies.
"""
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..utils.errors import InputError
from ..utils.schema import brief, integer, judge, number
from .choose import percentile_90

__all__ = ['DepthController']


_POSITIVE, _COUNT = number(above=0), integer(1)

class DepthController:
    """Moves the depth such that latency stays within a budget under a changing load.

        from timm_ddnn.deploy.choose import profile_rows, read_profile

        profile = read_profile('output/profile/profile.json')
        rows = profile_rows(profile, runtime='eager', batch_size=1, threads=1)
        controller = timm_ddnn.DepthController({row['depth']: row['median_ms'] for row in rows}, budget_ms=50)
        for x in images:
            with controller.measure() as depth:
                logits = model(x, depth=depth)

    The rolling latency is the 90th percentile of the last `window` calls at the present depth; a move begins a new
    window, and nothing is decided until it is full.

    - Down: when the rolling latency exceeds the budget, to the deepest depth whose predicted latency does not, or to
      the shallowest.
    - Up, to the next depth: when its predicted latency was at most `headroom` times the budget in `patience` calls in
      a row. If that depth then exceeds the budget before as many calls, twice as many are asked for the next time, up
      to 32 times `patience`; where it lasted, the patience is the first again.

    The predicted latency of another depth is the rolling latency, which has the present load in it, times the ratio of
    the two costs. So a load that is constant up to a factor of 1 / headroom causes no move up and down. Nothing but
    the recorded latencies enters a decision, so that equal latencies give equal depths.

    Where calls wait in a queue, `choose` looks ahead instead: it is told the time that each of them has left.

    Threads may share a controller. A call that began before a move does not count for the depth after it.
    """

    def __init__(
            self,
            costs: Mapping[int, float],
            budget_ms: float,
            *,
            window: int = 50,
            headroom: float = 0.8,
            patience: int = 100,
    ) -> None:
        """Begin at the deepest depth.

        Args:
            costs: Cost of every depth, of which only the ratios count: median latencies from `profile_rows`, or MACs.
            budget_ms: Latency that 9 of 10 calls are to keep, in milliseconds.
            window: Calls that the rolling latency is taken over. The percentile passes over a tenth of them.
            headroom: Part of the budget that a deeper net must be predicted to keep, in (0, 1].
            patience: Calls in a row for which it must be predicted to.

        Raises:
            InputError: If an argument is out of its range.
        """
        if not (isinstance(costs, Mapping) and costs):
            raise InputError(f'costs must be a mapping from depths to numbers, got {brief(costs)}')
        for depth, cost in costs.items():
            judge(depth, _COUNT, 'depth in costs')
            judge(cost, _POSITIVE, f'cost of depth {depth}')
        judge(budget_ms, _POSITIVE, 'budget_ms')
        judge(headroom, number(above=0, high=1), 'headroom')
        judge(window, _COUNT, 'window')
        judge(patience, _COUNT, 'patience')
        costs = dict(sorted(costs.items(), reverse=True))
        self.depths = tuple(costs)
        self.budget_ms = budget_ms
        self._costs = costs
        self._headroom = headroom
        self._patience = patience
        self._lock = threading.Lock()
        self._latencies: deque[float] = deque(maxlen=window)
        self._ratios: deque[float] = deque(maxlen=window)  # of latency and cost, at any depth
        self._depth = self.depths[0]
        self._calm = 0  # calls in a row for which the next deeper net was predicted to fit
        self._failures = dict.fromkeys(costs, 0)  # moves up to a depth that did not last, since the last that did
        self._since_up: int | None = None  # calls since the last move, if it was one up and may still fail

    @property
    def depth(self) -> int:
        """The present depth."""
        with self._lock:
            return self._depth

    @property
    def latency_ms(self) -> float | None:
        """Rolling latency at the present depth, None until its window is full."""
        with self._lock:
            return self._rolling()

    @contextmanager
    def measure(self) -> Iterator[int]:
        """Give the present depth and record the time that the body takes, unless it raises.

        On a GPU the body must wait for the result, for example by `logits.cpu()`.
        """
        depth = self.depth
        start = time.perf_counter()
        yield depth
        self.record(1000 * (time.perf_counter() - start), depth)

    def choose(self, remaining_ms: Sequence[float]) -> int:
        """Choose a depth for a queue: the deepest at which all calls are predicted to end in time, or the shallowest.

        The predicted latency of a depth is its cost times the 90th percentile of latency over cost in the last `window`
        calls; before the first call it is the cost itself, in milliseconds. `headroom` is the part of the remaining
        time that may be used.

        Args:
            remaining_ms: Milliseconds that each call has left, in the order in which they will run, one after another.
        """
        with self._lock:
            ratio = percentile_90(self._ratios) if self._ratios else 1.0
        for depth in self.depths[:-1]:
            latency = ratio * self._costs[depth]
            if all(place * latency <= self._headroom * left for place, left in enumerate(remaining_ms, 1)):
                return depth
        return self.depths[-1]

    def record(self, latency_ms: float, depth: int | None = None) -> int:
        """Take note of a call, and move the depth if it is time to.

        Args:
            latency_ms: Time of the call in milliseconds.
            depth: Depth of the call, the present one if None. A call at another than the present depth counts for
                `choose` alone.

        Returns:
            The depth of the next call.

        Raises:
            InputError: If there is no such depth, or the latency is negative or not finite.
        """
        judge(latency_ms, number(0), 'latency_ms')
        if depth is not None and depth not in self._costs:
            raise InputError(f'depth must be one of {self.depths}, got {brief(depth)}')
        with self._lock:
            self._ratios.append(latency_ms / self._costs[self._depth if depth is None else depth])
            if depth in (None, self._depth):
                self._latencies.append(latency_ms)
                if self._since_up is not None:
                    self._since_up += 1
                    if self._since_up >= self._patience_for(self._depth):  # it lasted
                        self._failures[self._depth], self._since_up = 0, None
                self._decide()
            return self._depth

    def _rolling(self) -> float | None:
        full = len(self._latencies) == self._latencies.maxlen
        return percentile_90(self._latencies) if full else None

    def _decide(self) -> None:
        rolling = self._rolling()
        if rolling is None:
            return
        predicted = {d: rolling * cost / self._costs[self._depth] for d, cost in self._costs.items()}
        position = self.depths.index(self._depth)
        if rolling > self.budget_ms:
            shallower = self.depths[position + 1:]
            if shallower:
                if self._since_up is not None:
                    self._failures[self._depth] = min(self._failures[self._depth] + 1, 5)
                self._move(next((d for d in shallower if predicted[d] <= self.budget_ms), shallower[-1]))
        elif position and predicted[deeper := self.depths[position - 1]] <= self._headroom * self.budget_ms:
            self._calm += 1
            if self._calm >= self._patience_for(deeper):
                self._move(deeper)
                self._since_up = 0
            return
        self._calm = 0

    def _patience_for(self, depth: int) -> int:
        return self._patience * 2 ** self._failures[depth]

    def _move(self, depth: int) -> None:
        self._depth = depth
        self._latencies.clear()
        self._calm = 0
        self._since_up = None
