"""The rules of the house, held by reading the sources. Each rule is also shown a source that breaks it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
LAYERS = (
    "llama_dist",  # the version only
    "errors",
    "files",
    "boxes",
    "layout",
    "config",
    "model",
    "data",
    "runtime",
    "parallel",
    "pipeline",
    "checkpoint",
    "exchange",
    "eval",
    "train",
    "generate",
    "commands",
    "cli",
    "__main__",
)
MAX_FILE_LINES = 399
MAX_FUNCTION_LINES = 60
DEEPSPEED_FILES = ("llama_dist/pipeline/engine.py", "llama_dist/pipeline/partitions.py")
# The chosen command; the readers of the formats that come (pyarrow and datasets take seconds); the texts of the stdlib.
IMPORT_BY_NAME = (
    "llama_dist/cli.py",
    "llama_dist/data/clean/filters.py",  # an optional dependency
    "llama_dist/data/inputs.py",
    "llama_dist/data/stdlib.py",
    "llama_dist/exchange/gguf_files.py",  # an optional dependency
)
TORCH_FREE = ("errors.py", "files.py", "boxes.py", "layout.py", "cli.py", "pipeline/schedule.py", "train/optim.py")
COLLECTIVES = (
    r"(torch\.distributed|dist)\."
    r"(all_(reduce|gather|to_all)\w*|broadcast\w*|reduce\w*|gather\w*|scatter\w*|i?send|i?recv|barrier)"
)

Sources = dict[str, str]
Rule = Callable[[Sources], Iterator[str]]


def package_sources() -> Sources:
    """Path from the repository's root -> text, of every module of the package."""
    files = sorted((REPO / "llama_dist").rglob("*.py"))
    return {str(path.relative_to(REPO)): path.read_text(encoding="utf-8") for path in files}


def walk(sources: Sources) -> Iterator[tuple[str, ast.AST]]:
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            yield path, node


def functions(sources: Sources) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, node in walk(sources):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield path, node


def imported_names(node: ast.AST) -> list[str]:
    """The modules that a statement imports; of `from a import b` both a and a.b, since b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        return [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return []


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def layer_of(module: str) -> str:
    name = module.split(".")[1] if "." in module else module
    return "config" if name.startswith("config_") else name


def imports_within(sources: Sources) -> dict[str, set[str]]:
    """module -> the modules of the package that it imports."""
    modules = {module_of(path) for path in sources}
    found: dict[str, set[str]] = {module: set() for module in modules}
    for path, node in walk(sources):
        names = [name for name in imported_names(node) if name in modules]
        # `from llama_dist import files` is an import of files, not of the root.
        own = [name for name in names if not any(other.startswith(name + ".") for other in names)]
        found[module_of(path)].update(own)
    return found


def imports_point_down(sources: Sources) -> Iterator[str]:
    for module, imported in imports_within(sources).items():
        for other in sorted(imported):
            if LAYERS.index(layer_of(other)) > LAYERS.index(layer_of(module)):
                yield f"{module} imports {other}, which is above it"


def imports_have_no_cycle(sources: Sources) -> Iterator[str]:
    left = {module: set(imported) - {module} for module, imported in imports_within(sources).items()}
    while free := {module for module, imported in left.items() if not imported}:
        left = {module: imported - free for module, imported in left.items() if module not in free}
    if left:
        yield f"in or behind a cycle of imports: {sorted(left)}"


def imports_are_absolute_and_at_the_top(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and node not in tree.body:
                yield f"{path}:{node.lineno}: an import that is not at the top"
            if isinstance(node, ast.ImportFrom) and node.level:
                yield f"{path}:{node.lineno}: a relative import"
            named = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
            if re.fullmatch(r"__import__|(importlib\.)?import_module", named) and path not in IMPORT_BY_NAME:
                yield f"{path}:{node.lineno}: imports by name"


def files_are_short(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        if text.count("\n") > MAX_FILE_LINES:
            yield f"{path}: {text.count(chr(10))} lines, at most {MAX_FILE_LINES}"


def functions_are_short(sources: Sources) -> Iterator[str]:
    for path, node in functions(sources):
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}"


def functions_are_annotated(sources: Sources) -> Iterator[str]:
    for path, node in functions(sources):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or node.returns is None:
            yield f"{path}:{node.lineno}: {node.name} is not annotated: {bare or 'what it returns'}"


def modules_have_docstrings(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        tree = ast.parse(text)
        if tree.body and not ast.get_docstring(tree):
            yield f"{path}: has no docstring"


def deepspeed_is_imported_in_two_files(sources: Sources) -> Iterator[str]:
    for path, node in walk(sources):
        if any(name.split(".")[0] == "deepspeed" for name in imported_names(node)) and path not in DEEPSPEED_FILES:
            yield f"{path}:{node.lineno}: imports deepspeed"


def integers_need_no_torch(sources: Sources) -> Iterator[str]:
    for path, node in walk(sources):
        if path.removeprefix("llama_dist/") in TORCH_FREE:
            if any(name.split(".")[0] == "torch" for name in imported_names(node)):
                yield f"{path}:{node.lineno}: imports torch"


def only_runtime_knows_the_device(sources: Sources) -> Iterator[str]:
    for path, node in walk(sources):
        if path == "llama_dist/runtime.py":
            continue
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.cuda":
            yield f"{path}:{node.lineno}: torch.cuda"
        if any(name.startswith("torch.cuda") for name in imported_names(node)):
            yield f"{path}:{node.lineno}: imports torch.cuda"
        if isinstance(node, ast.Constant) and node.value in ("nccl", "gloo"):
            yield f"{path}:{node.lineno}: names the backend {node.value}"


def groups_are_made_in_runtime(sources: Sources) -> Iterator[str]:
    for path, node in walk(sources):
        if isinstance(node, ast.Attribute) and node.attr in ("new_group", "init_process_group", "WORLD"):
            if path != "llama_dist/runtime.py":
                yield f"{path}:{node.lineno}: {node.attr} outside runtime.py"


def nothing_global_changes(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                yield f"{path}:{node.lineno}: global {', '.join(node.names)}"
        for statement in tree.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                calls = [call for call in ast.walk(statement.value) if isinstance(call, ast.Call)]
                if any("group" in ast.unparse(call.func) for call in calls):
                    yield f"{path}:{statement.lineno}: a process group at the level of the module"


def collectives_name_their_group(sources: Sources) -> Iterator[str]:
    """A collective on the wrong group raises nothing and gives wrong numbers: none may fall back to all ranks."""
    for path, node in walk(sources):
        if isinstance(node, ast.Call) and re.fullmatch(COLLECTIVES, ast.unparse(node.func)):
            if not any(keyword.arg == "group" for keyword in node.keywords):
                yield f"{path}:{node.lineno}: {ast.unparse(node)} names no group"


def one_stage_is_not_a_special_case(sources: Sources) -> Iterator[str]:
    for path, node in walk(sources):
        if isinstance(node, ast.Compare) and not path.startswith("llama_dist/pipeline/"):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            if "1" in sides and any(re.fullmatch(r"(.*\.)?pp(_size)?", side) for side in sides):
                yield f"{path}:{node.lineno}: {ast.unparse(node)}"


def errors_are_not_swallowed(sources: Sources) -> Iterator[str]:
    for path, node in walk(sources):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"{path}:{node.lineno}: except without a type"


def nothing_is_left_to_do(sources: Sources) -> Iterator[str]:
    for path, text in sources.items():
        for number, line in enumerate(text.splitlines(), 1):
            if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", line):
                yield f"{path}:{number}: {line.strip()}"


P = "llama_dist/train/x.py"
BROKEN: list[tuple[Rule, Sources]] = [
    (imports_point_down, {"llama_dist/model/a.py": "import llama_dist.train.b", "llama_dist/train/b.py": ""}),
    (imports_point_down, {"llama_dist/files.py": "from llama_dist import config", "llama_dist/config.py": ""}),
    (imports_point_down, {"llama_dist/boxes.py": "from llama_dist.config_x import y", "llama_dist/config_x.py": ""}),
    (
        imports_have_no_cycle,
        {"llama_dist/eval/a.py": "import llama_dist.eval.b", "llama_dist/eval/b.py": "from llama_dist.eval import a"},
    ),
    (imports_are_absolute_and_at_the_top, {P: "def f():\n    import torch"}),
    (imports_are_absolute_and_at_the_top, {P: "try:\n    import torch\nexcept ImportError:\n    pass"}),
    (imports_are_absolute_and_at_the_top, {P: "from . import loop"}),
    (imports_are_absolute_and_at_the_top, {P: "import importlib\nm = importlib.import_module('torch')"}),
    (files_are_short, {P: "\n" * (MAX_FILE_LINES + 1)}),
    (functions_are_short, {P: "class A:\n  def f(self):\n" + "    pass\n" * MAX_FUNCTION_LINES}),
    (functions_are_annotated, {P: "def f(x) -> int: ..."}),
    (functions_are_annotated, {P: "class A:\n  def f(self, *, x: int): ..."}),
    (modules_have_docstrings, {P: "import os"}),
    (deepspeed_is_imported_in_two_files, {P: "import deepspeed"}),
    (deepspeed_is_imported_in_two_files, {P: "from deepspeed.utils import logger"}),
    (integers_need_no_torch, {"llama_dist/boxes.py": "from torch import Tensor"}),
    (only_runtime_knows_the_device, {P: "import torch\nif torch.cuda.is_available():\n    pass"}),
    (only_runtime_knows_the_device, {P: "from torch import cuda"}),
    (only_runtime_knows_the_device, {P: "f(backend='nccl')"}),
    (groups_are_made_in_runtime, {P: "g = torch.distributed.new_group([0])"}),
    (groups_are_made_in_runtime, {P: "def f():\n    return dist.group.WORLD"}),
    (nothing_global_changes, {P: "def f():\n    global g\n    g = 1"}),
    (nothing_global_changes, {"llama_dist/runtime.py": "GROUP: object = dist.new_group([0, 1])"}),
    (collectives_name_their_group, {P: "dist.all_reduce(x)"}),
    (collectives_name_their_group, {P: "torch.distributed.broadcast_object_list(box, src=0)"}),
    (one_stage_is_not_a_special_case, {P: "if layout.pp > 1:\n    pass"}),
    (one_stage_is_not_a_special_case, {P: "while 1 == pp:\n    pass"}),
    (errors_are_not_swallowed, {P: "try:\n    f()\nexcept:\n    pass"}),
    (nothing_is_left_to_do, {P: "# TO" + "DO: later"}),
]
RULES = list(dict.fromkeys(rule for rule, _ in BROKEN))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    sources = package_sources()
    assert len(sources) > 50, "the package's files were not found"
    assert list(rule(sources)) == []


@pytest.mark.parametrize(("rule", "sources"), BROKEN, ids=[rule.__name__ for rule, _ in BROKEN])
def test_a_source_that_breaks_it_is_caught(rule: Rule, sources: Sources) -> None:
    assert list(rule(sources))


def test_every_module_has_a_layer() -> None:
    assert {layer_of(module_of(path)) for path in package_sources()} <= set(LAYERS)
    sources = package_sources()
    assert imports_within(sources)["llama_dist.train.loop"] >= {"llama_dist.train.coordinator", "llama_dist.config"}


# Of machines and of package registries; written so that they do not match themselves.
PRIVATE = (
    r"(?<![\w./-])/(?:root|home|work|opt|mnt|Users)/"
    r"|pypi\.org|python[h]osted|download\.pytorch|npm[j]s|deb\.debian"
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    return [REPO / name for name in listed.split("\0") if name and (REPO / name).is_file()]


def private_lines(name: str, text: str) -> list[str]:
    lines = enumerate(text.splitlines(), 1)
    return [f"{name}:{number}: {line.strip()}" for number, line in lines if re.search(PRIVATE, line)]


def test_no_file_names_a_machine_or_a_registry() -> None:
    files = tracked_files()
    assert REPO / "setup.cfg" in files
    assert [line for path in files for line in private_lines(path.name, path.read_text(errors="replace"))] == []
    assert private_lines("x", "cd /" + "work/main") and private_lines("x", "https://pypi" + ".org/simple")


def test_launchers_import_nothing_of_the_package() -> None:
    def imports(text: str) -> bool:
        return re.search(r"(from|import)\s+llama_dist", text) is not None

    files = [path for path in (REPO / "launch").iterdir() if path.is_file()]
    assert files and not [path.name for path in files if imports(path.read_text())]
    assert imports("python3 -c 'import llama_dist'") and imports("from llama_dist.config import x")


def test_every_test_file_is_collected() -> None:
    """A folder that pytest passes over in silence is a suite that cannot fail."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200, check=False)
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    files = {str(path.relative_to(REPO)) for path in (REPO / "tests").rglob("test_*.py")}
    assert collected == files, done.stdout[-2000:]
