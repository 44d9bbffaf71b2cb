"""Count properties of the sources: lines, files, imports, `Any`, ignored types, checks by class, import cycles.

    python tools/count.py            a table of this tree
    python tools/count.py OTHER      the same beside another checkout

Only the sources are read; Skipstone is not imported.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "benchmarks")
# Names of record and mechanism classes, to count checks of them.
RECORDS = ("DepthRecord", "ActivationRecord", "ExpertsRecord", "GroupsRecord", "NeuronGroupsRecord")
MECHANISMS = (
    "Adjustable", "RoutingModule", "DepthMechanism", "MixtureOfDepths", "TokenSelective", "EarlyExit", "GateSkip",
    "PolyGLU", "NeuronGroups", "MagnitudeGroups", "GroupRouter", "ExpertsMLP", "MagnitudeMLP", "GroupedMLP",
    "EmaThreshold", "Forced",
)  # fmt: skip
DUCKS = ("hasattr",)


class Source:
    """A Python file with its text, syntax tree and dotted module name."""

    def __init__(self, path: Path, root: Path) -> None:
        self.text = path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        parts = path.relative_to(root / "src").with_suffix("").parts if path.is_relative_to(root / "src") else ()
        self.module = ".".join(parts[:-1] if parts and parts[-1] == "__init__" else parts)

    def words(self, word: str) -> int:
        """Return how often a name occurs in the code, including imports but not comments and strings."""
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        return sum(t.type == tokenize.NAME and t.string == word for t in tokens)

    def imports(self) -> Iterator[str]:
        """Yield every imported module, including imports inside functions and for types only."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module or ""

    def imports_of(self, known: Mapping[str, object]) -> Iterator[str]:
        """Yield the imported modules among `known`; `from package import module` counts as an import of the module."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in known else node.module or "" for name in inside]
            else:
                continue
            yield from (name for name in names if name in known and name != self.module)

    def class_checks(self) -> int:
        """Return the number of isinstance checks of a record or a mechanism."""
        return sum(
            any(isinstance(n, ast.Name) and n.id in (*RECORDS, *MECHANISMS) for n in ast.walk(call.args[1]))
            for call in self._calls(("isinstance",))
            if len(call.args) == 2
        )

    def ducks(self) -> int:
        """Return the number of calls of hasattr, and of getattr with a default."""
        return len(self._calls(DUCKS)) + sum(len(call.args) == 3 for call in self._calls(("getattr",)))

    def _calls(self, names: tuple[str, ...]) -> list[ast.Call]:
        calls = (node for node in ast.walk(self.tree) if isinstance(node, ast.Call))
        return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]


def circles(files: list[Source]) -> list[tuple[str, ...]]:
    """Return groups of modules that import each other, directly or not (Tarjan's strongly connected components)."""
    known = {source.module: source for source in files if source.module}
    edges = {name: list(source.imports_of(known)) for name, source in known.items()}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[tuple[str, ...]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in edges[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(tuple(sorted(group)))

    for name in known:
        if name not in index:
            visit(name)
    return sorted(found)


def counts(root: Path) -> dict[str, float]:
    """Return the numbers of the table for one checkout, {name of the row: number}."""
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    files = [Source(path, root) for path in paths]
    of_src = [source for source in files if source.module]
    lines = sum(source.text.count("\n") for source in of_src)
    untyped = sum(source.words("Any") for source in of_src)
    return {
        "lines": sum(source.text.count("\n") for source in files),
        "lines below src": lines,
        "files": len(files),
        "modules imported": sum(len(list(source.imports())) for source in files),
        "`Any` below src": untyped,
        "`Any` a thousand lines": round(1000 * untyped / lines, 1),
        "type: ignore": sum(source.text.count("type: ignore") for source in of_src),
        "isinstance of records or mechanisms": sum(source.class_checks() for source in files),
        "hasattr, getattr with a default": sum(source.ducks() for source in of_src),
        "circles of imports": len(circles(of_src)),
    }


def main(arguments: list[str]) -> None:
    """Print the table of this tree beside those of other checkouts, whose paths are `arguments`."""
    roots = [*(Path(argument) for argument in arguments), ROOT]
    tables = [counts(root) for root in roots]
    for name in tables[-1]:
        print(f"{name:40}", *(f"{table[name]:>10,}" for table in tables))
    for circle in circles([Source(p, ROOT) for p in sorted((ROOT / "src").rglob("*.py"))]):
        print("circle:", ", ".join(circle))


if __name__ == "__main__":
    main(sys.argv[1:])
