"""Pieces <-> torch.distributed.checkpoint: planners that take boxes, storage that is raw bytes and JSON.

DCP's own file storage pickles its metadata; ours can be read by anything and can run nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
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
from llama_dist.files import HashingFile
from llama_dist.checkpoint.pieces import Piece, check_coverage

TENSORS_FILE = "tensors.json"


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=torch.Size(box.shape))


def _box(chunk: ChunkStorageMetadata) -> Box:
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _done(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class NotFiniteError(ValueError):
    """A state that is to be saved has diverged."""


class PieceSavePlanner(SavePlanner):
    """Plans to write this rank's pieces; the coordinator refuses pieces that do not cover each tensor once."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = {(piece.name, piece.box.offset): piece for piece in pieces}
        assert len(self._pieces) == len(pieces), "two pieces of one rank begin at the same place of the same tensor"

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(piece) for piece in self._pieces.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        tensors: dict[str, TensorStorageMetadata] = {}
        for item in (item for plan in all_plans for item in plan.items):
            data = item.tensor_data
            known = tensors.setdefault(item.index.fqn, TensorStorageMetadata(data.properties, data.size, []))
            assert known.size == data.size, f"{item.index.fqn}: ranks disagree on its shape: {known.size}, {data.size}"
            known.chunks.append(data.chunk)
        for name, tensor in tensors.items():
            check_coverage(name, tuple(tensor.size), [_box(chunk) for chunk in tensor.chunks])
        return all_plans, Metadata(state_dict_metadata=dict(tensors))

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
            items += create_read_items_for_chunk_list(piece.name, stored, [_chunk(piece.box)])
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
    """Writes each rank's pieces one after the other into `rank-NNNNN.bin`, and on the coordinator what lies where.

    `commit(files)` is called by the coordinator when every rank's file is on disk, with each file's size and checksum.
    """

    def __init__(self, folder: Path, *, rank: int, commit: Any) -> None:
        self.folder = folder
        self.rank = rank
        self._commit = commit

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"rank-{self.rank:05d}.bin"
        places: list[tuple[WriteItem, int, int]] = []
        with HashingFile(self.folder / name) as file:
            for item in plan.items:
                data = planner.resolve_data(item).detach().cpu().contiguous()
                # A state that diverged in the very step that is saved would otherwise become the newest good one.
                if not bool(torch.isfinite(data).all()):
                    raise NotFiniteError(f"{item.index.fqn} holds values that are not finite numbers")
                start = file.size
                file.write(data.flatten().view(torch.uint8).numpy())
                places.append((item, start, file.size - start))
        record = {"bytes": file.size, "xxh3_128": file.checksum}
        return _done(
            [
                WriteResult(index=item.index, size_in_bytes=size, storage_data=(name, start, record))
                for item, start, size in places
            ]
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {(r.index.fqn, tuple(r.index.offset)): r.storage_data for rank in results for r in rank}
        files = {name: record for name, _, record in places.values()}
        text = json.dumps({"tensors": {n: _describe(n, t, places) for n, t in metadata.state_dict_metadata.items()}})
        with HashingFile(self.folder / TENSORS_FILE) as file:
            file.write(text.encode())
        files[TENSORS_FILE] = {"bytes": file.size, "xxh3_128": file.checksum}
        self._commit(files)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _describe(name: str, tensor: TensorStorageMetadata, places: dict[Any, Any]) -> dict[str, Any]:
    chunks = []
    for chunk in tensor.chunks:
        file, start, _ = places[name, tuple(chunk.offsets)]
        chunks.append({"offset": list(chunk.offsets), "shape": list(chunk.sizes), "file": file, "start": start})
    dtype = str(tensor.properties.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.size), "chunks": chunks}


class RawReader(StorageReader):
    """Reads exactly the bytes of the boxes that are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self) -> Metadata:
        stored = json.loads((self.folder / TENSORS_FILE).read_text())["tensors"]
        tensors: dict[str, Any] = {}
        places: dict[tuple[str, tuple[int, ...]], tuple[str, int, str]] = {}
        for name, tensor in stored.items():
            chunks = [Box(tuple(c["offset"]), tuple(c["shape"])) for c in tensor["chunks"]]
            dtype = getattr(torch, tensor["dtype"])
            tensors[name] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(tensor["shape"]), [_chunk(box) for box in chunks]
            )
            for c in tensor["chunks"]:
                places[name, tuple(c["offset"])] = (c["file"], c["start"], tensor["dtype"])
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item)
            target.copy_(self._read(item))
            planner.commit_tensor(item, target)
        return _done(None)

    def _read(self, item: ReadItem) -> Tensor:
        name, offset = item.storage_index.fqn, tuple(item.storage_index.offset)
        file, start, dtype = self._metadata.storage_data[name, offset]
        chunk = next(c for c in self._metadata.state_dict_metadata[name].chunks if tuple(c.offsets) == offset)
        stored = np.memmap(self.folder / file, dtype=dtype, mode="r", offset=start, shape=tuple(chunk.sizes))
        part = np.array(stored[Box(tuple(item.storage_offsets), tuple(item.lengths)).slices])
        self.bytes_read += part.nbytes
        return torch.from_numpy(part)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
