"""Strict YAML: text to plain values that know their file and line, and back.

PyYAML keeps the last of two equal keys, reads `1e-4` as text, `on` as a boolean and `1:30` as ninety. Here equal
keys are an error, numbers are what they look like, and only `true` and `false` are booleans.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llama_dist.errors import UserError

Keys = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:[0-9]+(?:_[0-9]+)*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
    ("merge", re.compile(r"<<$"), ["<"]),
)


MAX_VALUES = 10_000


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


class _Dumper(yaml.SafeDumper):
    """Keeps PyYAML's own readings beside ours, so that text is quoted wherever either reader would take it for more."""


for _kind, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _kind, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _kind, _pattern, _first)


@dataclass
class Document:
    """The values of a file, where each stands (`file:line`), what was wrong so far, and what could not be read."""

    source: str
    values: dict[str, Any]
    places: dict[Keys, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[Keys] = field(default_factory=set)

    def place(self, keys: Keys) -> str:
        """Where a setting stands; for one that is not there, where its section does."""
        for length in range(len(keys), 0, -1):
            if keys[:length] in self.places:
                return self.places[keys[:length]]
        return self.source


def dotted(keys: Keys) -> str:
    return ".".join(repr(key) if "." in str(key) else str(key) for key in keys)


def dump_yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def read_document(path: str | os.PathLike[str]) -> Document:
    """The mapping that a YAML file holds.

    Raises UserError for a file that is missing, not text, not YAML or not a mapping. Equal keys and values of an
    unknown kind are collected in `problems`, to be reported together with what is wrong with the settings.
    """
    source = os.path.normpath(path)
    root = _compose(_read_text(source), source)
    if root is None:
        raise UserError(f"{source}: the file is empty; it must hold a mapping of settings (key: value)")
    document = Document(source, {})
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise UserError(f"{source}: the file holds {kind}; it must hold a mapping of settings (key: value)")
    document.values = _Builder(document).build(root, ())
    return document


def graft_(document: Document, keys: Keys, branch: Document) -> None:
    """Put another file's values under `keys`, with their places and problems."""
    assert len(keys) == 1, f"only whole sections are read from files, not {keys}"
    _forget(document, keys)
    document.values[str(keys[0])] = branch.values
    document.places.update({keys + inner: place for inner, place in branch.places.items()})
    document.places[keys] = branch.source
    document.problems.extend(branch.problems)


def override_(document: Document, text: str) -> Keys:
    """Set what `a.b.c=value` says (the value read as YAML) and return its keys; () where it cannot be read."""
    where = f"override {text!r}"
    name, equals, value = text.partition("=")
    keys = tuple(int(part) if part.isdecimal() else part for part in name.strip().split("."))
    if not equals or not all(str(key) for key in keys):
        document.problems.append(f"{where}: is not of the form section.key=value; write for example train.steps=100")
        return ()
    if not value.strip():
        document.problems.append(f"{where}: has no value; give one, or null where the setting may be left out")
        return ()
    try:
        root = _compose(value, where)
    except UserError as error:
        document.problems.append(str(error))
        return ()
    _forget(document, keys)
    builder = _Builder(document, where)
    problem = _assign(document.values, keys, builder.build(root, keys))
    if problem:
        document.problems.append(f"{where}: {problem}")
    for length in range(1, len(keys) + 1):
        document.places.setdefault(keys[:length], where)
    return keys


def _assign(values: dict[str, Any], keys: Keys, value: Any) -> str | None:
    """Put `value` at `keys`, making the sections on the way; the text of what stands in the way, if anything does."""
    here: Any = values
    for depth, key in enumerate(keys):
        if isinstance(here, list):
            if not isinstance(key, int) or key >= len(here):
                return f"{dotted(keys[:depth])} is a list of {len(here)}; use an index from 0 to {len(here) - 1}"
        elif not isinstance(here, dict):
            return f"{dotted(keys[:depth])} is a value, not a section; set {dotted(keys[:depth])} itself"
        if depth == len(keys) - 1:
            here[key] = value
            return None
        if isinstance(here, dict) and here.get(key) is None:
            here[key] = {}
        here = here[key]
    return None


def _forget(document: Document, keys: Keys) -> None:
    for old in [old for old in document.places if old[: len(keys)] == keys]:
        del document.places[old]


class _Builder:
    """Turns YAML nodes into values, noting the place of each."""

    def __init__(self, document: Document, where: str | None = None) -> None:
        self.document = document
        self.where = where
        self.open: set[int] = set()
        self.built = 0

    def build(self, node: yaml.Node, keys: Keys) -> Any:
        self.document.places[keys] = self.place(node)
        if id(node) in self.open:
            return self.complain(node, f"{dotted(keys)} contains itself through an alias")
        self.built += 1
        if self.built > MAX_VALUES:  # a few aliases of aliases make millions of values out of a short file
            if self.built == MAX_VALUES + 1:
                self.complain(node, f"the file has more than {MAX_VALUES} values, its aliases written out")
            return None
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, keys)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, keys + (i,)) for i, item in enumerate(node.value)]
            return self.scalar(node, keys)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain(key_node, f"a key of {dotted(keys) or 'the file'} is not a name")
                continue
            key = key_node.value
            if key in lines:
                already = "already" if self.where else f"on line {lines[key]} already"
                self.complain(key_node, f"{dotted(keys + (key,))} was given {already}; keep one")
                continue
            lines[key] = key_node.start_mark.line + 1
            values[key] = self.build(value_node, keys + (key,))
            self.document.places[keys + (key,)] = self.place(key_node)
        for merged in self.merged(node, keys):
            values.update({key: value for key, value in merged.items() if key not in values})
        return values

    def merged(self, node: yaml.MappingNode, keys: Keys) -> Iterator[dict[str, Any]]:
        """What `<<` brings in; the mapping's own keys and earlier merges win, as YAML has it."""
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    own = dict(self.document.places)
                    value = self.build(source, keys)
                    self.document.places.update(own)
                    if isinstance(value, dict):
                        yield value
                    else:
                        self.complain(key_node, "<< merges mappings only; give it an alias of a mapping")

    def scalar(self, node: yaml.ScalarNode, keys: Keys) -> Any:
        text = node.value
        try:
            if node.tag == _TAG + "str":
                return text
            if node.tag == _TAG + "null":
                return None
            if node.tag == _TAG + "bool":
                return {"true": True, "false": False}[text.lower()]
            if node.tag == _TAG + "int":
                return int(text)
            if node.tag == _TAG + "float":
                return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
        except (ValueError, KeyError):
            return self.complain(node, f"{dotted(keys)}: {text[:80]!r} cannot be read as {node.tag.split(':')[-1]}")
        return self.complain(node, f"{dotted(keys)} has the tag {node.tag}, which has no meaning here; take it away")

    def complain(self, node: yaml.Node, problem: str) -> None:
        self.document.problems.append(f"{self.place(node)}: {problem}")

    def place(self, node: yaml.Node) -> str:
        return self.where or f"{self.document.source}:{node.start_mark.line + 1}"


def _read_text(source: str) -> str:
    try:
        raw = Path(source).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{source}: there is no such file{_nearest_file(Path(source))}") from None
    except IsADirectoryError:
        raise UserError(f"{source}: is a directory; name a YAML file{_yaml_files(Path(source))}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{source!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise UserError(f"{source}:{line}: byte 0x{byte:02x} is not UTF-8 text; save the file as UTF-8") from None


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a directory {path.parent})"
    near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else _yaml_files(path.parent)


def _yaml_files(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*.yaml"))[:12]
    return f"; {folder} has {', '.join(names)}" if names else ""


def _compose(text: str, where: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and not where.startswith("override") else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{where}{line}: is not YAML: {what}") from None
    except yaml.YAMLError as error:
        # The reader's own errors (control characters) carry an index instead of a mark.
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        raise UserError(f"{where}:{line}: is not YAML: {getattr(error, 'reason', error)}") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply to be a config") from None
