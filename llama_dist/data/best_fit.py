"""Best-fit-decreasing packing of documents into samples.

Concatenating documents and cutting the result cuts every document that a boundary falls into. Here only those longer
than a sample are cut (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
"""

from __future__ import annotations

from array import array

import numpy as np


def cut_documents(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents that lie one after another into pieces of at most seq_len + 1 tokens: (first tokens, sizes), int64.

    All pieces of a document but the last are full, and each begins with the last token of the one before, so that every
    token of a document but its first is once a target with its own document before it. A document of fewer than two
    tokens has nothing to predict and gives no piece.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    counts = np.where(lengths < 2, 0, (lengths - 2) // seq_len + 1)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = (ends - lengths)[document] + number * seq_len
    return starts, np.minimum(seq_len + 1, ends[document] - starts)


def best_fit(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack items of 1 <= size <= room into bins: (items in the order of the bins, number of items of each bin), int64.

    From the largest item to the smallest, each goes where it leaves the least room. Items of one size and bins with the
    same room left are alike, so they are dealt with together: as many steps as there are pairs of these that meet, at
    most one an item and room^2 / 2.
    """
    order = np.argsort(-sizes, kind="stable")
    counts = np.bincount(sizes, minlength=1)
    smallest = int(sizes.min(initial=room))
    bins: dict[int, array[int]] = {}  # by the room that is left in them
    rooms = 0  # bit r: some bin has room r left
    num_bins = 0
    bin_of = array("I")  # of each item, in `order`
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            fitting = rooms >> size
            if fitting:
                here = size + (fitting & -fitting).bit_length() - 1
            else:
                here, more = room, -(-left // (room // size))
                bins[here] = array("I", range(num_bins, num_bins + more))
                rooms |= 1 << here
                num_bins += more
            # A bin that has been given an item is the best fit for the next, as long as that fits too.
            each = min(here // size, left)
            number = min(len(bins[here]), left // each)
            taken = bins[here][-number:]
            del bins[here][-number:]
            if not bins[here]:
                rooms ^= 1 << here
            if (rest := here - each * size) >= smallest:
                bins.setdefault(rest, array("I")).extend(taken)
                rooms |= 1 << rest
            bin_of.extend(taken * each)
            left -= each * number
    found = np.frombuffer(bin_of, dtype=np.uint32) if bin_of else np.zeros(0, dtype=np.uint32)
    return order[np.argsort(found, kind="stable")], np.bincount(found, minlength=num_bins)
