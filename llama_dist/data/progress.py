"""How far `prepare` is, in a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from llama_dist.data.describe import format_bytes
from llama_dist.data.units import Unit
from llama_dist.data.words import counted
from llama_dist.data.workers import Progress


class SpokenProgress(Progress):
    """A line every `seconds`: units that are done, the rate of this node, and the time left.

    Units of other nodes count as done when this process sees them. `each_unit` is called after each unit and gives
    the numbers of all that are done.
    """

    each_unit: Callable[[], set[int]]

    def __init__(self, say: Callable[[str], None], seconds: float, units: list[Unit]) -> None:
        self._say, self._seconds = say, seconds
        self._units = units
        self._done: set[int] = set()
        self._text = 0
        self._started_at = self._said_at = time.monotonic()
        self._bytes_at_start: int | None = None

    def text(self, size: int) -> None:
        self._text += size

    def unit(self, unit: Unit) -> None:
        self._done.add(unit.number)
        self._done |= self.each_unit()

    def finished(self, numbers: set[int]) -> None:
        """These are done, by whomever."""
        self._done |= numbers
        if self._bytes_at_start is None:
            self._bytes_at_start = self._bytes()
            if self._done:
                units, verb = counted(len(self._units), "unit"), "was" if len(self._done) == 1 else "were"
                self._say(f"{len(self._done):,} of {units} of the work {verb} done before")

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._said_at < self._seconds:
            return
        self._said_at = now
        elapsed = now - self._started_at
        line = f"{len(self._done):,} of {counted(len(self._units), 'unit')}, {format_bytes(self._text)} of text here"
        line += f" at {self._text / elapsed / 1e6:.1f} MB/s"
        new = self._bytes() - (self._bytes_at_start or 0)
        if new and len(self._done) < len(self._units):
            left = sum(unit.bytes for unit in self._units) - self._bytes()
            line += f", about {format_seconds(left * elapsed / new)} left"
        self._say(line)

    def waiting(self, units: int) -> None:
        """All that is left is with other processes."""
        if time.monotonic() - self._said_at >= self._seconds:
            self._said_at = time.monotonic()
            self._say(f"waiting for the last {counted(units, 'unit')}, on which other processes work")

    def _bytes(self) -> int:
        return sum(self._units[number].bytes for number in self._done)


def format_seconds(seconds: float) -> str:
    """A stretch of time for people: 40 s, 12 min, 3 h 20 min, 4 days 3 h."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{round(seconds)} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"
