"""Signals that ask a training run to stop."""
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import gather_object

__all__ = ['EXIT_STOPPED', 'STOP_INTERVAL', 'StopRequest', 'stop_signals']


# sysexits.h: EX_TEMPFAIL, the same command may be tried again
EXIT_STOPPED = 75
# Steps between two times that several processes ask each other
STOP_INTERVAL = 10


class StopRequest:
    """Whether a signal has asked the run to stop.

    Attributes:
        signal: Name of the signal that this process got, None if it got none.
        agreed: Name of the signal that any process had got when they last agreed, None if none had.
    """

    def __init__(self) -> None:
        """Begin without a signal."""
        self.signal: str | None = None
        self.agreed: str | None = None

    def agree(self) -> None:
        """Let all processes know of a signal that one of them got; to be called by all of them."""
        self.agreed = self.agreed or next(filter(None, gather_object([self.signal])), None)


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
