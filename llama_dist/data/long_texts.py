"""Where a long text may be cut for a Hugging Face tokenizer.json so that the ids of the parts are those of the whole.

The library takes a hundred bytes of memory for a byte of text. Vocabularies of the usual forms cut a text into words
by themselves, and encode each word alone; where a boundary of words can be seen in the text, the text may end there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from unicodedata import ucd_3_2_0

from tokenizers import Tokenizer

PART_CHARACTERS = 1 << 18
"""Longer texts are encoded by parts of about this size."""

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_LLAMA4 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
# In none of these a letter or digit goes together with white space, comma or full stop behind it, nothing looks behind,
# and what looks ahead has white space before it: so such a place is a boundary, whatever stands on either side, and
# nothing else changes with a cut there.
PATTERNS = frozenset([_GPT2, _LLAMA3, _LLAMA4, _QWEN2])
_BEHIND_WORDS = re.compile(r"[^\W_](?=[ \n,.，。、])")
_BEFORE_SPACES = re.compile(r"[^\W_](?= )")
SPACE = "\u2581"  # how the vocabularies that come from sentencepiece spell a space


class LongTexts:
    """Encodes texts of any length; `tokenizer` neither truncates nor pads, and takes special tokens for text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        spec = json.loads(tokenizer.to_str())
        self._first = self._later = tokenizer
        self._places = _places(spec)
        if self._places is not None and _prepends(spec):
            # The space that is put in front of a text is put in front of its first part alone.
            spec["normalizer"]["normalizers"] = spec["normalizer"]["normalizers"][1:]
            self._later = Tokenizer.from_str(json.dumps(spec))
            self._later.encode_special_tokens = True

    def encoded(self, text: str) -> Iterator[list[int]]:
        """The ids of a text, some at a time."""
        tokenizer = self._first
        for part in self._parts(text):
            yield tokenizer.encode_batch_fast([part], add_special_tokens=False)[0].ids
            tokenizer = self._later

    def _parts(self, text: str) -> Iterator[str]:
        start = at = 0
        while self._places is not None and (found := self._places.search(text, max(at, start + PART_CHARACTERS))):
            at = found.end()
            # The library may know another Unicode than Python does; what was a letter long ago is one in all.
            if ucd_3_2_0.category(found[0])[0] in "LN":
                yield text[start:at]
                start = at
        yield text[start:]


def _places(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """What ends where a text may be cut; None: it may not, as far as is known here."""
    if spec["model"].get("dropout"):
        return None
    places = _BEHIND_WORDS if _cuts_words(spec) else _BEFORE_SPACES if _marks_spaces(spec) else None
    return places if places is not None and _added_are_whole(spec, places) else None


def _cuts_words(spec: dict[str, Any]) -> bool:
    """Whether the text is cut as one of PATTERNS says (and then further, or digits before), after NFC at most."""
    if (spec["normalizer"] or {"type": "NFC"})["type"] != "NFC":
        return False
    pre_tokenizer = spec["pre_tokenizer"] or {"type": None}
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    cuts = False
    for step in steps:
        if step["type"] == "Split":
            by_pattern = step["pattern"].get("Regex") in PATTERNS and step["behavior"] == "Isolated"
            if not by_pattern or step["invert"]:
                return False
            cuts = True
        elif step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                return False
            cuts |= step["use_regex"]  # GPT-2's
        elif step["type"] != "Digits":
            return False
    return cuts


def _marks_spaces(spec: dict[str, Any]) -> bool:
    """Whether spaces become SPACE, and nothing is merged across the beginning of one.

    Merges go by their ranks alone, so what is merged on one side of such a place is nothing to the other side.
    """
    model, pre_tokenizer = spec["model"], spec["pre_tokenizer"]
    if pre_tokenizer is None:
        normalizers = (spec["normalizer"] or {}).get("normalizers", [])[_prepends(spec) :]
        if normalizers != [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]:
            return False
    elif spec["normalizer"] is not None or pre_tokenizer["type"] != "Metaspace" or pre_tokenizer["replacement"] != SPACE:
        return False
    elif pre_tokenizer["split"]:
        return True
    return (
        model["type"] == "BPE"
        and SPACE in model["vocab"]
        and not any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))
        and not any(SPACE in piece.lstrip(SPACE) for piece in model["vocab"])
    )


def _prepends(spec: dict[str, Any]) -> bool:
    """Whether the first thing that happens to a text is that a SPACE comes in front of it."""
    normalizers = (spec["normalizer"] or {}).get("normalizers", [])
    return normalizers[:1] == [{"type": "Prepend", "prepend": SPACE}]


def _added_are_whole(spec: dict[str, Any], places: re.Pattern[str]) -> bool:
    """Whether no token that is looked for in the text itself can notice a cut. Special tokens are not looked for."""
    added = [token for token in spec["added_tokens"] if not token["special"]]
    if not added:
        return True
    looks_around = any(token["single_word"] or token["lstrip"] or token["rstrip"] for token in added)
    changes_text = spec["normalizer"] is not None or places is _BEFORE_SPACES
    return not looks_around and not changes_text and not any(places.search(t["content"]) for t in spec["added_tokens"])
