"""The standard library of the running interpreter as units of text."""

from __future__ import annotations

import ast
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama_dist.data.documents import Document

# Tests, other people's packages, generated tables, and files that name the machine they were built on.
EXCLUDED_FOLDERS = {
    "__pycache__", "__phello__", "_bundled", "dist-packages", "encodings", "idle_test", "lib2to3", "msilib",
    "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
EXCLUDED_FILES = {"entities.py", "stringprep.py", "sitecustomize.py", "usercustomize.py", "__phello__.foo.py"}
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")
MIN_CHARACTERS = 200


@dataclass(frozen=True)
class Unit:
    """Documents that speak of one thing, and so must not be parted between train and held-out."""

    name: str
    kind: str
    documents: tuple[Document, ...] = ()
    file: Path | None = None

    @property
    def hint_bytes(self) -> int:
        """A lower bound of the size, before reading."""
        return self.file.stat().st_size if self.file else 0

    def read(self) -> tuple[Document, ...]:
        """The documents: those given, or the docstrings and the source of the file."""
        return self.documents if self.file is None else _read_module(self.name, self.file)


def list_units() -> list[Unit]:
    """A unit for each topic of the language reference (absent in a stripped Python) and for each module."""
    return [*_topics(), *_modules(Path(sysconfig.get_path("stdlib")))]


def _topics() -> Iterator[Unit]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        if len(text) >= MIN_CHARACTERS:
            yield Unit(f"topics/{name}", "topics", (Document(f"topics/{name}", text.strip() + "\n"),))


def _modules(root: Path) -> Iterator[Unit]:
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        excluded = (
            EXCLUDED_FOLDERS & set(relative.parts[:-1])
            or file.name in EXCLUDED_FILES
            or file.name.startswith(EXCLUDED_PREFIXES)
        )
        if not excluded and file.is_file():
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            yield Unit(name, "modules", file=file)


def _read_module(name: str, file: Path) -> tuple[Document, ...]:
    try:
        source = file.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return ()
    texts = {"source": source.replace("\r\n", "\n"), "docstrings": docstrings_of(source, name)}
    return tuple(Document(f"{kind}/{name}", text) for kind, text in texts.items() if len(text) >= MIN_CHARACTERS)


def docstrings_of(source: str, name: str) -> str:
    """The docstrings of a module, its classes and functions, each under the line that declares it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in the library's own strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    sections = [section for section in _sections(tree, name) if section]
    return "\n\n".join(sections) + "\n" if sections else ""


def _sections(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text and text.strip():
        yield f"{_heading(node, name)}\n\n{text.strip()}"
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _sections(child, f"{name}.{child.name}")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not isinstance(node, ast.FunctionDef):
            yield from _sections(child, f"{name}.{child.name}")


def _heading(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    return f"{name}({ast.unparse(node.args)})"
