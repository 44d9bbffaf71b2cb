"""Imports only go down the floors, siblings never import each other, files and functions are short, names unique."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS: dict[str, float] = {
    "ops": 0,
    "core": 1,
    "nn": 2,
    "mechanisms": 2,
    "model": 3,
    "data": 3,
    "in_place": 3.2,
    "measure": 3.4,
    "budget": 3.5,
    "train": 4,
    "generate": 4,
    "evaluate": 4,
    "report": 4,
    "adapt": 4.25,
    "view": 4.25,
    "skipstone_studies": 4.5,
    "skipstone_cli": 5,
}
# Modules straight under skipstone/ (its __init__, presets) are the facade: they hand out what lies on floors up to 3,
# and, inside a function only, up to 4, because floor 4 may import them.
FACADE, FACADE_FLOOR, FACADE_LAZY_FLOOR = "facade", 3.5, 4

# Inside model/, build.py alone joins parts and mechanisms. Others need a reason: {(file, subpackage): reason}.
MODEL_MAY_SEE = {
    ("model/parts.py", "nn"): "the options of parts are parsed by their classes",
    ("model/parts.py", "mechanisms"): "the options of mechanisms are parsed by their classes",
    ("model/build.py", "nn"): "the one place that joins parts and mechanisms",
    ("model/build.py", "mechanisms"): "the one place that joins parts and mechanisms",
}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
# {file or file::function: reason}
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def part_of(module: str) -> str | None:
    """The part of the house that a dotted module belongs to; None when it is not ours."""
    parts = module.split(".")
    if parts[0] != "skipstone":
        return parts[0] if parts[0] in ("skipstone_cli", "skipstone_studies") else None
    return FACADE if len(parts) == 1 or (len(parts) == 2 and parts[1] not in FLOORS) else parts[1]


def part_of_file(file: str) -> str:
    """The same for a path below src/, whose folder counts even when it has no floor yet."""
    parts = Path(file).parts
    if parts[0] != "skipstone":
        return parts[0]
    if parts[1] == "__main__.py":  # nothing imports it; it is the command under another name
        return "skipstone_cli"
    return FACADE if len(parts) == 2 else parts[1]


@dataclass(kw_only=True)
class Facts:
    """What the rules below look at in a source. imports: with whether they are inside a function."""

    imports: list[tuple[ast.Import | ast.ImportFrom | ast.Call, bool]] = field(default_factory=list)
    functions: list[tuple[str, int]] = field(default_factory=list)  # name and lines
    classes: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # that `isinstance` is asked about


@cache  # each file is read by several tests; its tree would be in the way of the garbage collector
def facts(source: str) -> Facts:
    found = Facts()
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(source), False)]
    while waiting:
        node, lazy = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.functions.append((node.name, (node.end_lineno or node.lineno) - node.lineno + 1))
            lazy = True
        elif isinstance(node, ast.ClassDef):
            found.classes.append(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom) or (name := called(node)).endswith("import_module"):
            found.imports.append((node, lazy))
        elif name == "isinstance" and len(node.args) == 2:
            found.kinds += [named(n) for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute | ast.Name)]
        waiting += [(child, lazy) for child in ast.iter_child_nodes(node)]
    return found


def named(node: ast.expr) -> str:
    """The last part of a dotted name; "" for any other expression."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def called(node: ast.AST) -> str:
    return named(node.func) if isinstance(node, ast.Call) else ""


def imported(source: str, package: str) -> Iterator[tuple[str, bool, int]]:
    """(module, inside a function, line) of each import, relative ones resolved against `package`."""
    for node, lazy in facts(source).imports:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = from_targets(node, package)
        else:
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for name in names:
            yield name, lazy, node.lineno


def from_targets(node: ast.ImportFrom, package: str) -> list[str]:
    base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    origin = ".".join([*base, *([node.module] if node.module else [])])
    # `from skipstone import nn` names a subpackage, not something of the facade.
    return [f"skipstone.{a.name}" for a in node.names] if origin == "skipstone" else [origin]


def violations(file: str, source: str) -> list[str]:
    """What a file, named from src/, imports against the rules."""
    here = part_of_file(file)
    if here not in FLOORS and here != FACADE:
        return [f"{file}: {here} is on no floor; give it one in FLOORS"]
    found = []
    for module, lazy, line in imported(source, ".".join(Path(file).parent.parts)):
        there = part_of(module)
        if there is not None and not allowed(file, here, there, lazy):
            found.append(f"{file}:{line}: {here} must not import {module}{' at the top' if here == FACADE else ''}")
    return found


def allowed(file: str, here: str, there: str, lazy: bool) -> bool:
    if here == there:
        return True
    if here == FACADE:
        return FLOORS.get(there, 99) <= (FACADE_LAZY_FLOOR if lazy else FACADE_FLOOR)
    floor_there = FACADE_FLOOR if there == FACADE else FLOORS.get(there, 99)
    if here == "model" and there in ("nn", "mechanisms"):
        return (file.removeprefix("skipstone/"), there) in MODEL_MAY_SEE
    return floor_there < FLOORS[here]


def long_functions(file: str, source: str) -> list[str]:
    """`file::function` of every function with more than MAX_FUNCTION_LINES lines."""
    return [f"{file}::{name}" for name, lines in facts(source).functions if lines > MAX_FUNCTION_LINES]


def sources(*folders: str) -> dict[str, str]:
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def repeated_classes(sources: dict[str, str]) -> list[str]:
    """Return a line for each class name of the package that is defined twice; names with an underscore are private."""
    homes: dict[str, list[str]] = {}
    for file, source in sources.items():
        for name in facts(source).classes:
            if not name.startswith("_"):
                homes.setdefault(name, []).append(file)
    return [f"{name}: {', '.join(files)}" for name, files in sorted(homes.items()) if len(files) > 1]


def test_imports_go_down_the_floors() -> None:
    ours = {name.removeprefix("src/"): text for name, text in sources("src").items()}
    assert len(ours) > 10
    assert [v for name, text in ours.items() for v in violations(name, text)] == []


def test_files_are_short() -> None:
    long = {name for name, text in sources("src", "tests").items() if text.count("\n") > MAX_FILE_LINES}
    assert long == set(LONG_FILES), "split the file, or keep LONG_FILES true"


def test_functions_are_short() -> None:
    long = {where for name, text in sources("src", "tests").items() for where in long_functions(name, text)}
    assert long == set(LONG_FUNCTIONS), "split the function, or keep LONG_FUNCTIONS true"


def test_no_modules_import_each_other() -> None:
    """Not even inside functions or for types alone: what imports each other cannot be read or moved alone."""
    texts = {module_of(name): text for name, text in sources("src").items()}
    graph = {module: modules_imported(text, texts) - {module} for module, text in texts.items()}
    assert sum(map(len, graph.values())) > len(graph)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def module_of(file: str) -> str:
    return ".".join(Path(file).with_suffix("").parts).removeprefix("src.").removesuffix(".__init__")


def modules_imported(source: str, known: Container[str]) -> set[str]:
    """Those of `known` that a source imports; `from package import module` is an import of the module."""
    found = set()
    for node, _ in facts(source).imports:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module or "" for name in inside}
    return {name for name in found if name in known}


def test_only_core_records_asks_what_kind_a_record_is() -> None:
    """Others say what they take (`of_kind`, `find`, `expect`) or read it by `READERS`: a new kind touches two files."""
    asked = {name: [k for k in facts(text).kinds if k.endswith("Record")] for name, text in sources("src").items()}
    assert len(asked) > 10
    assert {name: kinds for name, kinds in asked.items() if kinds} == {}
    assert facts("isinstance(record, DepthRecord | core.ExpertsRecord)").kinds == [
        "DepthRecord",
        "ExpertsRecord",
        "core",
    ]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("skipstone/ops/a.py", "from skipstone.core import tokens"),
        ("skipstone/ops/a.py", "from skipstone import core"),
        ("skipstone/ops/a.py", "from .. import nn"),
        ("skipstone/core/a.py", "from ..nn.norm import RMSNorm"),
        ("skipstone/nn/a.py", "import skipstone.mechanisms"),
        ("skipstone/mechanisms/a.py", "def f():\n    from skipstone.nn import block"),
        ("skipstone/mechanisms/__init__.py", "from ..nn import block"),
        ("skipstone/mechanisms/a.py", "from skipstone import presets"),
        ("skipstone/nn/a.py", "import skipstone"),
        ("skipstone/nn/a.py", "import importlib\nimportlib.import_module('skipstone.model.build')"),
        ("skipstone/model/decoder.py", "from skipstone.mechanisms import polyglu"),
        ("skipstone/model/decoder.py", "from skipstone.nn import norm"),
        ("skipstone/model/build.py", "from skipstone.data import corpora"),
        ("skipstone/train/a.py", "from skipstone.evaluate.evaluation import evaluate"),
        ("skipstone/evaluate/a.py", "from skipstone_studies import run"),
        ("skipstone/report/a.py", "import skipstone_cli.main"),
        ("skipstone/presets.py", "from skipstone.train import run"),
        ("skipstone/__init__.py", "def f():\n    from skipstone_studies import run"),
        ("skipstone/gadgets/a.py", "import os"),
    ],
)
def test_an_import_up_or_sideways_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("skipstone/core/a.py", "import torch\nfrom skipstone.ops import reference\nfrom . import strict"),
        ("skipstone/nn/block.py", "from ..core.tokens import Tokens\nfrom .norm import RMSNorm"),
        ("skipstone/model/build.py", "from skipstone.nn import block\nfrom skipstone.mechanisms import TABLE"),
        ("skipstone/model/decoder.py", "from .build import build_block"),
        ("skipstone/train/run.py", "from skipstone import presets\nfrom skipstone.model import config"),
        ("skipstone/__init__.py", "from .model.config import SkipstoneConfig\nfrom . import presets"),
        ("skipstone/presets.py", "def f():\n    from skipstone.train import run"),
        ("skipstone_studies/demo.py", "from skipstone.report import run"),
        ("skipstone_cli/verbs/eval.py", "def f():\n    from skipstone_studies import run"),
    ],
)
def test_an_import_down_is_fine(file: str, source: str) -> None:
    assert violations(file, source) == []


def test_a_long_function_is_found() -> None:
    body = "    x = 1\n" * MAX_FUNCTION_LINES
    assert long_functions("a.py", f"def long():\n{body}") == ["a.py::long"]
    assert long_functions("a.py", f"def short():\n{body.removesuffix('    x = 1' + chr(10))}") == []


def test_a_class_has_its_name_for_itself() -> None:
    sources = {str(path): path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
    assert repeated_classes(sources) == []
    assert repeated_classes({"a.py": "class Plan: ...", "b.py": "def f():\n    class Plan: ...\nclass _X: ..."}) == [
        "Plan: a.py, b.py"
    ]
