"""Signals that ask a training run to stop."""
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ['EXIT_STOPPED', 'StopRequest', 'stop_signals']


# sysexits.h: EX_TEMPFAIL, the same command may be tried again
EXIT_STOPPED = 75


class StopRequest:
    """Whether a signal has asked the run to stop: `signal` is its name, or None."""

    def __init__(self) -> None:
        """Begin without a signal."""
        self.signal: str | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT in the place of ending the program; a second SIGINT ends it at once."""
    request = StopRequest()

    def note(number: int, frame: Any) -> None:
        if request.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = signal.Signals(number).name

    handlers = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
