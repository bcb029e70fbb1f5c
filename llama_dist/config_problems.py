"""From a tree of pydantic classes and plain values to a full list of what is wrong, each with the way out."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llama_dist.config_checks import find_conflicts
from llama_dist.config_yaml import Keys, dotted


class Problem(NamedTuple):
    """What is wrong, and with which setting."""

    keys: Keys
    text: str


class Setting(NamedTuple):
    """One line of a help page."""

    name: str
    allowed: str
    default: str
    doc: str


def list_settings(tree: type[BaseModel], prefix: str = "") -> Iterator[Setting]:
    """Every setting under its dotted name, in the order of the classes; `N` stands for the index of a list."""
    for name, field in tree.model_fields.items():
        path = f"{prefix}{name}"
        inner = _tree_of(field.annotation)
        doc = " ".join((field.description or "").split())
        yield Setting(path, allowed(field.annotation, field.metadata), _default(field), doc)
        if inner is not None:
            yield from list_settings(inner, f"{path}.N." if get_origin(field.annotation) is list else f"{path}.")


def find_problems(root: type[BaseModel], tree: type[BaseModel], values: dict[str, Any]) -> list[Problem]:
    """Everything that keeps `values` from being a `tree`: the root of all settings, or one section of it.

    Settings are named from the root. Checks between settings are made wherever all the settings they need are right.
    """
    prefix = _prefix(root, tree)
    found: dict[Keys, Problem] = {}
    try:
        tree.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            # Conflicts between settings raise value_error in the tree itself; below they are found again, one by one.
            if detail["type"] not in ("value_error", "default_factory_not_called"):
                problem = _explain(root, tree, values, prefix, detail["loc"], detail["type"])
                found.setdefault(problem.keys, problem)
    known = dict(_known(tree, values, prefix, set(found)))
    conflicts = [Problem(tuple(name.split(".")), text) for name, text in find_conflicts(known)]
    return [*found.values(), *conflicts]


def conflicts_within(root: type[BaseModel], section: BaseModel) -> list[str]:
    """What does not fit together in settings that are right one by one."""
    return [text for _, text in find_conflicts(settings_of(section, _prefix(root, type(section))))]


def settings_of(section: BaseModel, prefix: Keys = ()) -> dict[str, Any]:
    """(dotted name -> value) of every setting of a section, named from `prefix`."""
    return dict(_known(type(section), section.model_dump(), prefix, set()))


def allowed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a setting takes, in words."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return allowed(inner, [*_constraints(more), *metadata])
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(allowed(argument, metadata) for argument in arguments))
    if get_origin(annotation) is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if get_origin(annotation) is tuple:
        return f"a list of {len(arguments)}, each {allowed(arguments[0])}"
    nonempty = "non-empty " * any(getattr(item, "min_length", None) for item in _constraints(metadata))
    if get_origin(annotation) is list:
        return f"a {nonempty}list of {allowed(arguments[0])}"
    if get_origin(annotation) is dict:
        return f"a {nonempty}mapping of {allowed(arguments[0])} to {allowed(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"a mapping with {', '.join(annotation.model_fields)}"
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: f"{nonempty}text",
        type(None): "null",
    }
    return words[annotation] + _bounds(metadata)


def _bounds(metadata: Sequence[Any]) -> str:
    words = []
    for item in _constraints(metadata):
        for name, word in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
            if getattr(item, name, None) is not None:
                words.append(f"{word} {getattr(item, name)}")
        if getattr(item, "pattern", None):
            words.append("of letters, digits, '.', '_' and '-'")
    return " " + " and ".join(words) if words else ""


def _constraints(metadata: Sequence[Any]) -> list[Any]:
    return [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _explain(
    root: type[BaseModel], tree: type[BaseModel], values: Any, prefix: Keys, location: Keys, kind: str
) -> Problem:
    """The problem behind one pydantic error, whose location may end in the name of a branch of a union."""
    here: Any = tree
    metadata: Sequence[Any] = ()
    value: Any = values
    for depth, key in enumerate(location):
        keys = prefix + location[: depth + 1]
        inner = _tree_of(here) if get_origin(here) is not list else None
        if inner is not None and isinstance(value, dict):
            if key not in inner.model_fields:
                return Problem(keys, f"{dotted(keys)} is not a setting; {_suggest(root, inner, keys)}")
            field = inner.model_fields[str(key)]
            here, metadata = field.annotation, field.metadata
            if key not in value:
                return Problem(keys, f"{dotted(keys)} is missing; it takes {allowed(here, metadata)}")
            value = value[key]
        elif isinstance(key, int) and isinstance(value, list) and key < len(value):
            items = _items_of(here)
            here, metadata = items[min(key, len(items) - 1)], ()
            value = value[key]
        else:
            location = location[:depth]
            break
    keys = prefix + location
    text = f"{dotted(keys)}={show(value)} is not allowed; it takes {allowed(here, metadata)}{_hint(here, value)}"
    return Problem(keys, text)


def show(value: Any) -> str:
    """A value as one would write it, cut to fit a line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hint(annotation: Any, value: Any) -> str:
    words = allowed(annotation)
    if isinstance(value, str) and "number" in words and value.strip("+-").replace(".", "", 1)[:1].isdecimal():
        return "; take the quotes away if it is one"
    if isinstance(value, float) and value.is_integer() and "whole number" in words:
        return f"; write {int(value)}"
    if isinstance(value, (int, float)) and words.split(" or ")[0].endswith("text"):
        return "; put it in quotes"
    return ""


def _suggest(root: type[BaseModel], tree: type[BaseModel], keys: Keys) -> str:
    """The nearest settings by name: a sibling before an equal name elsewhere before a similar name elsewhere."""
    name, parent = str(keys[-1]), dotted(keys[:-1])
    everywhere = [setting.name for setting in list_settings(root)]
    if name in everywhere:
        section, _, last = name.rpartition(".")
        return f"write {last} inside {section}:"
    siblings = {f"{parent}.{field}" if parent else field for field in tree.model_fields}
    scores = {
        path: difflib.SequenceMatcher(None, name.lower(), path.rpartition(".")[2]).ratio() + 0.12 * (path in siblings)
        for path in [*siblings, *everywhere]
    }
    best = max(scores.values())
    if best >= 0.7:
        return f"did you mean {' or '.join(sorted(path for path, score in scores.items() if score == best)[:3])}?"
    return f"{parent or 'the file'} has {', '.join(tree.model_fields)}"


def _known(tree: type[BaseModel], values: Any, keys: Keys, bad: set[Keys]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting that is given rightly or has a default."""
    before: dict[str, Any] = {}
    for name, field in tree.model_fields.items():
        path = keys + (name,)
        value = values.get(name, _ABSENT)
        if value is _ABSENT and not field.is_required():
            try:
                value = field.get_default(call_default_factory=True, validated_data=before)
            except KeyError:
                # The default follows from a setting that is itself missing or wrong.
                continue
        if isinstance(value, BaseModel):
            value = value.model_dump()
        inner = _tree_of(field.annotation)
        if inner is not None and isinstance(value, dict):
            yield from _known(inner, value, path, bad)
        elif value is not _ABSENT and not any(other[: len(path)] == path for other in bad):
            before[name] = value
            yield dotted(path), value


_ABSENT = object()


def _prefix(root: type[BaseModel], tree: type[BaseModel]) -> Keys:
    """Where in the root a section stands; () for the root itself."""
    return next(((name,) for name, field in root.model_fields.items() if _tree_of(field.annotation) is tree), ())


def _tree_of(annotation: Any) -> type[BaseModel] | None:
    """The class of settings in `X`, `X | None` or `list[X]`."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _items_of(annotation: Any) -> tuple[Any, ...]:
    """What the items of a `list[X]`, a `tuple[X, Y]` or one of these or null may be."""
    if get_origin(annotation) in (list, tuple):
        return get_args(annotation)
    return next(items for part in get_args(annotation) if (items := _items_of(part)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "derived"
    return "" if isinstance(field.default, BaseModel) else show(field.default)
