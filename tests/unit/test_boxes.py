"""Boxes: any flat range is tiled exactly, in order, by few of them."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from llama_dist.boxes import Box, Cut, boxes_of_flat_range, slice_box


def random_cases(count: int) -> list[tuple[tuple[int, ...], int, int]]:
    """Shapes of one to four dimensions (also of size 1) with a flat range in each."""
    draw = random.Random(0)
    cases = []
    for _ in range(count):
        shape = tuple(draw.choice((1, 2, 3, 5, 8)) for _ in range(draw.randint(1, 4)))
        start = draw.randint(0, prod(shape))
        cases.append((shape, start, draw.randint(start, prod(shape))))
    return cases


def test_boxes_tile_the_range_exactly_and_in_flat_order() -> None:
    for shape, start, stop in random_cases(2000):
        flat = torch.arange(prod(shape)).view(shape)
        boxes = boxes_of_flat_range(shape, start, stop)
        tiled = [flat[box.slices].flatten() for box in boxes]
        found = torch.cat(tiled).tolist() if tiled else []
        assert found == list(range(start, stop)), (shape, start, stop)
        assert sum(box.numel for box in boxes) == stop - start
        assert len(boxes) <= max(2 * len(shape) - 1, 1)
        assert all(box.numel for box in boxes)


def test_consecutive_ranges_tile_the_whole_tensor_once() -> None:
    draw = random.Random(1)
    for shape, _, _ in random_cases(300):
        cuts = sorted(draw.randint(0, prod(shape)) for _ in range(3))
        counts = torch.zeros(shape, dtype=torch.int64)
        for start, stop in zip([0, *cuts], [*cuts, prod(shape)], strict=True):
            for box in boxes_of_flat_range(shape, start, stop):
                counts[box.slices] += 1
        assert bool((counts == 1).all())


def test_a_matrix_gives_a_partial_row_whole_rows_and_a_partial_row() -> None:
    assert boxes_of_flat_range((4, 10), 7, 32) == [
        Box((0, 7), (1, 3)),
        Box((1, 0), (2, 10)),
        Box((3, 0), (1, 2)),
    ]
    assert boxes_of_flat_range((4, 10), 0, 40) == [Box((0, 0), (4, 10))]
    assert boxes_of_flat_range((4, 10), 12, 17) == [Box((1, 2), (1, 5))]
    assert boxes_of_flat_range((4, 10), 20, 20) == []
    assert boxes_of_flat_range((7,), 2, 5) == [Box((2,), (3,))]


def test_shifted_moves_a_box_and_keeps_its_shape() -> None:
    box = Box((1, 2), (3, 4)).shifted((10, 0))
    assert box == Box((11, 2), (3, 4))
    assert (box.numel, box.slices) == (12, (slice(11, 14), slice(2, 6)))
    with pytest.raises(ValueError):
        box.shifted((1,))


@pytest.mark.parametrize("cut", [Cut.DIM0, Cut.DIM1])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_slices_of_a_cut_tile_the_tensor(cut: Cut, parts: int) -> None:
    counts = torch.zeros(6, 12, dtype=torch.int64)
    for part in range(parts):
        box = slice_box((6, 12), cut=cut, parts=parts, part=part)
        assert box.numel == 72 // parts
        assert torch.equal(counts[box.slices], torch.zeros(box.shape, dtype=torch.int64))
        counts[box.slices] += 1
    assert bool((counts == 1).all())


def test_an_uncut_tensor_is_whole_on_every_rank() -> None:
    assert slice_box((5,), cut=Cut.NONE, parts=4, part=3) == Box((0,), (5,))


def test_a_cut_that_does_not_divide_says_so() -> None:
    with pytest.raises(AssertionError, match=r"dimension 1 of \(6, 10\) does not split into 4 equal slices"):
        slice_box((6, 10), cut=Cut.DIM1, parts=4, part=0)


def test_a_flat_range_of_a_slice_lands_in_the_logical_tensor() -> None:
    """What a ZeRO rank holds of a tensor-parallel slice, as boxes of the unsharded weight."""
    logical = torch.arange(48).view(6, 8)
    for cut in (Cut.DIM0, Cut.DIM1):
        for part in range(2):
            slice_ = slice_box((6, 8), cut=cut, parts=2, part=part)
            flat = logical[slice_.slices].flatten()
            boxes = boxes_of_flat_range(slice_.shape, 5, 21)
            found = torch.cat([logical[box.shifted(slice_.offset).slices].flatten() for box in boxes])
            assert torch.equal(found, flat[5:21])
