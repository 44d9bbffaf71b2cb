"""Code blocks of documentation pages, which tests run as readers copy them."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Page:
    """A Markdown page of the repository, such as `Page("docs/ecosystem.md")`."""

    def __init__(self, name: str) -> None:
        self.text = (ROOT / name).read_text(encoding="utf-8")
        self.folder = (ROOT / name).parent

    def blocks(self, language: str = "python") -> list[str]:
        """Return the fenced code blocks of a language, in order."""
        return re.findall(rf"```{language}\n(.*?)```", self.text, re.DOTALL)

    def block(self, words: str, language: str = "python") -> str:
        """Return the only code block that contains `words`; skip the test if a package that it imports is missing."""
        [found] = [block for block in self.blocks(language) if words in block]
        for name in _imported(found) if language == "python" else ():
            if find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
        return found

    def command(self, words: str) -> list[str]:
        """Return the only indented line that contains `words`, split as a shell would."""
        import shlex

        [found] = [line for line in self.text.splitlines() if line.startswith("    ") and words in line]
        return shlex.split(found, comments=True)

    def files(self) -> list[Path]:
        """Return the files of the repository that the page links to, and the recipes that it names."""
        links = [self.folder / name for name in re.findall(r"\]\(((?!http)[^)#]+)\)", self.text)]
        recipes = [ROOT / name for name in re.findall(r"\brecipes/[a-z_-]+\.yaml", self.text)]
        return [*links, *recipes]


def unformatted(code: str) -> str:
    """Code without indentation and empty lines, which are a formatter's affair."""
    return "\n".join(line.strip() for line in code.splitlines() if line.strip())


def _imported(code: str) -> set[str]:
    """Return the top-level packages that a program imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found
