"""Requests to stop, from a terminal or a scheduler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """The first stop signal this process got, or None. All ranks hear of it through the step's control collective."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: whoever is at the terminal does not want to wait
        if self.signal is None:
            self.signal = signal.Signals(number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Turn Ctrl-C, SIGTERM, SIGUSR1 and a lost terminal into a request that the loop answers at the end of its step."""
    request = StopRequest()
    wanted = [number for number in STOP_SIGNALS if not _is_nohup(number)]
    before = {number: signal.signal(number, request) for number in wanted}
    try:
        yield request
    finally:
        for number, handler in before.items():
            # One who asks twice must not end a process that has saved and is about to say so.
            signal.signal(number, signal.SIG_IGN if request.signal else handler)


def _is_nohup(number: signal.Signals) -> bool:
    """Whether the run was started to outlive its terminal (nohup, setsid)."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN
