"""Numbers that would do, for messages about one that does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Check(NamedTuple):
    """A generator of problems and the settings (dotted) that it takes; the first is where the problem is shown."""

    settings: tuple[str, ...]
    problems: Callable[..., Iterator[str]]


def divisors(number: int) -> list[int]:
    """In ascending order. Of a number above 10**12, those that have a side below 10**6: no message is worth a wait."""
    small = [d for d in range(1, min(math.isqrt(number), 10**6) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def choice(numbers: list[int], near: int) -> str:
    """`{1, 2, 4}`: at most the eight numbers that are nearest."""
    return "{" + ", ".join(map(str, sorted(sorted(numbers, key=lambda n: abs(n - near))[:8]))) + "}"


def either_side(value: int, multiple: int) -> str:
    """The multiples next to `value`: `12 or 18`."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)
