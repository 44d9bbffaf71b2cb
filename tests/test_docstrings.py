"""Public docstrings begin with a sentence, and nine of ten parameters are named in them."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "src" / "skipstone"
# Parameters that a docstring may leave out because name and type tell all (`tokens: int` of what counts tokens), as a
# share of all. It was .53 before the docstrings were rewritten for a reader who sees nothing else.
UNNAMED = 0.10

Documented = tuple[str, ast.FunctionDef | ast.ClassDef, str]


@cache
def documented() -> list[Documented]:
    """Return where it stands, the definition and the docstring of every public function and class that has one."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node)
                if text:
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node, text))
    return found


def test_docstrings_begin_with_a_sentence() -> None:
    """The first paragraph starts with a capital letter, a digit or code, and ends with a full stop or a colon."""
    wrong = []
    for place, _, text in documented():
        first = text.split("\n\n")[0].strip()
        if not (first[0].isupper() or first[0].isdigit() or first[0] in "`(|") or first[-1] not in ".:)":
            wrong.append(f"{place}: {first}")
    assert not wrong, "\n".join(wrong)


def test_parameters_are_named() -> None:
    """At most a tenth of the parameters of public functions do not occur in their docstrings."""
    missing, count = [], 0
    for place, node, text in documented():
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]
            count += len(names)
            missing += [f"{place}: {name}" for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]
    assert count > 1000
    assert len(missing) <= UNNAMED * count, "\n".join(missing)
