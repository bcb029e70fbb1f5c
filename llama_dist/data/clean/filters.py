"""Quality filters: the published rules of Gopher, C4 and FineWeb, as datatrove has them.

| name | rules | paper |
|---|---|---|
| gopher_quality | words and their mean length, symbols, bullets, ellipses, letters, stop words | Rae et al. 2021, A.1 |
| gopher_repetition | repeated lines and paragraphs, frequent and repeated n-grams | Rae et al. 2021, table A1 |
| c4 | lines without end mark, of few words, of policies; short pages, code, "lorem ipsum" | Raffel et al. 2020, 2.2 |
| fineweb | lines without end mark, short and repeated lines, lists | Penedo et al. 2024 |

datatrove is what FineWeb was made with, and well kept; but its words come from spaCy (17 packages more, one slow model)
or from nltk (data fetched from the network). It takes a word splitter from outside, so words are what stands between
white space here, as in Dolma's implementation of the same rules, and sentences end at an end mark before white space.
The rules are for languages like English: none of them should be used as it is on Chinese, say.

c4 alone changes documents: it takes single lines out of those that it keeps.

datatrove is optional (`llama_dist[clean]`), and imported only where filters are used.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llama_dist.errors import UserError

FILTERS = {
    "gopher_quality": "GopherQualityFilter",
    "gopher_repetition": "GopherRepetitionFilter",
    "c4": "C4QualityFilter",
    "fineweb": "FineWebQualityFilter",
}
_NOT_SETTINGS = ("exclusion_writer", "language", "self")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)")


@dataclass(frozen=True)
class FilterChoice:
    """A filter by name, with the settings that differ from datatrove's own."""

    name: str
    settings: dict[str, Any]


class Verdict(NamedTuple):
    """What the filters make of a text: the rule that it breaks (None: none), and the text that is left of it."""

    rule: str | None
    text: str


class Filters:
    """The chosen filters, in order. `lines` counts the lines that they took out of texts, by rule."""

    def __init__(self, choices: Sequence[FilterChoice]) -> None:
        self.lines: Counter[str] = Counter()
        if choices:
            words = _splitter()
            self._document = _module("datatrove.data").Document
            self._filters = [(c.name, _class_of(c.name)(**c.settings, language=words)) for c in choices]
        else:
            self._filters = []

    def __call__(self, text: str, where: str) -> Verdict:
        """The first rule that `text` breaks, as "filter.rule"; texts without a word must not come here."""
        if not self._filters:
            return Verdict(None, text)
        document = self._document(text=text, id=where)
        for name, one in self._filters:
            try:
                result = one.filter(document)
            except (ArithmeticError, AssertionError, ValueError):
                return Verdict(f"{name}.failed", text)  # seen to by the report, which lists what was removed and why
            kept, rule = result if isinstance(result, tuple) else (result, "removed")
            if not kept:
                return Verdict(f"{name}.{rule.removeprefix('gopher_')}", text)
            self._count_lines(name, one)
        return Verdict(None, document.text)

    def _count_lines(self, name: str, one: Any) -> None:
        for key, stat in one.stats.stats.items():
            if key.startswith("line-filter-"):
                self.lines[f"{name}.line_{key.removeprefix('line-filter-')}"] += stat.total
        one.stats.stats.clear()


def chosen_filters(names: Sequence[str], settings: Sequence[str] = ()) -> list[FilterChoice]:
    """Filters by name, with `settings` as "filter.setting=value". Raises UserError for what there is not.

    A value is JSON: a number, true, null (the rule is off), or a list.
    """
    chosen = {name: FilterChoice(name, {}) for name in names}
    for name in names:
        if name not in FILTERS:
            raise UserError(
                f"filters: {name!r} is not one{_did_you_mean(name, list(FILTERS))}; there are {', '.join(FILTERS)}"
            )
    for item in settings:
        path, equals, value = item.partition("=")
        name, dot, setting = path.partition(".")
        if not (equals and dot):
            raise UserError(f"--set {item}: is not FILTER.SETTING=VALUE, such as gopher_quality.min_doc_words=20")
        if name not in chosen:
            raise UserError(f"--set {item}: the filter {name!r} is not among --filters ({', '.join(names) or 'none'})")
        defaults = settings_of(name)
        if setting not in defaults:
            raise UserError(
                f"--set {item}: {name} has no setting {setting!r}{_did_you_mean(setting, list(defaults))}; "
                f"it has {', '.join(defaults)}"
            )
        chosen[name].settings[setting] = _value_of(value, defaults[setting], where=f"--set {item}")
    return list(chosen.values())


def settings_of(name: str) -> dict[str, Any]:
    """The settings of the filter `name`, and their defaults."""
    parameters = inspect.signature(_class_of(name).__init__).parameters
    return {key: one.default for key, one in parameters.items() if key not in _NOT_SETTINGS}


def _did_you_mean(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _value_of(text: str, default: Any, *, where: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(default, bool):
        fits = isinstance(value, bool)
    elif isinstance(default, int | float):
        fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    else:
        fits = value is None or isinstance(value, list)
    if not fits:
        kind = "true or false" if isinstance(default, bool) else "a number, or null for off"
        kind = kind if isinstance(default, bool | int | float) else "a JSON list, or null for the default"
        raise UserError(f"{where}: {text!r} does not fit; this setting is {kind} (default: {json.dumps(default)})")
    return value


def _class_of(name: str) -> Any:
    return getattr(_module("datatrove.pipeline.filters"), FILTERS[name])


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"filters: they need datatrove, which cannot be imported here ({error}); "
            "install it with `pip install 'llama_dist[clean]'`, or leave --filters out"
        ) from error


def _splitter() -> Any:
    """Words and sentences for datatrove's filters, as an instance of its own class."""

    def sentence_spans(_: Any, text: str) -> list[tuple[int, int]]:
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if text[ends[-1] if ends else 0 :].strip():
            ends.append(len(text))
        return list(zip([0, *ends], ends, strict=False))

    def sentences(_: Any, text: str) -> list[str]:
        return [text[start:stop].strip() for start, stop in sentence_spans(None, text)]

    base = _module("datatrove.utils.word_tokenizers").WordTokenizer
    methods = {
        "word_tokenize": lambda _, text: text.split(),
        "sent_tokenize": sentences,
        "span_tokenize": sentence_spans,
    }
    return type("WhiteSpaceWords", (base,), methods)()
