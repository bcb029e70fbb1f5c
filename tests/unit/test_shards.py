"""Shards: the very bytes of Megatron's format, one long sequence over all pairs, and damage named."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import make_shards, small_tokenizer, text_of

from llama_dist.data.describe import describe_shards
from llama_dist.data.manifest import Manifest
from llama_dist.data.megatron import HEADER, MAGIC, dtype_for
from llama_dist.data.prepare import prepare
from llama_dist.data.shard_writer import ShardWriter
from llama_dist.data.shards import Shards, load_manifest, verify
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path)


def test_the_bytes_are_megatrons(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, vocab_size=1000) as writer:
        writer.add(np.array([1, 5, 2, 1, 999, 7, 2]), np.array([3, 4]))
        writer.finish()
    assert (tmp_path / "00000.bin").read_bytes() == struct.pack("<7H", 1, 5, 2, 1, 999, 7, 2)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected += struct.pack("<2i", 3, 4) + struct.pack("<2q", 0, 6) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "00000.idx").read_bytes() == expected


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, vocab_size=128_256) as writer:
        writer.add(np.array([128_255, 2]), np.array([2]))
        writer.finish()
    assert (tmp_path / "00000.bin").read_bytes() == struct.pack("<2i", 128_255, 2)
    assert (tmp_path / "00000.idx").read_bytes()[17] == 4
    assert Shards(tmp_path / "00000").tokens(0, 2).tolist() == [128_255, 2]
    assert (dtype_for(65535).itemsize, dtype_for(65536).itemsize) == (2, 4)


def test_a_megatron_pair_with_several_sequences_a_document_is_read(tmp_path: Path) -> None:
    (tmp_path / "other.bin").write_bytes(struct.pack("<6i", 10, 11, 12, 13, 14, 15))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 3, 4)
    index += struct.pack("<3i", 2, 1, 3) + struct.pack("<3q", 0, 8, 12) + struct.pack("<4q", 0, 2, 3, 3)
    (tmp_path / "other.idx").write_bytes(index)
    shards = Shards(tmp_path / "other")
    assert (shards.num_tokens, shards.num_documents, shards.manifest) == (6, 3, None)
    assert [shards.document(i).tolist() for i in range(3)] == [[10, 11, 12], [13, 14, 15], []]
    assert shards.document_lengths().tolist() == [3, 3, 0]


@pytest.mark.parametrize("pair_tokens", [1, 100, 333, 1 << 30])
def test_tokens_are_one_sequence_over_all_pairs(tmp_path: Path, pair_tokens: int) -> None:
    path = make_shards(tmp_path, documents=12, pair_tokens=pair_tokens)
    tokenizer = load_tokenizer(small_tokenizer())
    documents = [[1, *tokenizer.encode(text_of(i)), 2] for i in range(12)]
    whole = [token for document in documents for token in document]
    shards = Shards(path)
    pairs, open_tokens = 0, 0
    for document in documents:
        pairs += open_tokens == 0
        open_tokens = (open_tokens + len(document)) * (open_tokens + len(document) < pair_tokens)
    assert sorted(p.stem for p in path.glob("*.bin")) == [f"{i:05d}" for i in range(pairs)]
    assert shards.tokens(0, shards.num_tokens).tolist() == whole
    assert [shards.document(i).tolist() for i in range(12)] == documents
    assert shards.document_lengths().tolist() == [len(d) for d in documents]
    for length in (0, 1, 50, 400):
        starts = np.random.default_rng(length).permutation(len(whole) - length)[:100]
        expected = [whole[start : start + length] for start in starts]
        assert [shards.tokens(start, start + length).tolist() for start in starts] == expected
        shards.prefetch(starts, length)
        rows = shards.rows(starts, length)
        assert (rows.tolist(), rows.dtype, rows.shape) == (expected, np.uint16, (100, length))
    assert shards.tokens(len(whole), len(whole)).size == 0
    assert shards.rows(np.array([], dtype=np.int64), 5).shape == (0, 5)
    with pytest.raises(AssertionError, match="rows 0 to"):
        shards.rows(np.array([0, len(whole) - 4]), 5)
    begins = np.cumsum([0, *map(len, documents)]).tolist()
    assert [shards.document_span(i) for i in range(12)] == list(pairwise(begins))
    found = [shards.document_at(token) for token in range(len(whole))]
    assert found == [(i, begins[i]) for i in range(12) for _ in documents[i]]
    names = [shards.pair_of(begins[i]) for i in range(12)]
    assert names == sorted(names) and len(set(names)) == pairs and names[0] == f"{path}/00000.bin"


def test_the_manifest_counts(shards: Path) -> None:
    manifest, opened = load_manifest(shards), Shards(shards)
    tokens = opened.tokens(0, opened.num_tokens)
    counts = np.bincount(tokens)
    share = counts[counts > 0] / counts.sum()
    assert manifest.unigram_entropy == pytest.approx(-sum(p * log(p) for p in share))
    assert (manifest.tokens, manifest.documents, manifest.dtype) == (len(tokens), 40, "uint16")
    assert manifest.raw_bytes == sum(len(text_of(i).encode()) for i in range(40))
    made_by = load_tokenizer(small_tokenizer())
    assert manifest.tokenizer["fingerprint"] == made_by.fingerprint
    assert (manifest.tokenizer["vocab_size"], manifest.tokenizer["bos_id"], manifest.tokenizer["eos_id"]) == (340, 1, 2)
    assert manifest.command.startswith("llama-dist prepare ") and "--tokenizer" in manifest.command
    verify(shards)


def test_a_flipped_bit_is_named_by_verify(shards: Path) -> None:
    for name in ("00000.bin", "00000.idx"):
        content = (shards / name).read_bytes()
        (shards / name).write_bytes(content[:50] + bytes([content[50] ^ 4]) + content[51:])
        expected = load_manifest(shards).files[name]["xxh3_128"]
        with pytest.raises(UserError, match=rf"{name}: .* expected {expected}"):
            verify(shards)
        (shards / name).write_bytes(content)
    verify(shards)


@pytest.mark.parametrize("name", ["00000.bin", "00000.idx"])
def test_a_wrong_size_is_named_at_first_use(shards: Path, name: str) -> None:
    content = (shards / name).read_bytes()
    size = len(content)
    for changed, message in ((content[:-1], f"cut short: {size - 1} bytes, expected {size}"),
                             (content + b"x", f"too long: {size + 1} bytes, expected {size}")):  # fmt: skip
        (shards / name).write_bytes(changed)
        for use in (Shards.check_sizes, lambda opened: opened.document(0)):
            with pytest.raises(UserError, match=f"{name}: is {message}"):
                use(Shards(shards))
    (shards / name).unlink()
    with pytest.raises(UserError, match=f"{name}: is missing"):
        Shards(shards).document(0)


def damaged(index: bytes) -> dict[str, tuple[bytes, str]]:
    return {
        "magic": (b"X" + index[1:], "is not a Megatron index file"),
        "header cut": (index[:20], "is cut short: 20 bytes"),
        "cut": (index[:-8], "is cut short"),
        "version": (index[:9] + b"\x02" + index[10:], "version 2"),
        "dtype": (index[:17] + b"\x06" + index[18:], "dtype code 6"),
        "documents": (index[:-8] + struct.pack("<q", 1), "do not cover"),
        "empty": (b"", "is not a Megatron index file"),
    }


def test_a_bad_index_is_named_without_a_manifest_too(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.bin").write_bytes((shards / "00000.bin").read_bytes())
    good = (shards / "00000.idx").read_bytes()
    for content, message in damaged(good).values():
        (tmp_path / "bare.idx").write_bytes(content)
        with pytest.raises(UserError, match=rf"bare.idx: .*{message}"):
            Shards(tmp_path / "bare")
    (tmp_path / "bare.idx").write_bytes(good)
    (tmp_path / "bare.bin").write_bytes(b"12")
    with pytest.raises(UserError, match="bare.bin: is cut short: 2 bytes, expected"):
        Shards(tmp_path / "bare")


def test_a_bad_manifest_is_named(shards: Path, tmp_path: Path) -> None:
    good = (shards / "MANIFEST.json").read_text()
    fields = json.loads(good)
    for content, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({**fields, "format": "other"}), "format is 'other'"),
        (json.dumps({**fields, "tokens": 5}), r"its MANIFEST.json says 5 in 40"),
    ):
        (shards / "MANIFEST.json").write_text(content)
        with pytest.raises(UserError, match=message):
            Shards(shards)
    (shards / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="has no MANIFEST.json"):
        Shards(shards)
    with pytest.raises(UserError, match="there is no such shard directory"):
        Shards(tmp_path / "absent")


def test_a_file_cut_while_open_is_an_error_and_not_a_crash(shards: Path) -> None:
    opened = Shards(shards)
    opened.tokens(0, 1)
    with (shards / "00000.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match="00000.bin: ended at byte 100"):
        opened.tokens(0, opened.num_tokens)


def test_reading_everything_takes_no_memory(tmp_path: Path) -> None:
    tokens = np.arange(40_000_000, dtype=np.uint16) % 1000
    with ShardWriter(tmp_path, vocab_size=1000) as writer:
        writer.add(tokens, np.array([len(tokens)]))
        writer.finish()
    del tokens
    opened = Shards(tmp_path / "00000")
    before = resident_bytes()
    for start in range(0, opened.num_tokens, 100_000):
        assert opened.tokens(start, start + 100_000)[-1] == (start + 99_999) % 65536 % 1000
    assert resident_bytes() - before < 10_000_000, "80 MB were read"


def test_a_trillion_tokens_open_and_seek_at_once(tmp_path: Path) -> None:
    """1,000 pairs of 10^9 tokens, all holes but for what is written in the middle and at the end."""
    pair_tokens, size = 10**9, 2 * 10**9
    index = HEADER.pack(MAGIC, 1, 8, 1, 2) + struct.pack("<iqqq", pair_tokens, 0, 0, 1)
    files: dict[str, Any] = {}
    for number in range(1000):
        name = f"{number:05d}"
        with open(tmp_path / f"{name}.bin", "wb") as file:
            file.truncate(size)
        (tmp_path / f"{name}.idx").write_bytes(index)
        files[f"{name}.bin"] = {"bytes": size, "xxh3_128": "0" * 32, "tokens": pair_tokens, "documents": 1}
        files[f"{name}.idx"] = {"bytes": len(index), "xxh3_128": "0" * 32}
    made_by: Any = {"file": "x", "fingerprint": "y", "vocab_size": 32000, "bos_id": 1, "eos_id": 2}
    counts = {"tokens": 10**12, "documents": 1000, "raw_bytes": 10**12, "unigram_entropy": 1.0}
    manifest = Manifest(**counts, dtype="uint16", tokenizer=made_by, inputs=[], files=files, command="x")
    (tmp_path / "MANIFEST.json").write_bytes(manifest.to_json())
    middle = 10**12 // 2 - 2
    for number, at, tokens in ((499, size - 4, (7, 8)), (500, 0, (9, 10, 11)), (999, size - 2, (12,))):
        with open(tmp_path / f"{number:05d}.bin", "r+b") as file:
            file.seek(at)
            file.write(struct.pack(f"<{len(tokens)}H", *tokens))
    before, opening, seeking = resident_bytes(), [], []
    for _ in range(5):
        began_at = time.perf_counter()
        shards = Shards(tmp_path)
        opened_at = time.perf_counter()
        assert shards.tokens(middle, middle + 5).tolist() == [7, 8, 9, 10, 11]
        assert shards.document_at(middle) == (499, 499 * pair_tokens)
        seeking.append(time.perf_counter() - opened_at)
        opening.append(opened_at - began_at)
    starts = np.random.default_rng(0).integers(0, 10**12 - 2049, 2000)
    assert shards.rows(np.append(starts, 10**12 - 2), 2)[-1].tolist() == [0, 12]
    assert len(os.listdir("/proc/self/fd")) < 2500, "few pairs are held open"
    assert min(opening) < 0.02 and min(seeking) < 0.02, (opening, seeking)
    assert resident_bytes() - before < 50_000_000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_shard_directory_is_described(shards: Path) -> None:
    text = describe_shards(shards, small_tokenizer())
    manifest = load_manifest(shards)
    assert f"{manifest.tokens:,} tokens in 40 documents" in text
    assert f"{manifest.unigram_entropy:.4f} nats" in text and manifest.command in text
    assert repr("document 0: the") [:-1] in text and "document 20: " in text
    assert describe_shards(shards) == text, "the tokenizer that made them is where it was"


def test_real_text_is_prepared_exactly(shared_data: Path, tmp_path: Path) -> None:
    corpus = shared_data / "corpora/tinyshakespeare.txt"
    manifest = prepare([corpus], shared_data / "tokenizers/llama2_32000/tokenizer.model", tmp_path / "out").manifest
    assert (manifest.tokens, manifest.documents, manifest.raw_bytes) == (368_633 + 2, 1, 1_115_394)
    document = Shards(tmp_path / "out").document(0).tolist()
    assert (document[0], document[-1]) == (1, 2)
    tokenizer = load_tokenizer(shared_data / "tokenizers/llama2_32000")
    assert tokenizer.decode(document) == corpus.read_text()
