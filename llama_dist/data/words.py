"""Numbers of things, as one says them."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """1 document; 0 documents; 1,234 documents."""
    return f"{count:,} {noun}" + "s" * (count != 1)
