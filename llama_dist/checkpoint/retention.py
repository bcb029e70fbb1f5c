"""Which checkpoints stay."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from llama_dist.checkpoint.places import COMMITTED


def step_of(name: str) -> int:
    """The step of a checkpoint, from its name."""
    return int(COMMITTED.fullmatch(name)[1])


def doomed(
    names: Sequence[str], *, keep: int, keep_every: int = 0, best: str | None = None, damaged: Collection[str] = ()
) -> list[str]:
    """Of committed checkpoints, newest first, those to delete.

    The newest `keep` stay, those at a multiple of `keep_every` steps (0: none) and the `best`. `damaged` ones are known
    not to verify: they do not count, and go when a newer one is there.
    """
    good = [name for name in names if name not in damaged]
    if not good:
        return []
    kept = {*good[: max(keep, 1)], best}
    kept |= {name for name in good if keep_every and step_of(name) % keep_every == 0}
    older = names[names.index(good[0]) :]
    return [name for name in older if name not in kept]
