"""Best-fit packing: each token once, few documents cut, the same index whoever makes it, damage told."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_dist.commands import pack as command
from llama_dist.data import packing as packing_module
from llama_dist.data.best_fit import best_fit, cut_documents
from llama_dist.data.packing import PACKING, BestFit, find_packing_damage, index_folder, load_packing, pack
from llama_dist.data.shard_writer import ShardWriter
from llama_dist.data.shards import MANIFEST, Manifest, Shards
from llama_dist.errors import UserError

EOS = 99_999
SEQ_LEN = 16
LENGTHS = [2, 17, 18, 5, 1, 40, 3, 3, 0, 16, 33, 9, 150, 7, 2, 2, 12, 17]


def make(folder: Path, lengths: list[int], *, pair_tokens: int = 1 << 30) -> Path:
    """A shard directory in which token i has the id i, so that each is known when it is met again."""
    folder.mkdir(parents=True)
    with ShardWriter(folder, vocab_size=100_000, pair_tokens=pair_tokens) as writer:
        for start, length in zip(np.cumsum(lengths) - lengths, lengths, strict=True):
            writer.add(np.arange(start, start + length), np.array([length]))
        writer.finish()
    manifest = Manifest(
        tokens=sum(lengths),
        documents=len(lengths),
        raw_bytes=0,
        unigram_entropy=0.0,
        dtype="int32",
        tokenizer={"file": "none", "fingerprint": "none", "vocab_size": 100_000, "bos_id": None, "eos_id": EOS},
        inputs=[],
        files=writer.files,
        command="none",
    )
    (folder / MANIFEST).write_bytes(manifest.to_json())
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make(tmp_path / "shards", LENGTHS, pair_tokens=70)


def best_fit_on_paper(sizes: list[int], room: int) -> list[int]:
    """The room left in each bin, rising."""
    bins: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [left for left in bins if left >= size]
        left = min(fitting, default=room)
        if fitting:
            bins.remove(left)
        bins.append(left - size)
    return sorted(bins)


@pytest.mark.parametrize("seed", range(40))
def test_bins_are_those_of_best_fit_decreasing(seed: int) -> None:
    random_ = np.random.default_rng(seed)
    room, count = random_.integers(1, 60), random_.integers(0, 300)
    sizes = random_.integers(1, room + 1, count)
    order, counts = best_fit(sizes, int(room))
    assert sorted(order.tolist()) == list(range(count))
    bins = np.split(sizes[order], np.cumsum(counts)[:-1]) if count else []
    assert sorted(int(room - one.sum()) for one in bins) == best_fit_on_paper(sizes.tolist(), int(room))


def test_documents_are_cut_where_they_must_be() -> None:
    starts, sizes = cut_documents(np.array(LENGTHS), SEQ_LEN)
    pieces = list(zip(starts.tolist(), sizes.tolist(), strict=True))
    begin = 0
    for length in LENGTHS:
        own = [(start, size) for start, size in pieces if begin <= start < begin + length]
        if length <= SEQ_LEN + 1:
            assert own == [(begin, length)] * (length > 1)
        targets = [token for start, size in own for token in range(start + 1, start + size)]
        assert targets == list(range(begin + 1, begin + length))
        assert all(size == SEQ_LEN + 1 for _, size in own[:-1])
        begin += length


def test_in_an_epoch_each_token_counts_once_but_the_first_of_a_document(shards: Path) -> None:
    assert len(list(shards.glob("*.bin"))) >= 3
    pack(shards, seq_len=SEQ_LEN)
    samples = BestFit(Shards(shards), SEQ_LEN)
    assert samples.size == load_packing(shards, SEQ_LEN).total("samples")
    order = samples.at(np.arange(3 * samples.size), seed=1, number=0).reshape(3, -1)
    assert all(sorted(epoch) == list(range(samples.size)) for epoch in order.tolist())
    assert len({tuple(epoch) for epoch in order.tolist()}) == 3
    rows = samples.rows(order[0])
    assert rows.tokens.shape == (samples.size, SEQ_LEN + 1) and rows.counted is not None and rows.documents is not None
    ends = np.cumsum(LENGTHS)
    firsts = {int(end - length) for end, length in zip(ends, LENGTHS, strict=True) if length}
    assert sorted(rows.tokens[:, 1:][rows.counted].tolist()) == sorted({*range(ends[-1])} - firsts)
    for tokens, counted, begins, sample in zip(rows.tokens, rows.counted, rows.documents, order[0].tolist(), strict=True):
        assert begins[0] == 0 and list(begins) == sorted({*begins}) and begins[-1] < SEQ_LEN
        # Within a piece every token is the next one's context; a target that does not count begins one, or is padding.
        assert (np.diff(tokens.astype(np.int64))[counted] == 1).all()
        barred = np.flatnonzero(~counted)
        assert all(place + 1 in (*begins, SEQ_LEN) or tokens[place + 1] == EOS for place in barred.tolist())
        at = 0
        for span in samples.spans(sample):
            first = int(ends[span.document]) - LENGTHS[span.document]
            assert tokens[at : at + span.stop - span.start].tolist() == list(range(first + span.start, first + span.stop))
            assert at in begins
            at += span.stop - span.start
        assert (tokens[at:] == EOS).all()
    samples.prefetch(order[0])


def test_what_is_told_of_it(shards: Path) -> None:
    packing, already_there = pack(shards, seq_len=SEQ_LEN)
    assert not already_there
    assert packing.total("cut") == sum(length > SEQ_LEN + 1 for length in LENGTHS)
    assert packing.total("short") == sum(length < 2 for length in LENGTHS)
    begins = np.cumsum(LENGTHS) - LENGTHS
    cuts = range(0, sum(LENGTHS), SEQ_LEN)
    inside = [sum(b < cut < b + n - 1 for cut in cuts) > 0 for b, n in zip(begins, LENGTHS, strict=True)]
    assert packing.total("cut_by_concat") == sum(inside)
    rows = BestFit(Shards(shards), SEQ_LEN).rows(np.arange(packing.total("samples")))
    assert packing.total("padding") == (rows.tokens == EOS).sum()
    again, already_there = pack(shards, seq_len=SEQ_LEN)
    assert already_there and again == packing
    assert pack(shards, seq_len=8)[0].seq_len == 8, "another length has an index of its own"


def test_the_index_is_the_same_for_any_number_of_workers(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing_module, "WORKER_TOKENS", 1)
    content = []
    for workers in (1, 3):
        pack(shards, seq_len=SEQ_LEN, workers=workers)
        folder = index_folder(shards, SEQ_LEN)
        content.append({file.name: file.read_bytes() for file in folder.iterdir()})
        shutil.rmtree(folder)
    assert content[0] == content[1]
    assert len(content[0]) == 1 + len(list(shards.glob("*.bin")))


def test_a_bare_pair_has_its_index_beside_it(tmp_path: Path) -> None:
    prefix = make(tmp_path / "shards", LENGTHS) / "00000"
    (tmp_path / "shards" / MANIFEST).unlink()
    pack(prefix, seq_len=SEQ_LEN)
    assert (tmp_path / "shards/00000.packed-16" / PACKING).is_file()
    samples = BestFit(Shards(prefix), SEQ_LEN)
    assert samples.size is not None
    rows = samples.rows(np.arange(samples.size))
    assert rows.counted is not None
    assert rows.counted.sum() == sum(max(length - 1, 0) for length in LENGTHS)


def test_one_that_is_missing_is_a_command_to_run(shards: Path) -> None:
    with pytest.raises(UserError, match=f"data.seq_len=16; make it with `llama-dist pack {shards} --seq-len 16`"):
        BestFit(Shards(shards), SEQ_LEN)


def test_one_of_other_shards_is_refused(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", LENGTHS), make(tmp_path / "other", LENGTHS[::-1])
    pack(one, seq_len=SEQ_LEN)
    shutil.copytree(index_folder(one, SEQ_LEN), index_folder(other, SEQ_LEN))
    for use in (lambda: BestFit(Shards(other), SEQ_LEN), lambda: pack(other, seq_len=SEQ_LEN)):
        with pytest.raises(UserError, match="packed-16: is of other shards; remove it"):
            use()
    shutil.copytree(one, tmp_path / "moved")
    assert BestFit(Shards(tmp_path / "moved"), SEQ_LEN).size, "a copy of shards and index is as good"


def cannot_be_written(folder: Path) -> None:
    (folder / "packed-16").write_text("a file in the way")


WRONG: dict[str, tuple[Callable[[Path], object], int, int | None, str]] = {
    "seq_len": (lambda folder: None, 0, None, "seq_len=0: must be at least 1"),
    "workers": (lambda folder: None, SEQ_LEN, 0, "workers=0: must be at least 1"),
    "in the way": (cannot_be_written, SEQ_LEN, None, "packed-16"),
    "short": (lambda folder: (folder / "00000.idx").write_bytes(b""), SEQ_LEN, None, "00000.idx: is cut short"),
    "missing": (lambda folder: (folder / "00000.bin").unlink(), SEQ_LEN, None, "00000.bin"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_packed_is_told_and_leaves_nothing(shards: Path, what: str) -> None:
    spoil, seq_len, workers, message = WRONG[what]
    spoil(shards)
    before = sorted(shards.iterdir())
    with pytest.raises(UserError, match=message):
        pack(shards, seq_len=seq_len, workers=workers)
    assert sorted(shards.iterdir()) == before


def test_a_folder_that_cannot_be_written_to_is_told(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(packing_module, "new_folder", refuse)
    with pytest.raises(UserError, match="packed-16: cannot be written to: Permission denied; .* copy them"):
        pack(shards, seq_len=SEQ_LEN)


def test_shards_with_nothing_to_predict_are_refused(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", [1, 1, 1])
    with pytest.raises(UserError, match="no document has two tokens"):
        pack(shards, seq_len=SEQ_LEN)
    assert not index_folder(shards, SEQ_LEN).exists()


def test_no_damage_is_a_crash_and_none_goes_unseen(shards: Path) -> None:
    pack(shards, seq_len=SEQ_LEN)
    folder = index_folder(shards, SEQ_LEN)
    whole = {file: file.read_bytes() for file in folder.iterdir()}
    chosen = random.Random(0)
    expected = BestFit(Shards(shards), SEQ_LEN).rows(np.arange(10)).tokens
    for _ in range(300):
        file = chosen.choice(sorted(whole))
        content = bytearray(whole[file])
        match chosen.choice(("flip", "cut", "empty", "more")):
            case "flip":
                content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
            case "cut":
                del content[chosen.randrange(len(content)) :]
            case "empty":
                content.clear()
            case "more":
                content += b"\0\0\0\0"
        file.write_bytes(content)
        try:
            found = BestFit(Shards(shards), SEQ_LEN).rows(np.arange(10)).tokens
            told = bool(find_packing_damage(shards, SEQ_LEN))
        except UserError as error:
            assert str(folder) in str(error) or "packed samples" in str(error)
            told = True
        assert told or np.array_equal(found, expected), file
        file.write_bytes(whole[file])
    assert find_packing_damage(shards, SEQ_LEN) == []


def test_the_command_says_how_good_it_is(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args([str(shards), "--seq-len", "16"])
    assert command.run(arguments) == 0
    said = capsys.readouterr().out
    assert "documents cut" in said and "concatenated" in said and "left out          2 documents" in said
    assert command.run(arguments) == 0
    assert "there already; nothing was done" in capsys.readouterr().out
    assert json.loads((index_folder(shards, SEQ_LEN) / PACKING).read_text())["seq_len"] == SEQ_LEN
