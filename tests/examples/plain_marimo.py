"""As much of marimo as the examples use, for tests where it is not installed: cells run once, in the file's order."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any


class App:
    """A notebook's cells in the order of the file; a cell gets what earlier ones returned, by its parameters' names."""

    def __init__(self, **options: Any) -> None:
        self.setup = nullcontext()
        self.cells: list[Callable[..., Any]] = []
        self.shown: list[Any] = []

    def cell(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return self.cell
        self.cells.append(function)
        return function

    def function(self, made: Any) -> Any:
        return made

    class_definition = function

    def run(self) -> None:
        defined: dict[str, Any] = {}
        for cell in self.cells:
            values = cell(**{name: defined[name] for name in inspect.signature(cell).parameters})
            defined |= dict(zip(returned(cell), values or (), strict=True))


def returned(cell: Callable[..., Any]) -> list[str]:
    """Return the names of the variables that a cell returns."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(cell))).body
    value = function.body[-1].value  # type: ignore[attr-defined]
    return [] if value is None else [name.id for name in value.elts]


class Slider:
    def __init__(self, start: float, stop: float, value: float, **options: Any) -> None:
        assert start <= value <= stop
        self.value = value


class TextArea:
    def __init__(self, value: str, **options: Any) -> None:
        self.value = value


def module(**arguments: Any) -> ModuleType:
    """The module `marimo` of a script that got `arguments`."""
    made = ModuleType("marimo")
    made.App = App  # type: ignore[attr-defined]
    made.cli_args = lambda: arguments  # type: ignore[attr-defined]
    made.ui = ModuleType("marimo.ui")  # type: ignore[attr-defined]
    made.ui.slider, made.ui.text_area = Slider, TextArea
    for name in ("md", "hstack", "vstack", "plain_text"):
        setattr(made, name, lambda *parts, **options: parts)
    return made
