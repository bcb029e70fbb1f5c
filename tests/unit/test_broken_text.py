"""Files of every format, broken at random: each ends in a UserError or is counted, and no intact text is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from text_helpers import WRITERS, texts_of

from llama_dist.data.documents import Document, Reading, Skipped, read_part
from llama_dist.data.inputs import cut, list_inputs
from llama_dist.errors import UserError

SEEDS = 24
READING = Reading(txt="line", max_document_bytes=2_000)
BY_LINE = (".jsonl", ".ndjson", ".txt")


def truncate(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def flip(raw: bytes, draw: random.Random) -> bytes:
    broken = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        broken[draw.randrange(len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


def nuls(raw: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw))
    length = draw.choice((1, 8, 100, 4096))
    return raw[:start] + b"\0" * length + raw[start + (length if draw.random() < 0.7 else 0) :]


def swap(raw: bytes, draw: random.Random) -> bytes:
    a, b, c = sorted(draw.randrange(len(raw)) for _ in range(3))
    return raw[:a] + raw[b:c] + raw[a:b] + raw[c:]


def gigantic_line(raw: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw))
    return raw[:start] + draw.choice((b"x", b"[", b'"', b"\\", b"9", b" ", b"\xff")) * 5_000 + raw[start:]


def garbage(raw: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(raw))
    return raw[:start] + draw.randbytes(draw.choice((1, 3, 50))) + raw[start:]


def another_encoding(raw: bytes, draw: random.Random) -> bytes:
    return raw.decode(errors="replace").encode(draw.choice(("utf-16", "utf-16-le", "utf-32", "latin-1")), "replace")


def bad_json(raw: bytes, draw: random.Random) -> bytes:
    changes = ((b'"', b""), (b"{", b"["), (b":", b""), (b"}", b"}}"), (b"text", b"txt"), (b'"text": ', b""))
    old, new = draw.choice(changes)
    places = [i for i in range(len(raw)) if raw.startswith(old, i)] or [0]
    place = draw.choice(places)
    return raw[:place] + new + raw[place + len(old) :]


def empty(raw: bytes, draw: random.Random) -> bytes:
    return b""


BREAKS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    truncate,
    flip,
    nuls,
    swap,
    gigantic_line,
    garbage,
    another_encoding,
    bad_json,
    empty,
)


@pytest.mark.parametrize("suffix", WRITERS)
def test_whatever_is_broken_is_told(tmp_path: Path, suffix: str) -> None:
    texts = texts_of(40)
    whole = WRITERS[suffix](tmp_path / f"whole{suffix}", texts).read_bytes()
    for seed in range(SEEDS):
        for kind in BREAKS:
            raw = kind(whole, random.Random(f"{suffix} {kind.__name__} {seed}"))
            file = tmp_path / f"broken{suffix}"
            file.write_bytes(raw)
            found, skipped, stopped = outcome(file, part_bytes=700)
            name = f"{suffix} {kind.__name__} {seed}: {[str(s) for s in skipped[:3]]} {stopped}"
            if raw != whole:
                check(whole, raw, texts, found, skipped, stopped, suffix, name)


def outcome(file: Path, *, part_bytes: int) -> tuple[list[str], list[Skipped], str]:
    """Texts, what was skipped, and the message of the UserError that ended it."""
    found: list[str] = []
    skipped: list[Skipped] = []
    try:
        for item in items_of(file, part_bytes=part_bytes):
            if isinstance(item, Document):
                item.id.encode(), item.text.encode()
                found.append(item.text)
            else:
                str(item).encode()
                assert item.count >= 1 and len(item.reason) < 1_000
                skipped.append(item)
    except UserError as error:
        return found, skipped, str(error)
    return found, skipped, ""


def items_of(file: Path, *, part_bytes: int) -> Iterator[Document | Skipped]:
    for part in cut(list_inputs([file]), part_bytes):
        yield from read_part(part, READING)


def check(
    whole: bytes,
    raw: bytes,
    texts: list[str],
    found: list[str],
    skipped: list[Skipped],
    stopped: str,
    suffix: str,
    name: str,
) -> None:
    assert all(text and "\0" not in text and len(text.encode()) <= READING.max_document_bytes for text in found), name
    if suffix in BY_LINE:
        # Every line that is still there as it was still comes.
        lines = raw.split(b"\n")
        intact = [t for t, line in zip(texts, whole.split(b"\n"), strict=False) if line in lines]
        assert not stopped and set(intact) <= set(found), name
    elif suffix.endswith((".gz", ".bz2", ".xz", ".zst", ".checked.parquet")):
        # A checksum says which text is as it was.
        assert set(found) <= set(texts), name
        assert set(found) == set(texts) or skipped or stopped, name
    elif raw and suffix in (".csv", ".tsv") and whole.startswith(raw):
        # A row need not end in a line end, so a shorter table is a table.
        assert found[:-1] == texts[: max(len(found) - 1, 0)] or stopped, name
    elif not (skipped or stopped):
        # Nothing was noticed: then nothing is missing, though without a checksum letters may have changed.
        assert len(found) >= len(texts) - 2, name


def test_a_truncated_compressed_file_is_left_out(tmp_path: Path) -> None:
    for suffix in (".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".jsonl.zst", ".csv.gz", ".txt.zst", ".json.xz"):
        file = WRITERS[suffix](tmp_path / f"a{suffix}", texts_of(40))
        raw = file.read_bytes()
        for length in (len(raw) - 1, len(raw) - 20, len(raw) // 2, 3, 0):
            file.write_bytes(raw[:length])
            found, skipped, stopped = outcome(file, part_bytes=700)
            assert (found, [s.kind for s in skipped], stopped) == ([], ["file"], ""), (suffix, length)
            assert "too early" in skipped[0].reason or "empty" in skipped[0].reason
