"""Register the models with transformers' Auto classes once these are loaded; `import skipstone` loads nothing."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"  # whatever looks a model up by its name has loaded this
MODELS = ("skipstone.model.causal_lm", "skipstone.model.classifier")  # each registers itself and what it imports
PACKAGES = ("transformers.", "skipstone.")


def register() -> None:
    """Register Skipstone's models with transformers' Auto classes, now or as soon as transformers has loaded them.

    It returns at once, without importing transformers.
    """
    if AUTO in sys.modules:
        _import_models()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _import_models() -> None:
    for name in MODELS:
        import_module(name)


class _Watch(MetaPathFinder):
    """Notices that the Auto classes have been loaded, and finds no module itself.

    They may be loaded in the middle of another module of transformers or of ours, which our models then cannot import
    yet. So all modules of both packages are counted while they load, in all threads, and the models are imported when
    none is left.
    """

    def __init__(self) -> None:
        self.loading, self.lock = 0, threading.Lock()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find, with a loader that is watched."""
        if not name.startswith(PACKAGES):
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((one for one in found if one is not None), None)
        if spec is not None and isinstance(spec.loader, Loader):
            self._watch(spec.loader)
        return spec

    def _watch(self, loader: Loader) -> None:
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            with self.lock:
                self.loading += 1
            try:
                run(module)
            finally:
                with self.lock:
                    self.loading -= 1
                    done = not self.loading and AUTO in sys.modules and self in sys.meta_path
                    if done:
                        sys.meta_path.remove(self)
            if done:
                _import_models()

        loader.exec_module = exec_module  # type: ignore[method-assign]
