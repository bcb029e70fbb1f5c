"""Which input each document came from, and its id there."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from data_helpers import small_tokenizer, text_of

from llama_dist.data.prepare import prepare
from llama_dist.data.shard_writer import ShardWriter
from llama_dist.data.shards import Shards
from llama_dist.errors import UserError

IDS = [
    ("a.jsonl", "a.jsonl:1"),
    ("a.jsonl", "a.jsonl@77"),
    ("b=+.txt", "b=+.txt"),
    ("b=+.txt", ":1"),
    ("c", "+é\t7\ud800"),
    ("c", "3+4=7"),
]


def write(folder: Path, *, pair_tokens: int) -> Shards:
    with ShardWriter(folder, vocab_size=10, pair_tokens=pair_tokens) as writer:
        writer.add(np.ones(12, dtype=np.int32), np.full(6, 2), IDS)
        writer.finish()
    entry = {"file": "t", "fingerprint": "f", "vocab_size": 10, "bos_id": 1, "eos_id": 2}
    manifest = {
        "tokens": 12, "documents": 6, "raw_bytes": 0, "unigram_entropy": 0.0, "dtype": "uint16", "tokenizer": entry,
        "inputs": [], "files": writer.files, "command": "none", "format": "llama_dist token shards v1",
    }  # fmt: skip
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    return Shards(folder)


@pytest.mark.parametrize("pair_tokens", [2, 5, 100])
def test_the_origin_of_every_document_is_kept(tmp_path: Path, pair_tokens: int) -> None:
    shards = write(tmp_path, pair_tokens=pair_tokens)
    expected = [(path, id.replace("\ud800", "\\ud800")) for path, id in IDS]
    assert [shards.origin(i) for i in range(6)] == expected
    assert len(list(tmp_path.glob("*.ids"))) == len(list(tmp_path.glob("*.bin")))


def test_prepare_tells_line_and_id(tmp_path: Path) -> None:
    rows = [{"text": text_of(i), "id": f"row {i}"} if i % 2 else {"text": text_of(i)} for i in range(9)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "one.txt").write_text(text_of(3))
    inputs = [tmp_path / "some.jsonl", tmp_path / "one.txt"]
    prepare(inputs, small_tokenizer(), tmp_path / "out", workers=1)
    shards, lines, text = Shards(tmp_path / "out"), *map(str, inputs)
    expected = [(lines, f"row {i}" if i % 2 else f"{lines}:{i + 1}") for i in range(9)]
    assert [shards.origin(i) for i in range(10)] == [*expected, (text, text)]


def test_damage_is_an_error_of_one_line_or_is_seen_by_nobody(tmp_path: Path) -> None:
    write(tmp_path, pair_tokens=100)
    whole = (tmp_path / "00000.ids").read_bytes()
    told = 0
    for seed in range(300):
        chosen, content = random.Random(seed), bytearray(whole)
        for _ in range(3):
            content[chosen.randrange(len(content))] = chosen.randrange(256)
        (tmp_path / "00000.ids").write_bytes(content)
        for document in range(6):
            try:
                Shards(tmp_path).origin(document)
            except UserError as error:
                told += 1
                assert "00000.ids" in str(error) and "\n" not in str(error)
    assert told > 200
    (tmp_path / "00000.ids").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"00000\.ids"):
        Shards(tmp_path).origin(0)


def test_shards_of_other_tools_tell_nothing(tmp_path: Path) -> None:
    write(tmp_path, pair_tokens=100)
    (tmp_path / "MANIFEST.json").unlink()
    assert Shards(tmp_path / "00000").origin(0) is None
