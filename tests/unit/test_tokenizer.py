"""Tokenizers give their library's ids, keep every text, and are trained with LLaMA-2's settings."""

from __future__ import annotations

import base64
import gzip
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from data_helpers import WORDS, small_tokenizer, text_of

from llama_dist.cli import main
from llama_dist.data.byte_pairs import LLAMA3_PATTERN
from llama_dist.data.tokenizer import fingerprint_of, load_tokenizer
from llama_dist.data.vocabulary import sample_lines, train_tokenizer
from llama_dist.errors import UserError

TEXTS = {
    "code": "def f(x):\n\tif x  ==  1:\n        return  {'a': [1, 2]}\n\n\n",
    "unicode": "naïve Zürich Ελληνικά русский 中文 日本語 العربية हिन्दी",
    "compatibility": "ﬁ ① Å x² \u00a0 \u3000 \u200b e\u0301",
    "emojis": "😀 👩‍👧 🏳️‍🌈",
    "spaces": "  two  three   \t tab\t\ttabs \n newline\r\n crlf   ",
    "nul and controls": "a\0b\x01\x7f",
    "special": "<s> </s> <unk> <|endoftext|> <0x0A>",
    "only newlines": "\n\n\n",
    "one space": " ",
    "empty": "",
    "bom inside": "x\ufeffy",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_every_text_survives_a_small_trained_vocabulary(text: str) -> None:
    tokenizer = load_tokenizer(small_tokenizer())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize(
    "file", ["llama2_32000/tokenizer.model", "gpt2_tokenizer.json", "small/torchtune_tiktoken_small.model"]
)
def test_every_text_survives_the_published_tokenizers(shared_data: Path, file: str, text: str) -> None:
    tokenizer = load_tokenizer(shared_data / "tokenizers" / file)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_llama2_on_shakespeare(shared_data: Path) -> None:
    file = shared_data / "tokenizers/llama2_32000/tokenizer.model"
    text = (shared_data / "corpora/tinyshakespeare.txt").read_text()
    tokenizer = load_tokenizer(file)
    ids = tokenizer.encode(text)
    assert len(ids) == 368_633
    assert ids == sentencepiece.SentencePieceProcessor(model_file=str(file)).encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (32000, 1, 2)
    assert tokenizer.fingerprint == hashlib.sha256(file.read_bytes()).hexdigest() == fingerprint_of(file)


def test_hugging_face_ids_and_special_tokens(shared_data: Path) -> None:
    text = (shared_data / "corpora/peps_slice.jsonl").read_text()[:50_000]
    gpt2 = shared_data / "tokenizers/gpt2_tokenizer.json"
    tokenizer = load_tokenizer(gpt2)
    assert tokenizer.encode(text) == tokenizers.Tokenizer.from_file(str(gpt2)).encode(text).ids
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50257, None, 50256)

    stories = load_tokenizer(shared_data / "checkpoints/stories260K/hf/tokenizer.json")
    assert (stories.vocab_size, stories.bos_id, stories.eos_id) == (512, 1, 2)
    same = load_tokenizer(shared_data / "checkpoints/stories260K/tok512.model")
    assert stories.encode("Once upon a time") == same.encode("Once upon a time")
    assert stories.decode([1, *same.encode("Lily"), 2]).strip() == "Lily"


KINDS = ("tokenizers/llama2_32000/tokenizer.model", "tokenizers/small/torchtune_m.model",
         "tokenizers/gpt2_tokenizer.json", "tokenizers/small/torchtune_tiktoken_small.model")  # fmt: skip


@pytest.mark.parametrize("file", KINDS)
def test_a_batch_is_its_texts(shared_data: Path, file: str) -> None:
    tokenizer = load_tokenizer(shared_data / file)
    texts = ["", *TEXTS.values(), "", " x\n"]
    each = [tokenizer.encode(text) for text in texts]
    ids, lengths = tokenizer.encode_batch(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
    assert (ids.tolist(), lengths.tolist()) == (sum(each, []), [len(item) for item in each])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids, lengths = tokenizer.encode_batch(texts, bos_eos=True)
    assert ids.tolist() == [i for item in each for i in [*bos, *item, tokenizer.eos_id]]
    assert lengths.tolist() == [len(bos) + len(item) + 1 for item in each]
    assert [part.tolist() for part in tokenizer.encode_batch([])] == [[], []]


@pytest.mark.parametrize("file", KINDS)
def test_half_of_a_surrogate_pair_is_no_text(shared_data: Path, file: str) -> None:
    tokenizer = load_tokenizer(shared_data / file)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["a", text])):
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            encode("a\ud83d b")


def rank_line(rank: int) -> bytes:
    return base64.b64encode(b"%08d" % rank) + b" %d\n" % rank


def cut_as_meta_does(text: str, longest: int) -> Iterator[str]:
    """`_split_whitespaces_or_nonwhitespaces` of llama_models/llama3/tokenizer.py, character by character."""
    length, is_space, start = 0, text[0].isspace() if text else False, 0
    for i, character in enumerate(text):
        if is_space ^ character.isspace():
            length, is_space = 1, character.isspace()
        else:
            length += 1
            if length > longest:
                yield text[start:i]
                start, length = i, 1
    yield text[start:]


def test_tiktoken_ranks_give_the_ids_of_metas_reference(shared_data: Path) -> None:
    file = shared_data / "tokenizers/small/torchtune_tiktoken_small.model"
    tokenizer = load_tokenizer(file)
    ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in file.read_bytes().splitlines()}
    encoding = tiktoken.Encoding("reference", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def reference(text: str) -> list[int]:
        chunks = (text[i : i + 400_000] for i in range(0, len(text), 400_000))
        return [i for chunk in chunks for part in cut_as_meta_does(chunk, 25_000) for i in encoding.encode(part)]

    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2256, 2000, 2001)
    draw = random.Random(0)
    corpora = shared_data / "corpora"
    texts = [(corpora / name).read_text()[:450_000] for name in ("tinyshakespeare.txt", "peps_slice.jsonl")]
    texts += ["a" * 25_000, "a" * 60_000 + " b", " " * 25_001 + "x", "\u3000 \x85\x1c" * 20_000, "<|begin_of_text|>"]
    texts += ["".join(draw.choices("ab 中\n", k=30_000)), "x" * 399_999 + " " + "y" * 25_001]
    for text in texts:
        assert tokenizer.encode(text) == reference(text), text[:20]
        assert tokenizer.decode([2000, *tokenizer.encode(text), 2001]) == text


def test_a_folder_stands_for_the_tokenizer_in_it(shared_data: Path, tmp_path: Path) -> None:
    assert load_tokenizer(shared_data / "tokenizers/llama2_32000").vocab_size == 32000
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_named(shared_data: Path, tmp_path: Path) -> None:
    nameless = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    nameless.save(str(tmp_path / "nameless.json"))
    with pytest.raises(UserError, match="nameless.json: no token to end a document with"):
        load_tokenizer(tmp_path / "nameless.json")
    ranks = (shared_data / "tokenizers/small/torchtune_tiktoken_small.model").read_bytes()
    for name, content, message in (
        ("cut.model", ranks[: ranks.index(b" 1999") + 1], r"cut.model:\d+: b'.*' is no line of tiktoken ranks"),
        ("lacking.model", ranks.split(b"\n", 1)[1], "lacking.model: the ranks are not 0 to 1998, each once"),
        ("twice.model", ranks.replace(b" 1999", b" 7"), "twice.model: the ranks are not 0 to 1999"),
        ("llama4.model", ranks + b"".join(rank_line(i) for i in range(2000, 200_000)), "llama4.model: .* LLaMA-4"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "absent.model")
    for name, content in (("bad.json", "{}"), ("bad2.json", "not json"), ("empty.model", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path / name)


def test_training_is_deterministic_and_leaves_one_file(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(30)]
    assert train_tokenizer(iter(texts), vocab_size=330, out=tmp_path / "deep/a.model")
    assert train_tokenizer(texts, vocab_size=330, out=tmp_path / "b.model")
    assert (tmp_path / "deep/a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.model", "b.model", "deep"]
    tokenizer = load_tokenizer(tmp_path / "b.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (330, 1, 2)


def test_training_again_is_no_harm_and_another_vocabulary_is_kept(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(30)]
    out = tmp_path / "a.model"
    assert train_tokenizer(texts, vocab_size=330, out=out)
    assert not train_tokenizer(texts, vocab_size=330, out=out)
    before = out.read_bytes()
    with pytest.raises(UserError, match="another tokenizer"):
        train_tokenizer(texts, vocab_size=320, out=out)
    assert out.read_bytes() == before


def test_the_sample_and_the_characters_are_chosen(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(200)] + ["\u03a9"]
    train_tokenizer(texts, vocab_size=330, out=tmp_path / "all.model", character_coverage=1.0)
    train_tokenizer(texts, vocab_size=330, out=tmp_path / "usual.model", character_coverage=0.999)
    assert len(load_tokenizer(tmp_path / "all.model").encode("\u03a9")) < len(
        load_tokenizer(tmp_path / "usual.model").encode("\u03a9")
    )
    train_tokenizer(texts, vocab_size=300, out=tmp_path / "some.model", sample_bytes=10_000)
    train_tokenizer(texts, vocab_size=300, out=tmp_path / "more.model", sample_bytes=50_000)
    assert (tmp_path / "some.model").read_bytes() != (tmp_path / "more.model").read_bytes()
    for value in (0.5, 1.1, float("nan")):
        with pytest.raises(UserError, match="character_coverage=.*: must be from 0.98 to 1"):
            train_tokenizer(texts, vocab_size=300, out=tmp_path / "bad.model", character_coverage=value)
    with pytest.raises(UserError, match="sample_bytes=0: must be at least 1"):
        train_tokenizer(texts, vocab_size=300, out=tmp_path / "bad.model", sample_bytes=0)


def test_the_command_trains_on_what_prepare_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f'{{"q": "{i}?", "a": "{" ".join(WORDS)}"}}\n' for i in range(60)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines([*rows[:7], "{broken\n", *rows[7:]])
    command = ["tokenizer", "train", str(tmp_path / "*.gz"), "--vocab-size", "300", "--out", str(tmp_path / "a.model")]
    assert main([*command, "--template", "{q} {a}"]) == 2
    assert re.search(r"1 of 61 documents cannot be read \(1 json\): .*a.jsonl.gz:8: ", capsys.readouterr().err)
    assert not (tmp_path / "a.model").exists()
    assert main([*command, "--template", "{q} {a}", "--max-skipped", "2%"]) == 0
    told = capsys.readouterr()
    assert "a.model: made, 300 pieces" in told.out and "a.jsonl.gz:8: " in told.err


def test_settings_of_llama2(shared_data: Path, tmp_path: Path) -> None:
    text = (shared_data / "corpora/peps_slice.jsonl").read_text()[:300_000].replace("\\n", "\n")
    train_tokenizer([text], vocab_size=1000, out=tmp_path / "a.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
    pieces = [processor.id_to_piece(i) for i in range(1000)]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not [p for p in pieces[259:] if any(c.isdigit() for c in p) and len(p) > 1], "digits are split"
    assert "▁▁▁▁" in pieces, "runs of spaces are pieces"
    assert processor.encode("2024", out_type=str) == ["▁", "2", "0", "2", "4"]


def test_a_vocabulary_too_large_names_the_largest_and_that_one_works(tmp_path: Path) -> None:
    texts = [text_of(1)]
    with pytest.raises(UserError, match=r"vocab_size=5000: .* at most (\d+) are possible") as caught:
        train_tokenizer(texts, vocab_size=5000, out=tmp_path / "a.model")
    assert not list(tmp_path.iterdir())
    largest = int(str(caught.value).split("at most ")[1].split()[0])
    train_tokenizer(texts, vocab_size=largest, out=tmp_path / "a.model")
    assert load_tokenizer(tmp_path / "a.model").vocab_size == largest


def test_a_vocabulary_too_small_names_one_that_works(tmp_path: Path) -> None:
    texts = [text_of(i) for i in range(5)]
    with pytest.raises(UserError, match="vocab_size=100: ") as caught:
        train_tokenizer(texts, vocab_size=100, out=tmp_path / "a.model")
    smallest = int(str(caught.value).split("raise it to ")[1].split()[0])
    train_tokenizer(texts, vocab_size=smallest, out=tmp_path / "a.model")
    assert load_tokenizer(tmp_path / "a.model").vocab_size == smallest


@pytest.mark.parametrize("texts", [[], [""], [" \n\t\n"]])
def test_training_on_nothing(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(texts, vocab_size=300, out=tmp_path / "a.model")
    assert not list(tmp_path.iterdir())


def test_long_lines_and_nuls_are_trained_on(tmp_path: Path) -> None:
    train_tokenizer(["\0 zyzzyva" * 20_000], vocab_size=270, out=tmp_path / "a.model")
    assert load_tokenizer(tmp_path / "a.model").decode(load_tokenizer(tmp_path / "a.model").encode("zy\0")) == "zy\0"
    assert "yzz" in str(sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model")).encode(
        "zyzzyva", out_type=str))  # fmt: skip


def test_the_sample_of_a_large_text_is_even_bounded_and_in_order() -> None:
    lines = [f"line number {i:06d}" for i in range(20_000)]
    sample = sample_lines(["\n".join(lines[:7000]), "\n".join(lines[7000:])], max_bytes=50_000)
    assert 20_000 < sum(map(len, sample)) <= 50_000
    assert sample == sorted(sample)
    quarters = [sum(5000 * q <= int(line[-6:]) < 5000 * (q + 1) for line in sample) for q in range(4)]
    assert max(quarters) < 1.2 * min(quarters), quarters
    assert sample_lines(["a\n\nb"], max_bytes=50) == ["a", "b"]
