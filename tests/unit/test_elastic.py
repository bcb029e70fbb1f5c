"""A run that is killed, moved to other sizes and given other data reads each sample that it should, once."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import WORDS, small_tokenizer, write_jsonl

from llama_dist.checkpoint.store import Checkpoint, Position, open_place
from llama_dist.cli import main
from llama_dist.config import RunConfig, build_config, dump_config
from llama_dist.config_data import CurriculumStep, DataConfig, Source
from llama_dist.data.history import History, switch_between
from llama_dist.data.loader import Batch, Loader
from llama_dist.data.mixture import Mixture, Phase
from llama_dist.data.packing import pack
from llama_dist.data.prefetch import Prefetching
from llama_dist.data.prepare import prepare
from llama_dist.data.shards import Shards
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.why import explain
from llama_dist.errors import UserError
from llama_dist.train.resume import check_same_run, history_of

SEQ_LEN = 16


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard directories web, books and code, of different sizes; no sample is twice in them."""
    home = tmp_path_factory.mktemp("elastic")
    words = random.Random(0)
    for name, documents in (("web", 20), ("books", 9), ("code", 12)):
        texts = [" ".join(words.choices(WORDS, k=60)) for _ in range(documents)]
        made_from = write_jsonl(home / f"{name}.jsonl", texts)
        prepare([made_from], small_tokenizer(), home / name, workers=1, pair_tokens=300)
    return home


def source(home: Path, name: str, weight: float = 1.0, **more: float) -> Source:
    return Source(shards=str(home / name), name=name, weight=weight, **more)


def data_of(*sources: Source, **settings: object) -> DataConfig:
    return DataConfig(tokenizer=str(small_tokenizer()), train=list(sources), seq_len=SEQ_LEN, **settings)


def loaders(data: DataConfig, *, batch: int, dp: int) -> list[Loader]:
    return [
        Loader(data, vocab_size=340, global_batch=batch, micro_batch=1, dp=dp, dp_rank=rank) for rank in range(dp)
    ]


def row_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def windows(home: Path, name: str) -> list[tuple[int, ...]]:
    shards = Shards(home / name)
    tokens = shards.tokens(0, shards.num_tokens).tolist()
    return [tuple(tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1]) for i in range((len(tokens) - 1) // SEQ_LEN)]


def test_each_sample_once_an_epoch_over_three_reshapes_and_two_switches(home: Path) -> None:
    """What the ranks were given, counted by its tokens. Each start goes on from a checkpoint, as after a kill."""
    web, books, code = source(home, "web", 3), source(home, "books"), source(home, "code", 2)
    starts = [  # batch, dp, steps that are saved, steps that a kill loses, sources
        (24, 1, 5, 2, [web, books]),
        (24, 3, 4, 0, [web, books]),
        (24, 8, 4, 1, [source(home, "books", 2), code]),  # web is taken out, code is new: the first switch
        (16, 2, 9, 3, [source(home, "books", 2), code]),
        (16, 4, 12, 0, [code, web, source(home, "books", 5)]),  # web is back: the second
    ]
    position, history, read, switches = Position(), None, [], 0
    for batch, dp, saved, lost, sources in starts:
        ranks = loaders(data_of(*sources), batch=batch, dp=dp)
        begun = [rank.begin(history, step=position.step, samples=position.samples, steps=500) for rank in ranks]
        assert all(other == begun[0] for other in begun)
        switches += history is not None and switch_between(history, begun[0], position.samples) is not None
        history, at = History.from_json(json.loads(json.dumps(begun[0].to_json()))), position
        readers = [Prefetching(rank, steps=2, until=at.samples + 500 * batch) for rank in ranks]
        for step in range(saved + lost):
            row = [row for reader in readers for row in row_of(reader.microbatches(at.samples))]
            assert len(row) == batch
            at = at.next(batch)
            if step < saved:
                read += row
                position = at
        for reader in readers:
            reader.close()
    assert switches == 2 and len(read) == position.samples
    taken = Mixture(history.phases).taken(position.samples) if history else {}
    for number, name in enumerate(("web", "books", "code")):
        expected = windows(home, name)
        assert len(set(expected)) == len(expected)
        counts = Counter(row for row in read if row in set(expected))
        assert sum(counts.values()) == taken[number] > len(expected)
        assert max(counts.values()) - min(counts[row] for row in expected) <= 1, "no sample twice before all were read"


def test_epochs_and_curriculum_reach_the_batches(home: Path) -> None:
    small = windows(home, "books")
    data = data_of(
        source(home, "web", 3),
        source(home, "books", 1, epochs=1.5),
        curriculum=[CurriculumStep(step=4, weights={"books": 1, "web": 1})],
    )
    for dp in (1, 2, 4):
        ranks = loaders(data, batch=8, dp=dp)
        for rank in ranks:
            rank.begin(steps=60)
        rows = [row for step in range(60) for rank in ranks for row in row_of(rank.microbatches(8 * step))]
        assert [sum(row in small for row in rows[at : at + 8]) for at in (0, 8, 16, 24, 32)] == [2, 2, 2, 4, 4]
        assert sum(row in small for row in rows) == int(1.5 * len(small))
        counts = Counter(row for row in rows if row in small)
        assert sorted(counts.values()) == [1] * (len(small) - len(small) // 2) + [2] * (len(small) // 2)


def test_reading_behind_the_end_of_the_data_is_refused(home: Path) -> None:
    data = data_of(source(home, "books", epochs=1))
    (loader,) = loaders(data, batch=4, dp=1)
    whole = len(windows(home, "books")) // 4
    with pytest.raises(UserError, match=f"the data ends before step {whole + 1} is whole"):
        loader.begin(steps=whole + 1)
    loader.begin(steps=whole)
    loader.begin()
    assert len(loader.microbatches(4 * (whole - 1))) == 4
    with pytest.raises(UserError, match="the data ends at"):
        loader.microbatches(4 * whole)


def test_best_fit_samples_come_with_their_masks(home: Path) -> None:
    for name in ("web", "books"):
        pack(home / name, seq_len=SEQ_LEN, workers=1)
    sources = (source(home, "web", 2), source(home, "books"))
    (whole,) = loaders(data_of(*sources, packing="best_fit", document_mask=True), batch=12, dp=1)
    ranks = loaders(data_of(*sources, packing="best_fit"), batch=12, dp=3)
    padded = 0
    for consumed in (0, 12, 600):
        expected = whole.microbatches(consumed)
        found = [batch for rank in ranks for batch in rank.microbatches(consumed)]
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.tokens, other.tokens) and torch.equal(one.counted, other.counted)
            assert one.counted.shape == (1, SEQ_LEN) and one.counted.dtype == torch.bool
            assert other.documents is None and one.documents[0][0] == 0
            # The first token of every document that is not the sample's first is no target.
            assert not any(one.counted[0, start - 1] for start in one.documents[0][1:])
            padded += int((~one.counted).sum())
    assert padded


def test_why_tells_what_the_loader_gave(home: Path) -> None:
    only_books = CurriculumStep(step=3, weights={"books": 1})
    data = data_of(source(home, "web", 3), source(home, "books"), curriculum=[only_books])
    (loader,) = loaders(data, batch=8, dp=1)
    history = loader.begin(steps=9)
    for step in range(1, 10):
        positions = history.positions_of(step)
        told = list(explain(history, positions, data, vocab_size=340))
        assert [tuple(sample.tokens.tolist()) for sample in told] == row_of(loader.microbatches(positions.start))
        for sample in told:
            shards = Shards(home / sample.source)
            parts = [shards.document(part.document)[part.start : part.stop] for part in sample.parts]
            assert np.array_equal(np.concatenate(parts), sample.tokens)
            assert all(part.size == len(shards.document(part.document)) for part in sample.parts)
            assert all(Path(part.file).parent == home / sample.source for part in sample.parts)
            assert sample.epoch == sample.own // len(windows(home, sample.source))
    assert {sample.source for sample in told} == {"books"}


def run_of(home: Path, folder: Path, data: DataConfig, **train: int) -> RunConfig:
    values = {
        "name": "r",
        "folder": str(folder),
        "model": {
            "vocab_size": 340, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 64,
        },
        "data": data.model_dump(mode="json"),
        "optim": {"lr": 1e-3},
        "train": {"steps": 50, "global_batch": 8, **train},
    }  # fmt: skip
    return build_config(RunConfig, values, where="test")


def test_why_on_the_command_line(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(source(home, "web", 3), source(home, "books"))
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(run_of(home, tmp_path / "run", data)))

    def why(*words: object) -> list[str]:
        assert main(["data", "why", *map(str, words)]) == 0
        return capsys.readouterr().out.splitlines()

    lines = why(config, "--step", 2)
    assert lines[0] == f"step 2 of {config}: samples 8 to 15 of the run; web 75%, books 25%"
    samples = [line for line in lines if line.startswith("sample ")]
    assert len(samples) == 8 and samples[0].startswith("sample 8: web, its sample ")
    assert f"  {home}/web/0000" in "\n".join(lines) and ".bin: document " in "\n".join(lines)
    told = [json.loads(line) for line in why(config, "--step", 2, "--json")]
    (loader,) = loaders(data, batch=8, dp=1)
    tokenizer = load_tokenizer(small_tokenizer())
    assert [line["begins"] for line in told] == [tokenizer.decode(list(row)) for row in row_of(loader.microbatches(8))]
    assert [line["position"] for line in told] == list(range(8, 16))
    shared = [why(config, "--step", 2, "--json", "--dp", 4, "--replica", r) for r in range(4)]
    assert [json.loads(line) for lines in shared for line in lines] == told


def test_why_of_a_run_folder_takes_what_was_recorded(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The batch changed after step 10, the mixture after step 20; config.yaml has only the last of both."""
    then, now = data_of(source(home, "web")), data_of(source(home, "code", 1, epochs=9), source(home, "books"))
    history = loaders(then, batch=8, dp=1)[0].begin()
    history = loaders(then, batch=12, dp=1)[0].begin(history, step=10, samples=80)
    history = loaders(now, batch=12, dp=1)[0].begin(history, step=20, samples=200)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(run_of(home, folder, now, global_batch=12)))
    layout = {"dp": 2, "tp": 1, "pp": 2, "cp": 1}
    events = [
        {"event": "start", "attempt": 3, "layout": layout},
        {"event": "data", "attempt": 3, "step": 20, "samples": 200, "history": history.to_json()},
    ]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))

    def why(*words: object) -> list[dict[str, object]]:
        assert main(["data", "why", str(folder), "--json", *map(str, words)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    for step, first, count, sources in ((10, 72, 8, {"web"}), (11, 80, 12, {"web"}), (21, 200, 12, {"code", "books"})):
        told = why("--step", step)
        assert [line["position"] for line in told] == list(range(first, first + count))
        assert {line["source"] for line in told} == sources
    told = why("--step", 30)
    assert [why("--step", 30, "--replica", replica) for replica in range(2)] == [told[:6], told[6:]]
    by_rank = [why("--step", 30, "--rank", rank) for rank in range(4)]
    assert sorted(by_rank, key=str) == sorted([told[:6], told[:6], told[6:], told[6:]], key=str)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["{folder}/absent", "--step", "1"], "absent: there is no such file"),
        (["{folder}", "--step", "1"], "is no run folder (ledger.jsonl)"),
        (["{folder}/run.yaml", "--step", "0"], "--step=0: steps count from 1"),
        (["{folder}/run.yaml", "--step", "1", "--replica", "0"], "parallel.dp is auto; say of how many"),
        (["{folder}/run.yaml", "--step", "1", "--replica", "3", "--dp", "3"], "the 8 samples of a step are shared out"),
        (["{folder}/run.yaml", "--step", "1", "--replica", "4", "--dp", "4"], "counted from 0"),
        (["{folder}/run.yaml", "--step", "1", "--rank", "0"], "no layout is known here; use --replica with --dp"),
        (["{folder}/run.yaml", "--step", "900"], "the data ends before step"),
    ],
)
def test_what_why_cannot_tell_is_one_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], problem: str
) -> None:
    data = data_of(source(home, "web", epochs=3))
    (tmp_path / "run.yaml").write_text(dump_config(run_of(home, tmp_path / "run", data)))
    assert main(["data", "why", *(word.format(folder=tmp_path) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line


def test_sources_that_have_changed_since_are_not_explained(home: Path, tmp_path: Path) -> None:
    data = data_of(source(home, "web"))
    history = loaders(data, batch=8, dp=1)[0].begin()
    known = history.sources[0]
    elsewhere = type(known)(known.name, known.identity, {**known.source, "shards": str(home / "books")})
    with pytest.raises(UserError, match="books: holds something else than when the run read it as 'web'"):
        list(explain(History((elsewhere,), history.phases, history.paces), range(8), data, vocab_size=340))


# Checkpoints from before there were histories


def old_checkpoint(run: RunConfig, position: Position, folder: Path) -> Checkpoint:
    """As they were: the config without what came later, and one hash of the shard files and weights."""
    digest = hashlib.sha256()
    for settings in run.data.train:
        manifest = Shards(settings.shards).manifest
        assert manifest is not None
        digest.update(json.dumps([manifest.files, settings.weight], sort_keys=True).encode())
    config = run.model_dump(mode="json")
    for settings in config["data"]["train"]:
        del settings["name"], settings["epochs"]
    for name in ("packing", "prefetch", "cache", "cache_gb", "curriculum"):
        del config["data"][name]
    return Checkpoint(open_place(folder), "old", position, {"config": config, "data_fingerprint": digest.hexdigest()})


def plain_run(home: Path, folder: Path, weights: dict[str, float], **train: int) -> RunConfig:
    sources = [Source(shards=str(home / name), weight=weight) for name, weight in weights.items()]
    return run_of(home, folder, data_of(*sources), **train)


def test_old_checkpoints_go_on_as_they_did(home: Path, tmp_path: Path) -> None:
    run = plain_run(home, tmp_path, {"web": 3, "books": 1})
    checkpoint = old_checkpoint(run, Position(10, 80), tmp_path)
    check_same_run(checkpoint, run)
    (loader,) = loaders(run.data, batch=8, dp=1)
    history = loader.begin(history_of(checkpoint, run), step=10, samples=80)
    assert history == loader.begin()
    assert history.phases == (Phase(0, ((0, 3.0), (1, 1.0))),)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("web", "books"):
        (moved / name).symlink_to(home / name)
    elsewhere = plain_run(moved, tmp_path, {"web": 3, "books": 1})
    assert [known.identity for known in history_of(checkpoint, elsewhere).sources] == [
        known.identity for known in history.sources
    ]


def test_old_checkpoints_may_switch_too_while_their_data_is_there(home: Path, tmp_path: Path) -> None:
    run = plain_run(home, tmp_path, {"web": 3, "books": 1})
    checkpoint = old_checkpoint(run, Position(10, 80), tmp_path)
    other = plain_run(home, tmp_path, {"code": 1, "web": 1}, global_batch=16)
    then = history_of(checkpoint, other)
    (loader,) = loaders(other.data, batch=16, dp=1)
    history = loader.begin(then, step=10, samples=80)
    assert [p.first for p in history.phases] == [0, 80] and history.phases[1].numbers == [0, 2]
    assert history.positions_of(10) == range(72, 80) and history.positions_of(11) == range(80, 96)
    assert "web 75%" in (switch_between(then, history, 80) or "")
    checkpoint.manifest["data_fingerprint"] = "of something else"
    with pytest.raises(UserError, match="data.train: other shards or weights than then, and this checkpoint is too"):
        history_of(checkpoint, run)


def test_new_checkpoints_keep_the_history(home: Path, tmp_path: Path) -> None:
    run = run_of(home, tmp_path, data_of(source(home, "web"), source(home, "books")))
    (loader,) = loaders(run.data, batch=8, dp=1)
    history = loader.begin()
    manifest = {"config": run.model_dump(mode="json"), "data": json.loads(json.dumps(history.to_json()))}
    checkpoint = Checkpoint(open_place(tmp_path), "new", Position(10, 80), manifest)
    assert history_of(checkpoint, run) == history
    changes = ({"packing": "best_fit"}, "data.packing: concat then"), ({"seed": 3}, "data.seed: 0 then, 3 now")
    for change, told in changes:
        with pytest.raises(UserError, match=told):
            check_same_run(checkpoint, run.model_copy(update={"data": run.data.model_copy(update=change)}))
