"""Long texts are cut for a tokenizer.json only where the ids stay those of the whole text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from llama_dist.data import long_texts
from llama_dist.data.long_texts import LongTexts

# As the published tokenizer.json files spell them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA4 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def split(pattern: str, **changed: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | changed


def steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def added(content: str, **changed: Any) -> dict[str, Any]:
    usual = {"id": 60_000, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return usual | {"content": content, "special": False} | changed


BYTE_LEVEL: dict[str, dict[str, Any]] = {
    "gpt2": {"pre_tokenizer": GPT2},
    "llama3": {"pre_tokenizer": steps(split(LLAMA3), BYTES)},
    "llama4": {"pre_tokenizer": steps(split(LLAMA4), BYTES)},
    "qwen2": {"pre_tokenizer": steps(split(LLAMA3.replace("{1,3}", "")), BYTES), "normalizer": {"type": "NFC"}},
    "smollm": {"pre_tokenizer": steps({"type": "Digits", "individual_digits": True}, GPT2)},
    "added": {"pre_tokenizer": GPT2, "added_tokens": [added("<think>"), added("ᐅb")]},
}
MARKING: dict[str, dict[str, Any]] = {
    "metaspace": {"pre_tokenizer": METASPACE},
    "metaspace, always": {"pre_tokenizer": {**METASPACE, "prepend_scheme": "always"}},
    "metaspace, words": {"pre_tokenizer": {**METASPACE, "split": True}},
    "llama2": {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}},
    "without a first space": {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": [REPLACE]}},
}
NOT_KNOWN: dict[str, dict[str, Any]] = {
    "another pattern": {"pre_tokenizer": steps(split(r"\w+\s\w+|\s|."), BYTES)},
    "another use of it": {"pre_tokenizer": steps(split(LLAMA3, behavior="MergedWithNext"), BYTES)},
    "what is no match": {"pre_tokenizer": steps(split(LLAMA3, invert=True), BYTES)},
    "a first space": {"pre_tokenizer": {**GPT2, "add_prefix_space": True}},
    "no words": {"pre_tokenizer": BYTES},
    "another normalizer": {"pre_tokenizer": GPT2, "normalizer": {"type": "NFKC"}},
    "an added token with a place in it": {"pre_tokenizer": GPT2, "added_tokens": [added("ab cd")]},
    "an added token that takes spaces": {"pre_tokenizer": GPT2, "added_tokens": [added("cd", lstrip=True)]},
    "an added token in changed text": {
        "pre_tokenizer": GPT2, "normalizer": {"type": "NFC"}, "added_tokens": [added("cd")]
    },
}  # fmt: skip


def tokenizer_of(path: Path, change: dict[str, Any]) -> Tokenizer:
    spec = json.loads(path.read_text())
    if "added_tokens" in change:
        tokens = [token | {"id": 50_257 + i} for i, token in enumerate(change["added_tokens"])]
        change = {**change, "added_tokens": [*spec["added_tokens"], *tokens]}
    tokenizer = Tokenizer.from_str(json.dumps({**spec, "normalizer": None, **change}))
    tokenizer.encode_special_tokens = True
    return tokenizer


def texts(seed: int) -> list[str]:
    """Texts in which places to cut stand beside all that could be near them."""
    draw = random.Random(seed)
    near = list("ab9é中Ωй\u0301ʼ'’s.,;:/-_ \n\r\t\u00a0\u3000，。、\u200b▁0😀ᐅ\u212b½①\ufdfa\0")
    words = ["ab", "cd", "don't", "I'LL", "123456", "中文", " ", "  ", "\n", "\n\n", "\r\n", ", ", ". ", ".\n", "ab cd"]
    words += ["<think>", "<|endoftext|>", "</s>", "<s>", "ab ", "▁▁", " ▁", "e\u0301", "\u1100\u1161"]
    found = []
    for _ in range(60):
        some = draw.choices(near, k=6) + draw.choices(words, k=6) + [chr(draw.randrange(0x20, 0xD800)) for _ in "12"]
        found.append("".join(draw.choices(some, k=draw.randrange(40, 120))))
    return found


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def known(shared_data: Path, name: str) -> Tokenizer:
    if name in BYTE_LEVEL:
        return tokenizer_of(shared_data / "tokenizers/gpt2_tokenizer.json", BYTE_LEVEL[name])
    return tokenizer_of(shared_data / "checkpoints/stories260K/hf/tokenizer.json", MARKING[name])


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *MARKING])
def test_the_ids_of_parts_are_those_of_the_whole(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(long_texts, "PART_CHARACTERS", 1)
    tokenizer = known(shared_data, name)
    long = LongTexts(tokenizer)
    parts = 0
    for text in texts(seed=len(name)):
        got = list(long.encoded(text))
        assert sum(got, []) == ids_of(tokenizer, text), repr(text)
        parts += len(got)
    assert parts > 200, "it was cut in many places"


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_is_not_known_is_not_cut(shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(long_texts, "PART_CHARACTERS", 1)
    tokenizer = tokenizer_of(shared_data / "tokenizers/gpt2_tokenizer.json", NOT_KNOWN[name])
    assert list(LongTexts(tokenizer).encoded("ab cd, ab cd")) == [ids_of(tokenizer, "ab cd, ab cd")]


def test_pieces_that_cross_spaces_are_seen(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PART_CHARACTERS", 1)
    file = shared_data / "checkpoints/stories260K/hf/tokenizer.json"
    model = json.loads(file.read_text())["model"]
    model["vocab"]["e▁"] = len(model["vocab"])
    model["merges"].insert(0, ["e", "▁"])
    tokenizer = tokenizer_of(file, {"model": model})
    assert model["vocab"]["e▁"] in ids_of(tokenizer, "the cat")
    assert list(LongTexts(tokenizer).encoded("the cat")) == [ids_of(tokenizer, "the cat")]


@pytest.mark.parametrize("file", ["tokenizers/gpt2_tokenizer.json", "checkpoints/stories260K/hf/tokenizer.json"])
def test_a_long_document_takes_little_memory_and_has_the_librarys_ids(shared_data: Path, file: str) -> None:
    script = """
import resource, sys
from tokenizers import Tokenizer
from llama_dist.data.tokenizer import load_tokenizer

tokenizer, reference = load_tokenizer(sys.argv[1]), Tokenizer.from_file(sys.argv[1])
text = open(sys.argv[2]).read() * 5
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids, lengths = tokenizer.encode_batch(["a", text, ""])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
assert ids.tolist() == [i for t in ("a", text, "") for i in reference.encode(t, add_special_tokens=False).ids]
assert tokenizer.encode(text) == ids[lengths[0] :].tolist()
"""
    corpus = shared_data / "corpora/tinyshakespeare.txt"
    arguments = [sys.executable, "-c", script, str(shared_data / file), str(corpus)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 150, f"{ended.stdout} MiB for 5.6 MB of text; in one piece it takes 600"
