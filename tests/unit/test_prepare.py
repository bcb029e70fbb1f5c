"""Preparing: the same result for any number of workers, whole or not at all, never over something else."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from data_helpers import small_tokenizer, text_of, write_jsonl

from llama_dist.data import merge, plan, workers
from llama_dist.data import prepare as module
from llama_dist.data.inputs import list_inputs
from llama_dist.data.prepare import Node, find_node, prepare
from llama_dist.data.rows import Reading
from llama_dist.data.shards import Shards, verify
from llama_dist.data.tokenizer import load_tokenizer
from llama_dist.data.vocabulary import train_tokenizer
from llama_dist.errors import UserError


def test_any_number_of_workers_and_nodes_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that the command in the manifest is the same, too
    inputs = [write_jsonl(Path(f"{k}.jsonl"), [text_of(i) for i in range(100 * k, 100 * k + 60)]) for k in (0, 1)]
    found = []
    for workers, node in ((1, None), (2, None), (3, Node(1, 2)), (1, Node(6, 7))):
        prepare(inputs, small_tokenizer(), "out", workers=workers, node=node, unit_bytes=5000, pair_tokens=900)
        verify("out")
        found.append({file.name: file.read_bytes() for file in Path("out").iterdir()})
        shutil.rmtree("out")
    assert len(found[0]) > 20
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize("unit_bytes", [100, 300, 1000, 7000, 10**9])
def test_any_cut_gives_the_same_tokens(tmp_path: Path, unit_bytes: int) -> None:
    texts = [text_of(i, words=1 + i * i % 200) for i in range(40)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    prepare([source], small_tokenizer(), tmp_path / "out", workers=1, unit_bytes=unit_bytes)
    shards, tokenizer = Shards(tmp_path / "out"), load_tokenizer(small_tokenizer())
    expected = [[1, *tokenizer.encode(text), 2] for text in texts]
    assert [shards.document(i).tolist() for i in range(shards.num_documents)] == expected
    pairs = len(list((tmp_path / "out").glob("*.bin")))
    assert pairs == 1 if unit_bytes == 10**9 else 30 < pairs <= 40 if unit_bytes == 100 else 1 < pairs < 40


def test_documents_are_bos_ids_eos(tmp_path: Path) -> None:
    prepare([write_jsonl(tmp_path / "a.jsonl", ["the cat", "a hat"])], small_tokenizer(), tmp_path / "out", workers=1)
    tokenizer, shards = load_tokenizer(small_tokenizer()), Shards(tmp_path / "out")
    for i, text in enumerate(("the cat", "a hat")):
        assert shards.document(i).tolist() == [1, *tokenizer.encode(text), 2]


def test_without_a_bos_documents_only_end(shared_data: Path, tmp_path: Path) -> None:
    gpt2 = shared_data / "tokenizers/gpt2_tokenizer.json"
    source = write_jsonl(tmp_path / "a.jsonl", ["the <|endoftext|> cat"])
    prepare([source], gpt2, tmp_path / "out", workers=1)
    document = Shards(tmp_path / "out").document(0).tolist()
    assert document == [*load_tokenizer(gpt2).encode("the <|endoftext|> cat"), 50256]
    assert document.count(50256) == 1


def test_again_with_the_same_is_no_work_and_with_another_is_refused(tmp_path: Path) -> None:
    source, out = write_jsonl(tmp_path / "a.jsonl", [text_of(1)]), tmp_path / "out"
    first = prepare([source], small_tokenizer(), out, workers=1)
    stamp = (out / "MANIFEST.json").stat().st_mtime_ns
    again = prepare([source], small_tokenizer(), out, workers=2)
    assert (first.already_there, again.already_there) == (False, True)
    assert again.manifest == first.manifest and (out / "MANIFEST.json").stat().st_mtime_ns == stamp

    other = write_jsonl(tmp_path / "b.jsonl", [text_of(2)])
    with pytest.raises(UserError, match="out: holds shards of other inputs"):
        prepare([other], small_tokenizer(), out, workers=1)
    train_tokenizer([text_of(i) for i in range(9)], vocab_size=300, out=tmp_path / "other.model")
    with pytest.raises(UserError, match="out: holds shards of another tokenizer"):
        prepare([source], tmp_path / "other.model", out, workers=1)
    (out / "00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="00000.bin: is cut short"):
        prepare([source], small_tokenizer(), out, workers=1)


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(1)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    for taken in (tmp_path / "full", source):
        with pytest.raises(UserError, match="is not a shard directory; remove it first, or choose another --out"):
            prepare([source], small_tokenizer(), taken, workers=1)
    assert (tmp_path / "full/precious.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    prepare([source], small_tokenizer(), tmp_path / "empty", workers=1)
    assert Shards(tmp_path / "empty").num_documents == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_small_input_leaves_only_the_list_of_it(tmp_path: Path, workers: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(30)])
    source.write_bytes(source.read_bytes() + b"{broken\n")
    with pytest.raises(UserError, match="a.jsonl:31: not valid JSON.*1 of 31 documents.*allowed are 0.1%"):
        prepare([source], small_tokenizer(), tmp_path / "deep/out", workers=workers)
    (listed,) = (tmp_path / "deep").iterdir()
    assert listed.name == "out.skipped.jsonl"
    (skipped,) = map(json.loads, listed.read_text().splitlines())
    assert (skipped["where"], skipped["kind"]) == (f"{source}:31", "json")


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_nothing_to_prepare(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(UserError, match="no documents with text"):
        prepare([write_jsonl(tmp_path / "a.jsonl", texts)], small_tokenizer(), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_workers_must_be_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers=0"):
        prepare([write_jsonl(tmp_path / "a.jsonl", ["a"])], small_tokenizer(), tmp_path / "out", workers=0)


def test_a_worker_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "serve", die)
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(30)])
    with pytest.raises(UserError, match="a worker process died .killed by signal 9.*fewer --workers") as caught:
        prepare([source], small_tokenizer(), tmp_path / "out", workers=2, unit_bytes=500)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def die(connection: object, job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("env", [
    {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "5", "SLURM_NODEID": "0", "SLURM_NNODES": "1"},
    {"SLURM_STEP_ID": "0", "SLURM_NODEID": "2", "SLURM_NNODES": "5"},
    {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "5"},
])  # fmt: skip
def test_a_node_knows_its_number(env: dict[str, str]) -> None:
    assert find_node(env) == Node(2, 5)
    if "SLURM_STEP_ID" in env:  # the batch script itself is one process
        assert find_node({name: value for name, value in env.items() if name != "SLURM_STEP_ID"}) == Node()


def test_a_wrong_number_of_a_node_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match="node_rank=2, num_nodes=2: nodes are numbered from 0"):
        prepare([source], small_tokenizer(), tmp_path / "out", node=Node(2, 2))


def test_other_settings_of_reading_are_another_result(tmp_path: Path) -> None:
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text("the cat\n\nthe hat\nof a cat\n")
    for txt, count in (("file", 1), ("line", 3), ("paragraph", 2)):
        reading = Reading(txt=txt)  # type: ignore[arg-type]
        manifest = prepare([source], small_tokenizer(), tmp_path / txt, reading=reading).manifest
        assert (manifest.documents, manifest.reading["txt"]) == (count, txt)
    prepare([source], small_tokenizer(), out)
    with pytest.raises(UserError, match="read in another way: txt 'file' then, 'line' now"):
        prepare([source], small_tokenizer(), out, reading=Reading(txt="line"))


def test_many_inputs_are_listed_beside_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MAX_INPUTS", 5)
    monkeypatch.setattr(module, "MAX_INPUTS", 5)
    for i in range(6):
        write_jsonl(tmp_path / f"in-{i}.jsonl", [text_of(i)])
    manifest = prepare([str(tmp_path / "in-*")], small_tokenizer(), tmp_path / "out").manifest
    assert [item["inputs"] for item in manifest.inputs] == [6]
    listed = (tmp_path / "out/inputs.jsonl").read_text().splitlines()
    assert [Path(json.loads(line)["file"]).name for line in listed] == [f"in-{i}.jsonl" for i in range(6)]
    verify(tmp_path / "out")
    assert prepare([str(tmp_path / "in-*")], small_tokenizer(), tmp_path / "out").already_there
    (tmp_path / "in-3.jsonl").write_text((tmp_path / "in-3.jsonl").read_text().replace("cat", "hat"))
    with pytest.raises(UserError, match="holds shards of other inputs"):
        prepare([str(tmp_path / "in-*")], small_tokenizer(), tmp_path / "out")


def test_large_inputs_are_told_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "WHOLE_BYTES", 100)
    source = write_jsonl(tmp_path / "a.jsonl", [text_of(i) for i in range(300)])
    before = plan.identify(list_inputs([source]))
    assert "sampled_xxh3_128" in before[0] and "xxh3_128" not in before[0]
    assert plan.identify(list_inputs([source])) == before
    content = source.read_bytes()
    for at in (0, len(content) - 1):
        source.write_bytes(content[:at] + b"#" + content[at + 1 :])
        assert plan.identify(list_inputs([source])) != before
