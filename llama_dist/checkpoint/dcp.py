"""Pieces <-> torch.distributed.checkpoint: planners that take boxes, storage that is raw bytes.

Every rank plans for itself (`no_dist`): where each piece lies is a function of the layout (`plan.py`), so that neither
plans nor metadata are collected. DCP's own file storage pickles its metadata; ours can run nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    SavePlan,
    SavePlanner,
    StorageReader,
    StorageWriter,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llama_dist.boxes import Box
from llama_dist.checkpoint.pieces import Piece
from llama_dist.checkpoint.plan import SavedLayout, file_name

BLOCK = 16 << 20  # elements that are under way between file and device at a time


class NotFiniteError(ValueError):
    """A state that is to be saved has diverged."""


class Sink(Protocol):
    """Takes the bytes of a file, in order."""

    def write(self, data: Any) -> None: ...


# Reads box `part` of a float32 array of `shape` that lies in `file` from byte `start`, into a tensor of its shape.
ReadBox = Callable[[str, int, tuple[int, ...], Box, Tensor], None]


def write_pieces(pieces: Sequence[Piece], sink: Sink) -> None:
    """Write pieces one after the other, row-major. Raises OSError, and NotFiniteError for a state that has diverged."""
    with _unwrapped():
        dcp.save({}, storage_writer=RawWriter(sink), planner=PieceSavePlanner(pieces), no_dist=True)


def read_pieces(pieces: Sequence[Piece], saved: SavedLayout, read: ReadBox) -> int:
    """Fill the pieces' data from the files of a layout; returns the bytes that were read.

    Raises ValueError where it is of another model.
    """
    reader = RawReader(saved, pieces, read)
    with _unwrapped():
        dcp.load({}, storage_reader=reader, planner=PieceLoadPlanner(pieces), no_dist=True)
    return reader.bytes_read


@contextmanager
def _unwrapped() -> Iterator[None]:
    """DCP as a library for one process: its warning that it is one left out, and errors as they were raised."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=torch.Size(box.shape))


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class PieceSavePlanner(SavePlanner):
    """Plans to write this rank's pieces in the order that they are given in."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {(piece.name, piece.box.offset): piece for piece in pieces}
        assert len(self._pieces) == len(pieces), "two pieces of one rank begin at the same place of the same tensor"

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(piece) for piece in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata(state_dict_metadata={})  # readers compute it

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._pieces[write_item.index.fqn, tuple(write_item.index.offset)].data


def _write_item(piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(piece.name, piece.box.offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(piece.box),
            properties=TensorProperties(dtype=piece.data.dtype),
            size=torch.Size(piece.shape),
        ),
    )


class PieceLoadPlanner(LoadPlanner):
    """Plans to read the boxes that this rank's pieces name, whoever wrote them; fills `piece.data` in place."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {(piece.name, piece.box.offset): piece for piece in pieces}
        self._metadata: Metadata | None = None

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for piece in self._pieces.values():
            stored = self._metadata.state_dict_metadata.get(piece.name)
            if stored is None:
                raise ValueError(f"the checkpoint has no tensor {piece.name!r}; was it saved from another model?")
            if tuple(stored.size) != piece.shape:
                raise ValueError(
                    f"{piece.name}: the checkpoint has shape {tuple(stored.size)}, the model {piece.shape}"
                )
            found = create_read_items_for_chunk_list(piece.name, stored, [_chunk(piece.box)])
            covered = sum(item.lengths.numel() for item in found)
            assert covered == piece.box.numel, f"{piece.name}: {covered} of {piece.box.numel} elements of {piece.box}"
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError(f"{read_item.dest_index.fqn}: a checkpoint holds tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self._pieces[read_item.dest_index.fqn, tuple(read_item.dest_index.offset)]
        return piece.data[Box(tuple(read_item.dest_offsets), tuple(read_item.lengths)).slices]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class RawWriter(StorageWriter):
    """Writes a rank's pieces one after the other into `sink`, in blocks that do not end where a piece does.

    What lies together in memory is written together: what was copied to host memory in this order, and much of what
    ZeRO keeps flat. Large writes are fast ones, and only they can go past the page cache.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results, run = [], None
        for item in plan.items:
            flat = planner.resolve_data(item).detach().contiguous().view(-1)
            _check_finite(item.index.fqn, flat)
            if run is not None and _follows(flat, run):
                run = run.as_strided((run.numel() + flat.numel(),), (1,))
            else:
                self._write(run)
                run = flat
            results.append(WriteResult(index=item.index, size_in_bytes=flat.nbytes, storage_data=None))
        self._write(run)
        return _done(results)

    def _write(self, run: Tensor | None) -> None:
        for block in () if run is None else run.split(BLOCK):
            self._sink.write(block.cpu().numpy())

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _check_finite(name: str, flat: Tensor) -> None:
    """A sum is as fast as memory, and of finite numbers only an overflow is not finite.

    A state that diverged in the very step that is saved would otherwise become the newest good one.
    """
    for block in flat.split(BLOCK):
        if not bool(torch.isfinite(block.sum())) and not bool(torch.isfinite(block).all()):
            raise NotFiniteError(f"{name} holds values that are not finite numbers")


def _follows(after: Tensor, before: Tensor) -> bool:
    """Whether one flat tensor begins in memory where another ends."""
    same = after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr() and after.dtype == before.dtype
    return same and after.storage_offset() == before.storage_offset() + before.numel()


class RawReader(StorageReader):
    """Reads exactly the boxes that are asked for, from where the layout that saved them says that they lie."""

    def __init__(self, saved: SavedLayout, pieces: Sequence[Piece], read: ReadBox) -> None:
        self._saved = saved
        self._pieces = pieces
        self._read = read
        self.bytes_read = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        """What the pieces need, and no more: of thousands of ranks' files a few."""
        tensors: dict[str, TensorStorageMetadata] = {}
        places: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}
        shapes = dict(self._saved.tensors())
        for piece in self._pieces:
            if piece.name not in shapes:
                continue  # the planner says so
            size, properties = torch.Size(shapes[piece.name]), TensorProperties(dtype=torch.float32)
            known = tensors.setdefault(piece.name, TensorStorageMetadata(properties, size, []))
            if shapes[piece.name] != piece.shape:
                continue
            for stored in self._saved.stored(piece.name, piece.box):
                if (piece.name, stored.box.offset) not in places:
                    places[piece.name, stored.box.offset] = file_name(stored.rank), stored.start
                    known.chunks.append(_chunk(stored.box))
        return Metadata(state_dict_metadata=dict(tensors), storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._places = metadata.storage_data
        self._shapes = {
            (name, tuple(chunk.offsets)): tuple(chunk.sizes)
            for name, tensor in metadata.state_dict_metadata.items()
            for chunk in tensor.chunks
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        # File by file and on through each, as disks like it.
        place = {id(item): self._places[item.storage_index.fqn, tuple(item.storage_index.offset)] for item in plan.items}
        return LoadPlan(sorted(plan.items, key=lambda item: (*place[id(item)], tuple(item.storage_offsets))))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item)
            self._fill(item, target)
            planner.commit_tensor(item, target)
        return _done(None)

    def _fill(self, item: ReadItem, target: Tensor) -> None:
        key = item.storage_index.fqn, tuple(item.storage_index.offset)
        file, start = self._places[key]
        offset, lengths = tuple(item.storage_offsets), tuple(item.lengths)
        rows = max(1, BLOCK // max(1, target[0].numel()))
        for row in range(0, lengths[0], rows):
            count = min(rows, lengths[0] - row)
            part = Box((offset[0] + row, *offset[1:]), (count, *lengths[1:]))
            block = target[row : row + count]
            direct = block.device.type == "cpu" and block.is_contiguous()
            into = block if direct else torch.empty(part.shape, dtype=torch.float32)
            self._read(file, start, self._shapes[key], part, into)
            self.bytes_read += into.nbytes
            if not direct:
                block.copy_(into)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
