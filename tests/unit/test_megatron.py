"""Megatron-LM's own reader and writer of .bin/.idx pairs: it reads ours, and we read its, token by token."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_shards

from llama_dist.data.megatron import HEADER, MAGIC
from llama_dist.data.shard_writer import ShardWriter
from llama_dist.data.shards import Shards
from llama_dist.data.verify import verify_shards
from llama_dist.errors import UserError

# In a process of its own: what it imports, and does to torch, is no business of other tests.
MEGATRON = """
import json, sys, warnings
import numpy, torch
warnings.simplefilter("ignore")
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

folder, prefixes = sys.argv[1], sys.argv[2:]
documents = json.load(open(folder + "/documents.json"))
for dtype in ("uint8", "int8", "int16", "uint16", "int32", "int64", "float32", "float64"):
    builder = IndexedDatasetBuilder(f"{folder}/{dtype}.bin", dtype=getattr(numpy, dtype))
    for sequences in documents:
        tokens = torch.tensor([token for sequence in sequences for token in sequence])
        builder.add_document(tokens, [len(sequence) for sequence in sequences])
    builder.finalize(f"{folder}/{dtype}.idx")
merged = IndexedDatasetBuilder(f"{folder}/merged.bin", dtype=numpy.uint16)
for _ in range(2):
    merged.add_index(f"{folder}/uint16")
merged.finalize(f"{folder}/merged.idx")
modes = IndexedDatasetBuilder(f"{folder}/modes.bin", dtype=numpy.uint16, multimodal=True)
modes.add_document(torch.tensor([1, 2, 3]), [2, 1], [0, 1])
modes.finalize(f"{folder}/modes.idx")

found = {}
for prefix in prefixes:
    read = {}
    for mmap in (True, False):
        data = IndexedDataset(prefix, mmap=mmap)
        sequences = [data[i].tolist() for i in range(len(data))]
        parts = [data.get(i, offset=1, length=len(sequences[i]) - 1).tolist() for i in range(len(data))]
        starts = data.document_indices.tolist()
        read[mmap] = [sequences, parts, starts, data.index.dtype.__name__]
    assert read[True] == read[False]
    found[prefix] = read[True]
json.dump(found, open(folder + "/found.json", "w"))
"""
DOCUMENTS = [[[1, 2, 3], [4]], [[5]], [[6, 7], [8, 9], [100, 11, 12]], [[13] * 40]]
LARGE = [1, 70_000, 2, 1, 128_255, 2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of pairs that Megatron-LM wrote, and what it read of ours."""
    folder = tmp_path_factory.mktemp("megatron")
    (folder / "documents.json").write_text(json.dumps(DOCUMENTS))
    ours = make_shards(folder, documents=30, pair_tokens=900)
    (folder / "large").mkdir()
    with ShardWriter(folder / "large", vocab_size=128_256) as writer:
        writer.add(np.array(LARGE), np.array([3, 3]))
        writer.finish()
    prefixes = [str(path.with_suffix("")) for path in sorted(ours.glob("*.bin"))] + [str(folder / "large/00000")]
    assert len(prefixes) > 3
    command = [sys.executable, "-c", MEGATRON, str(folder), *prefixes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "found.json").read_text())


def test_megatron_reads_ours(found: tuple[Path, dict[str, Any]]) -> None:
    folder, read = found
    whole: list[list[int]] = []
    for prefix, (sequences, parts, starts, dtype) in read.items():
        pair = Shards(prefix)
        assert [pair.document(i).tolist() for i in range(pair.num_documents)] == sequences
        assert parts == [sequence[1:] for sequence in sequences]
        assert starts == list(range(pair.num_documents + 1)) and dtype == pair.dtype.name
        whole += sequences if "large" not in prefix else []
    shards = Shards(folder / "shards-0")
    assert [token for document in whole for token in document] == shards.tokens(0, shards.num_tokens).tolist()
    assert read[str(folder / "large/00000")][0] == [LARGE[:3], LARGE[3:]]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_we_read_megatrons(found: tuple[Path, dict[str, Any]], dtype: str) -> None:
    shards = Shards(found[0] / dtype)
    documents = [[token for sequence in sequences for token in sequence] for sequences in DOCUMENTS]
    whole = [token for document in documents for token in document]
    assert (shards.num_documents, shards.num_tokens, shards.dtype) == (4, len(whole), np.dtype(dtype))
    assert [shards.document(i).tolist() for i in range(4)] == documents
    assert shards.document_lengths().tolist() == [len(document) for document in documents]
    assert shards.tokens(0, len(whole)).tolist() == whole
    assert shards.rows(np.array([3, 0]), 9).tolist() == [whole[3:12], whole[:9]]
    starts = np.cumsum([0] + [len(document) for document in documents]).tolist()
    assert [shards.document_at(i) for i in (0, 3, 4, 5, 12)] == [(0, 0), (0, 0), (1, 4), (2, 5), (3, 12)]
    assert [shards.document_span(i) for i in range(4)] == list(zip(starts, starts[1:], strict=False))
    assert verify_shards(found[0] / dtype).problems == []


def test_merged_pairs_are_read(found: tuple[Path, dict[str, Any]]) -> None:
    once, twice = Shards(found[0] / "uint16"), Shards(found[0] / "merged")
    assert twice.document_lengths().tolist() == once.document_lengths().tolist() * 2
    tokens = once.tokens(0, once.num_tokens).tolist()
    assert twice.tokens(0, twice.num_tokens).tolist() == tokens * 2
    assert verify_shards(found[0] / "merged").problems == []


def test_what_is_no_text_is_refused(found: tuple[Path, dict[str, Any]]) -> None:
    for name, code in (("float64", 6), ("float32", 7)):
        with pytest.raises(UserError, match=rf"{name}.idx: version 1, dtype code {code}, .*allowed are version 1, code 1"):
            Shards(found[0] / name)
    with pytest.raises(UserError, match="modes.idx: is of a multimodal dataset"):
        Shards(found[0] / "modes")


def test_gpt_neox_pairs_are_read(tmp_path: Path) -> None:
    """GPT-NeoX writes the same header, sizes and pointers, and documents of a sequence each; sequences may be empty."""
    lengths = [3, 0, 2]
    index = HEADER.pack(MAGIC, 1, 8, 3, 4) + struct.pack("<3i", *lengths)
    index += struct.pack("<3q", 0, 6, 6) + struct.pack("<4q", 0, 1, 2, 3)
    (tmp_path / "neox_text_document.idx").write_bytes(index)
    (tmp_path / "neox_text_document.bin").write_bytes(struct.pack("<5H", 1, 2, 0, 4, 0))
    shards = Shards(tmp_path / "neox_text_document")
    assert [shards.document(i).tolist() for i in range(3)] == [[1, 2, 0], [], [4, 0]]
    assert [shards.document_at(i)[0] for i in range(5)] == [0, 0, 0, 2, 2]
    assert verify_shards(tmp_path / "neox_text_document").problems == []
