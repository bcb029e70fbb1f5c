"""Words are looked up only where that gives sentencepiece's own ids, and then it does on any text."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from data_helpers import small_tokenizer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_dist.data import sentencepieces as module
from llama_dist.data.sentencepieces import SentencePieceTokenizer, word_pattern, words_are_independent

WITH_WORDS = ("tokenizers/llama2_32000/tokenizer.model", "checkpoints/stories260K/tok512.model")
ALPHABETS = (
    " \n\t\u2581a",
    "  \n\x1fab\u2581",
    "ab \n\0\x1e\x1f\x7f",
    " \u00a0\u1680\u2002\u2003\u3000\u200b\u2028\u2029\x0b\x0c\x85\r\n\t\u2581x",
    "e\u0301\u0300\u200d\ufe0f👩👧🏳😀 \n",
    "\ud7ff\ue000\uf8ff\ufffd\ufffe\uffff\U000f0000\U0010ffff \na",
    "0123456789 .,\n-",
    "theofand,.(\"'){}[]_=:;    \n\u2581",
    "中文字日本語の\n。、\u2581a ",
    "<s></s><unk><0x0A> \n\u2581",
)


def random_text(draw: random.Random, longest: int = 60) -> str:
    length = draw.choice([draw.randint(0, 6), draw.randint(0, longest)])
    if draw.random() < 0.1:
        ranges = ((0, 0x3000), (0xE000, 0x110000), (0, 128))
        return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(length))
    return "".join(draw.choices("".join(draw.choices(ALPHABETS, k=draw.randint(1, 2))), k=length))


def assert_same_ids(tokenizer: SentencePieceTokenizer, file: Path, draw: random.Random, number: int) -> None:
    assert tokenizer._words is not None
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for _ in range(number):
        text = random_text(draw)
        assert tokenizer.encode(text) == reference.encode(text), repr(text)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("file", WITH_WORDS)
def test_ids_equal_sentencepiece_on_random_text(shared_data: Path, file: str, seed: int) -> None:
    assert_same_ids(SentencePieceTokenizer(shared_data / file), shared_data / file, random.Random(seed), 1000)


@pytest.mark.parametrize("file", WITH_WORDS)
def test_ids_equal_sentencepiece_on_long_text(shared_data: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / file))
    text = (shared_data / "corpora/peps_slice.jsonl").read_text()[:700_000].replace("\\n", "\n")
    assert len(text) > 2 * module.CHUNK_CHARACTERS, "the text must be long enough to be cut"
    assert SentencePieceTokenizer(shared_data / file).encode(text) == reference.encode(text)
    for size in (1, 7, 50):
        monkeypatch.setattr(module, "CHUNK_CHARACTERS", size)
        assert_same_ids(SentencePieceTokenizer(shared_data / file), shared_data / file, random.Random(size), 300)


def test_words_are_forgotten_and_the_ids_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WORDS", 10)
    monkeypatch.setattr(module, "MAX_WORD_CHARACTERS", 5)
    tokenizer = SentencePieceTokenizer(small_tokenizer())
    assert_same_ids(tokenizer, small_tokenizer(), random.Random(0), 500)
    words = tokenizer._words
    assert words is not None and 0 < len(words) <= 10 and 0 < len(words._before) <= 10
    assert max(map(len, words)) <= 5


def test_ids_equal_sentencepiece_on_random_vocabularies(tmp_path: Path) -> None:
    """Any scores, with pieces that are marked as unused, and merges that no training would give."""
    for seed in range(60):
        draw = random.Random(seed)
        model = small_model()
        del model.pieces[259:]
        letters = draw.choice(["ab\u2581\u2581é1", "ab\u2581", "1.\u2581é"])
        pieces = {"".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(80)}
        pieces |= {"\n"} if draw.random() < 0.5 else set()
        for piece in sorted(pieces):
            if not module.re.search("[^\u2581]\u2581", piece):
                kind = model.SentencePiece.UNUSED if draw.random() < 0.1 else model.SentencePiece.NORMAL
                model.pieces.add(piece=piece, score=-draw.randint(0, 30), type=kind)
        (tmp_path / "a.model").write_bytes(model.SerializeToString())
        tokenizer = SentencePieceTokenizer(tmp_path / "a.model")
        assert tokenizer._words is not None
        reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a.model"))
        for _ in range(60):
            text = "".join(draw.choices(draw.choice(["ab é1.\n", "aab  \n.1", "ab\u2581 \n1x"]), k=draw.randint(0, 40)))
            assert tokenizer.encode(text) == reference.encode(text), (seed, text)


def test_words_are_cut_between_letters_and_others_where_no_piece_crosses() -> None:
    model = small_model()
    text = "  (naïve\u2581x_1)²,\n\n \n b² "
    assert word_pattern(model).findall(text) == [
        "  (", "na", "ï", "ve", "\u2581x", "_1)²,", "\n", "\n", " ", "\n", " b", "²", " ",
    ]  # fmt: skip
    model.pieces.add(piece="aï", score=-1)
    model.pieces.add(piece="ï²", score=-1, type=model.SentencePiece.UNUSED)
    assert word_pattern(model).findall(text) == [
        "  (", "naïve", "\u2581x", "_1)", "²", ",", "\n", "\n", " ", "\n", " b²", " ",
    ]  # fmt: skip
    model.pieces.add(piece="\u2581b.", score=-1)
    assert word_pattern(model).findall("a.b.(c") == ["a.b.", "(", "c"]
    for character in "]^-\\[":
        model.pieces.add(piece="a" + character, score=-1)
    assert word_pattern(model).findall("a]^-\\[b") == ["a]^-\\[b"]


def small_model() -> ModelProto:
    model = ModelProto()
    model.ParseFromString(small_tokenizer().read_bytes())
    return model


def add_piece(model: ModelProto, piece: str, kind: int = ModelProto.SentencePiece.NORMAL) -> None:
    model.pieces.add(piece=piece, score=-1, type=kind)


CHANGES: dict[str, Callable[[ModelProto], object]] = {
    "a piece over two words": lambda model: add_piece(model, "a\u2581b"),
    "a piece that ends with a space": lambda model: add_piece(model, "a\u2581"),
    "an unused piece over two words": lambda model: add_piece(model, "a\u2581b", model.SentencePiece.UNUSED),
    "a piece over a newline": lambda model: add_piece(model, "a\nb"),
    "a piece that begins with a newline": lambda model: add_piece(model, "\na"),
    "a piece of newlines": lambda model: add_piece(model, "\n\n"),
    "a user-defined piece": lambda model: add_piece(model, "xyz", model.SentencePiece.USER_DEFINED),
    "unigram": lambda model: setattr(model.trainer_spec, "model_type", model.trainer_spec.UNIGRAM),
    "no byte fallback": lambda model: setattr(model.trainer_spec, "byte_fallback", False),
    "space as suffix": lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True),
    "no space in front": lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False),
    "spaces taken away": lambda model: setattr(model.normalizer_spec, "remove_extra_whitespaces", True),
    "spaces as they are": lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False),
    "a map of characters": lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", b"x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_words_are_not_looked_up_where_they_are_not_known_to_be_independent(
    change: Callable[[ModelProto], object],
) -> None:
    model = small_model()
    assert words_are_independent(model)
    change(model)
    assert not words_are_independent(model)


def test_a_model_that_changes_the_text_gives_sentencepieces_ids(shared_data: Path) -> None:
    file = shared_data / "tokenizers/small/torchtune_m.model"
    tokenizer, draw = SentencePieceTokenizer(file), random.Random(0)
    assert tokenizer._words is None
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for _ in range(300):
        text = random_text(draw)
        assert tokenizer.encode(text) == reference.encode(text), repr(text)


@pytest.mark.parametrize("letter", ["a", "中", "\u2581", "é"])
def test_a_word_of_a_million_letters_takes_seconds(letter: str) -> None:
    tokenizer = SentencePieceTokenizer(small_tokenizer())
    text = letter * 1_000_000
    started = time.process_time()
    assert len(tokenizer.encode(text)) > 1000
    assert time.process_time() - started < 60
