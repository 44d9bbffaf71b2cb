"""`placeholders`: import modules of this package for a moment without the heavy libraries that they need.

The options of a mechanism are a dataclass in the file of the mechanism, which imports torch. Parsing them needs no
tensor, but loading torch and transformers takes seconds. With placeholders for both, the command checks a recipe (the
YAML file of a model and its training) with the very code that builds the model, in a tenth of a second, and nothing
about options stands in two places.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn, TypeVar

T = TypeVar("T")
# safetensors is light, but a module of it imports torch and would keep the placeholder.
HEAVY = (
    *("torch", "transformers", "huggingface_hub", "accelerate", "datasets", "numba", "numpy", "peft", "triton"),
    "safetensors",
)


def checked_lightly(module: str, function: str, *arguments: object) -> list[str]:
    """Call a function that returns a list of error messages, without loading torch and other heavy libraries.

    module: dotted name of the module to import. function: the function's name there, called with `arguments`. Returns
    the messages; [] if the function needs one of these libraries or raises an error, because callers check everything
    again after loading them.
    """
    with placeholders():
        try:
            found: list[str] = getattr(importlib.import_module(module), function)(*arguments)
        except Exception:
            return []
        return [str(line) for line in found]


@contextmanager
def placeholders() -> Iterator[None]:
    """Replace heavy libraries (torch, transformers, ...) by empty placeholders in imports within a `with` block.

    Modules of this package and placeholders that were imported inside the block are removed from `sys.modules` at its
    end, so that their next import is a real one. If any heavy library is loaded already, nothing is replaced. Use it in
    single-threaded processes only: imports of other threads would get placeholders too.
    """
    if any(name in sys.modules for name in HEAVY):
        yield
        return
    before = {name: {*vars(module)} for name, module in sys.modules.items() if _is_ours_or_heavy(name)}
    finders = [*sys.meta_path]
    sys.meta_path.insert(0, _Finder())
    try:
        yield
    finally:
        sys.meta_path[:] = finders  # also the one that registers our models and leaves when it has done so
        for name in [name for name in sys.modules if _is_ours_or_heavy(name)]:
            if name not in before:
                del sys.modules[name]
                continue
            for added in {*vars(sys.modules[name])} - before[name]:  # a package holds its modules as attributes
                delattr(sys.modules[name], added)


def _is_ours_or_heavy(name: str) -> bool:
    first = name.partition(".")[0]
    return first in HEAVY or first.startswith(__name__.partition(".")[0])


class _Finder(MetaPathFinder, Loader):
    """An import hook that finds a placeholder for every module of a heavy library."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: a placeholder has no code to run."""


class _Module(ModuleType):
    """A module in which every name is a placeholder; names of exceptions are exceptions that nobody raises."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {}) if name.endswith("Error") else _Placeholder()


class _Placeholder:
    """Stands for a class, function or value while modules are imported.

    As a base class it is no base at all, and as a decorator it returns what it decorates. It has no value: what would
    compute with it raises TypeError.
    """

    def __getattr__(self, name: str) -> _Placeholder:
        if name.startswith("__") and name != "__post_init__":
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: object, **options: object) -> object:
        decorates = len(arguments) == 1 and not options and callable(arguments[0])
        return arguments[0] if decorates and not isinstance(arguments[0], _Placeholder) else self

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: object) -> _Placeholder:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        """Do nothing."""

    def __or__(self, other: object) -> _Placeholder:
        return self

    __ror__ = __or__

    def __iter__(self) -> NoReturn:  # without it, Python would ask for items 0, 1, 2, ... for ever
        raise TypeError("a placeholder has no items")

    def __bool__(self) -> NoReturn:
        raise TypeError("a placeholder has no value")
