"""A tokenizer as GGUF metadata, as llama.cpp's converter for LLaMA writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_dist.data.byte_pairs import LLAMA3_PATTERN
from llama_dist.errors import UserError
from llama_dist.exchange.tokenizer_files import TokenizerSource, as_hugging_face

# llama.cpp's kinds of tokens; sentencepiece numbers its own alike.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
PAD_SCORE = -10000.0


@dataclass
class Vocabulary:
    """What GGUF says of a tokenizer. `kind`: llama.cpp's name of the algorithm; `words`: of the rule that cuts words."""

    kind: str
    words: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    space_first: bool | None = None
    ids: dict[str, int] = field(default_factory=dict)
    bos_first: bool = False


def vocabulary_of(source: TokenizerSource, size: int) -> Vocabulary:
    """The vocabulary, filled up to the model's `size` with tokens that are never used.

    Raises UserError for a tokenizer that llama.cpp has no like of.
    """
    made = _of_sentencepiece(source) if source.kind == "sentencepiece" else _of_byte_pairs(source)
    tokenizer = source.tokenizer
    made.ids |= {"eos": tokenizer.eos_id} | ({"bos": tokenizer.bos_id} if tokenizer.bos_id is not None else {})
    made.bos_first = tokenizer.bos_id is not None
    if len(made.tokens) > size:
        raise UserError(f"{source.path}: has {len(made.tokens)} tokens, and the model's vocabulary {size}; give its own")
    for number in range(len(made.tokens), size):
        made.tokens.append(f"[PAD{number}]")
        made.types.append(UNUSED)
        if made.scores is not None:
            made.scores.append(PAD_SCORE)
    return made


def _of_sentencepiece(source: TokenizerSource) -> Vocabulary:
    model = ModelProto()
    model.ParseFromString(source.path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    odd = {
        "it is no BPE model": trainer.model_type != trainer.BPE,
        "it has no pieces for bytes": not trainer.byte_fallback,
        "it rewrites characters": bool(normalizer.precompiled_charsmap),
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it puts spaces last": trainer.treat_whitespace_as_suffix,
    }
    if any(odd.values()):
        reasons = ", ".join(reason for reason, holds in odd.items() if holds)
        raise UserError(f"{source.path}: llama.cpp would give other ids than this model: {reasons}; export without gguf")
    return Vocabulary(
        "llama",
        "default",
        [piece.piece for piece in model.pieces],
        [piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        space_first=normalizer.add_dummy_prefix,
        ids={"unknown": trainer.unk_id},
    )


def _of_byte_pairs(source: TokenizerSource) -> Vocabulary:
    made = json.loads(as_hugging_face(source).to_str())
    model = made["model"]
    words = _word_rule(made.get("pre_tokenizer"))
    if model.get("type") != "BPE" or model.get("byte_fallback") or words is None:
        raise UserError(
            f"{source.path}: llama.cpp has no like of this tokenizer's rules; known are the byte-level ones of GPT-2, "
            "LLaMA-3 and SmolLM, and sentencepiece models: give tokenizer.model with --tokenizer where there is one"
        )
    tokens: dict[int, tuple[str, int]] = {number: (token, NORMAL) for token, number in model["vocab"].items()}
    for added in made["added_tokens"]:
        tokens[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    last = max(tokens) + 1
    listed = [tokens.get(number, (f"[PAD{number}]", UNUSED)) for number in range(last)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary("gpt2", words, [token for token, _ in listed], [kind for _, kind in listed], merges=merges)


def _word_rule(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of the rule by which a text is cut before merges, or None where it has no name here."""
    rule = pre_tokenizer or {}
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") == LLAMA3_PATTERN:
        return "llama-bpe"
    return None
