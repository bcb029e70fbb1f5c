"""verify: all that is wrong with shards is found and named; damage of any kind ends in a message, never in wrong data."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import make_shards, small_tokenizer

from llama_dist.cli import main
from llama_dist.data.describe import describe_shards
from llama_dist.data.manifest import MANIFEST
from llama_dist.data.packing import pack
from llama_dist.data.shards import Shards
from llama_dist.data.verify import verify_shards
from llama_dist.data.vocabulary import train_tokenizer
from llama_dist.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_shards(tmp_path, documents=40, pair_tokens=1000)


def edit(path: Path, at: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(value)] = value
    path.write_bytes(content)


def test_whole_shards_and_pairs_are_told_so(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = Shards(shards)
    assert main(["verify", str(shards), "--tokenizer", str(small_tokenizer())]) == 0
    said = capsys.readouterr().out
    assert "12 files of" in said and "xxh3-128" in said and "nothing is wrong" in said
    assert f"{opened.num_tokens:,} ids, the largest {opened.tokens(0, opened.num_tokens).max()}" in said
    assert "40 documents" in said and "a vocabulary of 340" in said
    assert main(["verify", str(shards / "00001"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "no checksums" in said and "no vocabulary" in said
    assert verify_shards(f"file://{shards}").problems == []
    assert main(["verify", str(shards), "--workers", "0"]) == 2
    assert main(["verify", str(shards / "absent")]) == 2
    assert "there is no such shard directory" in capsys.readouterr().err


def test_all_problems_are_listed(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(shards / "00000.bin", 8, struct.pack("<2H", 340, 999))
    (shards / "00001.bin").write_bytes(b"")
    (shards / "00002.idx").unlink()
    edit(shards / "00003.idx", 34, struct.pack("<i", -4))
    assert main(["verify", str(shards)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for problem in (
        "00000.bin: xxh3-128 is",
        "00000.bin: 2 of its ids are not from 0 to 339; the first, token 4 of the file, is 340",
        "00001.bin: is cut short: 0 bytes",
        "00002.idx: is missing",
        "00003.idx: xxh3-128 is",
        "00003.idx: 1 of its",
        f"its {MANIFEST} says",
    ):
        assert problem in said, problem


def test_ids_and_indices_are_held_even_without_checksums(shards: Path) -> None:
    prefix = shards / "00000"
    edit(prefix.with_suffix(".bin"), 0, struct.pack("<H", 340))
    assert verify_shards(prefix).problems == []
    (problem,) = verify_shards(prefix, tokenizer=small_tokenizer()).problems
    assert "1 of its ids are not from 0 to 339" in problem
    index = prefix.with_suffix(".idx")
    sequences = struct.unpack_from("<Q", index.read_bytes(), 18)[0]
    edit(index, 34 + 4 * sequences + 8, struct.pack("<q", 2))
    edit(index, 34 + 12 * sequences + 8, struct.pack("<q", 10))
    problems = verify_shards(prefix).problems
    assert [problem.partition(": ")[2] for problem in problems] == [
        f"1 of its {sequences} sequences do not begin where the one before ends",
        f"1 of its {sequences} documents end before they begin",
    ]


def test_another_tokenizer_is_told(shards: Path, tmp_path: Path) -> None:
    train_tokenizer(["some other text to learn from, of all things"] * 9, vocab_size=280, out=tmp_path / "other.model")
    problems = verify_shards(shards, tokenizer=tmp_path / "other.model").problems
    assert "was made with another tokenizer" in problems[0] and "not from 0 to 279" in problems[1]


def test_a_manifest_of_other_shards_is_told(shards: Path) -> None:
    fields = json.loads((shards / MANIFEST).read_text())
    fields["files"]["00000.bin"]["tokens"] += 1
    fields["files"]["00001.bin"]["documents"] += 1
    fields["dtype"] = "int16"
    (shards / MANIFEST).write_text(json.dumps(fields))
    said = "\n".join(verify_shards(shards).problems)
    for problem in ("00000.bin: holds", "00001.idx: is of", "00000.idx: its tokens are uint16"):
        assert problem in said


def test_packed_samples_and_checkpoints_are_verified(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(shards, seq_len=64, workers=1)
    assert main(["verify", str(shards)]) == 0
    assert "packed-64: " in capsys.readouterr().out
    packed = next((shards / "packed-64").glob("*.pack"))
    edit(packed, 0, b"\xff")
    assert main(["verify", str(shards)]) == 2
    assert f"{packed}: xxh3-128" in capsys.readouterr().err
    (shards / "checkpoints/step-00000001").mkdir(parents=True)
    assert main(["verify", str(shards / "checkpoints/step-00000001")]) == 2


def test_inspect_shows_lengths_skips_and_samples(shards: Path, tmp_path: Path) -> None:
    fields = json.loads((shards / MANIFEST).read_text())
    fields["skipped"] = {"json": 3, "encoding": 1200}
    (shards / MANIFEST).write_text(json.dumps(fields))
    said = describe_shards(shards)
    lengths = Shards(shards).document_lengths()
    assert f"min {lengths.min()}, 5% " in said and f"max {lengths.max()}\n" in said
    assert f"50% {int(np.quantile(lengths, 0.5, method='nearest'))}," in said
    assert "1,200 encoding, 3 json" in said and "'document 0: " in said and "document 20" in said
    octave = 1 << int(lengths[0]).bit_length() - 1
    inside = (lengths >= octave) & (lengths < 2 * octave)
    share = lengths[inside].sum() / lengths.sum()
    assert f"{octave}-{2 * octave - 1}  {'#' * 30}  {inside.sum()} documents, {share:.1%} of the tokens" in said
    moved = tmp_path / "moved.model"
    shutil.copy(small_tokenizer(), moved)
    fields["tokenizer"]["file"] = str(tmp_path / "absent.model")
    (shards / MANIFEST).write_text(json.dumps(fields))
    assert "absent.model is not there" in describe_shards(shards)
    assert "'document 0: " in describe_shards(shards, moved)
    assert "name the tokenizer by --tokenizer" in describe_shards(shards / "00001")
    assert "a Megatron pair" in describe_shards(shards / "00001", moved)


def test_inspect_of_ids_that_the_tokenizer_has_not(shards: Path) -> None:
    edit(shards / "00000.bin", 0, struct.pack("<H", 60_000))
    with pytest.raises(UserError, match="document 0 has ids from .* to 60000, and .* knows 340"):
        describe_shards(shards)


Damage = Callable[[Path, random.Random], None]


def truncate(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def swap(path: Path, rng: random.Random) -> None:
    other = rng.choice([p for p in sorted(path.parent.iterdir()) if p != path])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def garbage(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice((1, 34, 1000))))


def header(path: Path, rng: random.Random) -> None:
    """A number where the counts and types are, which are what sizes and places are made of."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(40)
    value = struct.pack("<Q", rng.choice((0, 1, 1 << 31, 1 << 62, (1 << 64) - 1)))
    content[at : at + 8] = value
    path.write_bytes(content)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def folder_in_place(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Damage] = [truncate, flip, swap, lengthen, garbage, header, remove, empty, folder_in_place]


def read_everything(path: Path) -> tuple[list[int], list[int]]:
    """All that there is to be read of shards, by every way of reading."""
    shards = Shards(path)
    tokens = shards.tokens(0, shards.num_tokens)
    starts = np.arange(0, shards.num_tokens - 9, 37)
    shards.prefetch(starts, 9)
    assert shards.rows(starts, 9).tolist() == [tokens[start : start + 9].tolist() for start in starts]
    lengths = shards.document_lengths()
    for i in range(0, shards.num_documents, 7):
        start, stop = shards.document_span(i)
        if stop > start:
            assert shards.document_at(start) == (i, start)
    return tokens.tolist(), lengths.tolist()


def test_any_damage_is_found_by_verify_and_no_reader_crashes(shards: Path, tmp_path: Path) -> None:
    """400 seeded corruptions of a shard directory, 200 of a bare pair."""
    expected = read_everything(shards)
    files = sorted(path.name for path in shards.iterdir())
    assert len(files) == 13
    harmless, told = 0, 0
    for seed in range(600):
        rng = random.Random(seed)
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shards, folder)
        bare = seed >= 400
        name = rng.choice(("00001.bin", "00001.idx") if bare else files)
        rng.choice(DAMAGES)(folder / name, rng)
        path = folder / "00001" if bare else folder
        try:
            problems = verify_shards(path, tokenizer=small_tokenizer(), workers=1).problems
        except UserError as error:
            problems = [str(error)]
        assert all(len(problem) < 1000 for problem in problems)
        try:
            found = read_everything(path)
        except UserError as error:
            assert problems, f"{seed}: {name}: verify found nothing, but: {error}"
        else:
            if not problems and not bare:
                assert found == expected, f"{seed}: {name}: wrong data, and verify found nothing"
        harmless += not problems
        told += bool(problems)
    assert told > 450 and harmless + told == 600
