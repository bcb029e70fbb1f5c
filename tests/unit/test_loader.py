"""Micro-batches are a function of the samples consumed; ranks and micro-batches only cut the same row of samples."""

from __future__ import annotations

import random
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from data_helpers import make_shards, small_tokenizer, text_of

from llama_dist.config_data import DataConfig, Source
from llama_dist.data.loader import Batch, Loader, document_starts
from llama_dist.data.order import sample_at
from llama_dist.data.packing import identity_of
from llama_dist.data.shards import Manifest, Shards
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.vocabulary import train_tokenizer
from llama_dist.errors import UserError

SEQ_LEN = 16


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return [str(make_shards(folder, documents=n, first=first, pair_tokens=300)) for n, first in ((20, 0), (9, 500))]


def build(
    paths: list[str],
    *,
    weights: tuple[float, ...] = (0.75, 0.25),
    seed: int = 0,
    document_mask: bool = False,
    **layout: int,
) -> Loader:
    data = DataConfig(
        tokenizer=str(small_tokenizer()),
        train=[Source(shards=path, weight=weight) for path, weight in zip(paths, weights, strict=False)],
        seq_len=SEQ_LEN,
        seed=seed,
        document_mask=document_mask,
    )
    defaults = {"vocab_size": 340, "global_batch": 16, "micro_batch": 1, "dp": 1, "dp_rank": 0}
    return Loader(data, **{**defaults, **layout})


def tokens_of(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.tokens for batch in batches])


@pytest.mark.parametrize("dp", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_every_layout_reads_the_same_samples(two_sources: list[str], dp: int, micro_batch: int) -> None:
    plain = build(two_sources, global_batch=48, micro_batch=48)
    ranks = [build(two_sources, global_batch=48, dp=dp, dp_rank=r, micro_batch=micro_batch) for r in range(dp)]
    for consumed in (0, 48, 96, 480, 48_000, 48_007):
        (expected,) = plain.microbatches(consumed)
        batches = [batch for rank in ranks for batch in rank.microbatches(consumed)]
        assert all(b.tokens.shape == (micro_batch, SEQ_LEN + 1) and b.tokens.dtype == torch.int64 for b in batches)
        assert torch.equal(tokens_of(batches), expected.tokens)
        assert {batch.documents for batch in batches} == {batch.counted for batch in batches} == {None}


def test_steps_out_of_order_are_those_in_order(two_sources: list[str]) -> None:
    """Places are looked up for many steps at once and kept; it does not show."""
    in_order = build(two_sources, global_batch=3)
    expected = {consumed: tokens_of(in_order.microbatches(consumed)) for consumed in range(0, 12_000, 3)}
    chosen = random.Random(5).sample(sorted(expected), 200)
    jumping = build(two_sources, global_batch=3)
    for consumed in chosen:
        jumping.prefetch(consumed)
        assert torch.equal(tokens_of(jumping.microbatches(consumed)), expected[consumed])


def test_another_global_batch_reads_the_same_row(two_sources: list[str]) -> None:
    small, large = build(two_sources, global_batch=8), build(two_sources, global_batch=24)
    row = [batch for consumed in (48, 56, 64) for batch in small.microbatches(consumed)]
    assert torch.equal(tokens_of(row), tokens_of(large.microbatches(48)))


def test_samples_are_windows_that_share_one_token(two_sources: list[str]) -> None:
    shards = Shards(two_sources[0])
    loader = build(two_sources[:1], weights=(1.0,))
    assert loader.num_samples == [(shards.num_tokens - 1) // SEQ_LEN]
    n = loader.num_samples[0]
    _, sample = sample_at(range(16), sizes=[n], weights=[1.0], seed=0)
    for row, i in zip(tokens_of(loader.microbatches(0)).tolist(), sample.tolist(), strict=True):
        assert row == shards.tokens(i * SEQ_LEN, (i + 1) * SEQ_LEN + 1).tolist()


def test_the_middle_of_two_trillion_tokens_is_reached_at_once(tmp_path: Path) -> None:
    """Two thousand pairs of a billion tokens, in files with nothing in them: opened, sought in and read."""
    tokenizer = load_tokenizer(small_tokenizer())
    entry = {"bytes": 2 * 10**9, "xxh3_128": "0" * 32, "tokens": 10**9, "documents": 10**6}
    files: dict[str, dict[str, int | str]] = {}
    for i in range(2000):
        with open(tmp_path / f"{i:05d}.bin", "wb") as file:
            file.truncate(2 * 10**9)
        files[f"{i:05d}.bin"] = entry
        files[f"{i:05d}.idx"] = {"bytes": 1, "xxh3_128": "0" * 32}
    made_by = {
        "file": "small.model", "fingerprint": tokenizer.fingerprint, "vocab_size": 340, "bos_id": 1, "eos_id": 2,
    }  # fmt: skip
    manifest = Manifest(2 * 10**12, 2 * 10**9, 10**12, 1.0, "uint16", made_by, [], files, "a test")
    (tmp_path / "MANIFEST.json").write_bytes(manifest.to_json())
    data = DataConfig(tokenizer=str(small_tokenizer()), train=[Source(shards=str(tmp_path))], seq_len=2048)
    Loader(data, vocab_size=340, global_batch=64, micro_batch=8, dp=2, dp_rank=1)  # what is done once a process
    tracemalloc.start()
    started_at = time.process_time()
    loader = Loader(data, vocab_size=340, global_batch=64, micro_batch=8, dp=2, dp_rank=1)
    opened_at = time.process_time()
    batches = loader.microbatches(10**12 // 2048 // 64 * 64)
    seconds, opening = time.process_time() - opened_at, opened_at - started_at
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tokens_of(batches).shape == (32, 2049) and not tokens_of(batches).any()
    assert seconds < 0.05 and opening < 0.5 and peak < 50e6, (seconds, opening, peak)


def test_an_epoch_reads_every_sample_once_and_the_next_in_another_order(two_sources: list[str]) -> None:
    loader = build(two_sources[:1], weights=(1.0,), global_batch=1)
    n = loader.num_samples[0]
    first, second = ([tuple(loader.microbatches(e * n + k)[0].tokens[0].tolist()) for k in range(n)] for e in (0, 1))
    tokens = Shards(two_sources[0]).tokens(0, n * SEQ_LEN + 1).tolist()
    windows = [tuple(tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]) for i in range(n)]
    assert sorted(first) == sorted(second) == sorted(windows)
    assert first != second != windows != first


def test_seeds_give_other_orders(two_sources: list[str]) -> None:
    batches = {str(tokens_of(build(two_sources, seed=seed).microbatches(0)).tolist()) for seed in range(5)}
    assert len(batches) == 5


def test_weights_are_shares(two_sources: list[str]) -> None:
    loader = build(two_sources, global_batch=400)
    texts = tokens_of(loader.microbatches(0))
    second = Shards(two_sources[1])
    windows = {tuple(second.tokens(i * SEQ_LEN, (i + 1) * SEQ_LEN + 1).tolist()) for i in range(loader.num_samples[1])}
    assert sum(tuple(row) in windows for row in texts.tolist()) == 100


def test_shards_of_another_tokenizer_are_refused_by_name(two_sources: list[str], tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    train_tokenizer([text_of(i) for i in range(9)], vocab_size=300, out=other)
    data = DataConfig(tokenizer=str(other), train=[Source(shards=two_sources[0])], seq_len=SEQ_LEN)
    with pytest.raises(UserError, match="made with another tokenizer") as caught:
        Loader(data, vocab_size=340, global_batch=1, micro_batch=1, dp=1, dp_rank=0)
    assert str(other) in str(caught.value) and str(small_tokenizer()) in str(caught.value)
    with pytest.raises(UserError, match="there is no such tokenizer file"):
        Loader(data.model_copy(update={"tokenizer": str(tmp_path / "absent.model")}),
               vocab_size=340, global_batch=1, micro_batch=1, dp=1, dp_rank=0)  # fmt: skip


def test_a_vocabulary_larger_than_the_models_is_refused(two_sources: list[str]) -> None:
    with pytest.raises(UserError, match="model.vocab_size=339: .* use at least 340"):
        build(two_sources, vocab_size=339)
    build(two_sources, vocab_size=384)


def test_a_corpus_shorter_than_one_sample_is_refused_with_numbers(two_sources: list[str]) -> None:
    tokens = Shards(two_sources[0]).num_tokens
    data = DataConfig(tokenizer=str(small_tokenizer()), train=[Source(shards=two_sources[0])], seq_len=tokens)
    message = f"{tokens} tokens are fewer than the {tokens + 1} of one sample"
    with pytest.raises(UserError, match=message):
        Loader(data, vocab_size=340, global_batch=1, micro_batch=1, dp=1, dp_rank=0)
    fits = Loader(data.model_copy(update={"seq_len": tokens - 1}),
                  vocab_size=340, global_batch=1, micro_batch=1, dp=1, dp_rank=0)  # fmt: skip
    assert fits.num_samples == [1] and fits.microbatches(7)[0].tokens.shape == (1, tokens)


def test_a_batch_that_does_not_split_is_refused(two_sources: list[str]) -> None:
    with pytest.raises(UserError, match="global_batch=16 does not split into dp=3 times micro_batch=2"):
        build(two_sources, dp=3, micro_batch=2)


def test_an_id_outside_the_models_vocabulary_is_named_before_it_is_used(tmp_path: Path) -> None:
    path = make_shards(tmp_path, documents=20)
    for name in ("00000.bin", "00000.idx"):
        (tmp_path / f"bare{Path(name).suffix}").write_bytes((Path(path) / name).read_bytes())
    loader = build([str(tmp_path / "bare")], weights=(1.0,), vocab_size=10, global_batch=1)
    with pytest.raises(UserError, match=r"bare: sample \d+ holds the id \d+, and model.vocab_size is 10"):
        for samples in range(100):
            loader.microbatches(samples)


def test_bare_pairs_of_other_tokens_are_other_data(tmp_path: Path) -> None:
    path = Path(make_shards(tmp_path, documents=20))
    found = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.idx").write_bytes((path / "00000.idx").read_bytes())
        content = bytearray((path / "00000.bin").read_bytes())
        if name == "b":
            content[0:2], content[2:4] = content[2:4], content[0:2]
        (tmp_path / f"{name}.bin").write_bytes(content)
        found.append(identity_of(Shards(tmp_path / name)))
        assert identity_of(Shards(tmp_path / name)) == found[-1]
    assert found[0] != found[1]


BOS, EOS = 1, 2


@pytest.mark.parametrize(
    ("row", "bos_id", "starts"),
    [
        ([7, 7, 7, 7, 7], BOS, (0,)),
        ([BOS, 7, EOS, BOS, 7, EOS, 7], BOS, (0, 3)),
        ([7, EOS, BOS, 7, 7], BOS, (0, 2)),
        ([7, BOS, 7, BOS, 7], BOS, (0, 1, 3)),  # without an eos between
        ([7, EOS, 7, 7, 7], BOS, (0, 2)),  # without a bos after it
        ([7, EOS, EOS, 7, 7], None, (0, 2, 3)),
        ([EOS, 7, BOS, 7, 7], None, (0, 1)),  # the id of no bos
        ([7, 7, 7, EOS, BOS], BOS, (0,)),  # the last token is predicted, and no input
        ([7, 7, EOS, BOS, 7], BOS, (0, 3)),
        ([BOS, 7], BOS, (0,)),
    ],
)
def test_documents_begin_at_a_bos_or_after_an_eos(row: list[int], bos_id: int | None, starts: tuple[int, ...]) -> None:
    plain = [7] * len(row)
    assert document_starts(torch.tensor([row, plain]), bos_id=bos_id, eos_id=EOS) == (starts, (0,))


def test_masked_batches_say_where_the_documents_of_the_shards_begin(two_sources: list[str]) -> None:
    """Held to the shards' own index of documents."""
    shards = Shards(two_sources[0])
    loader = build(two_sources[:1], weights=(1.0,), document_mask=True, micro_batch=4)
    plain = build(two_sources[:1], weights=(1.0,), micro_batch=4)
    lengths = [len(shards.document(i)) for i in range(shards.num_documents)]
    begins = {sum(lengths[:i]) for i in range(len(lengths))}
    _, sample = sample_at(range(48), sizes=loader.num_samples, weights=[1.0], seed=0)
    found = [row for step in range(3) for batch in loader.microbatches(16 * step) for row in batch.documents or ()]
    windows = [range(int(i) * SEQ_LEN, (int(i) + 1) * SEQ_LEN) for i in sample]
    assert found == [tuple(p for p, t in enumerate(window) if p == 0 or t in begins) for window in windows]
    assert max(map(len, found)) > 1
    assert torch.equal(tokens_of(loader.microbatches(16)), tokens_of(plain.microbatches(16)))
    assert all(len(batch.documents or ()) == len(batch.tokens) == 4 for batch in loader.microbatches(0))
    assert load_tokenizer(small_tokenizer()).bos_id == BOS


def test_the_tokenizer_is_only_read_for_a_mask(two_sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise AssertionError(path)

    monkeypatch.setattr("llama_dist.data.loader.load_tokenizer", refuse)
    build(two_sources)
    with pytest.raises(AssertionError, match="small.model"):
        build(two_sources, document_mask=True)
