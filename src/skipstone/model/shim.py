"""A module saved with each model, for processes that load it with `trust_remote_code=True` without importing skipstone.

transformers runs the file that `auto_map` in config.json names. The file written here holds one import, so that the
installed package runs and not an outdated copy in the folder.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

MODULE = "modeling_skipstone"
CLASSES = {
    "AutoConfig": "SkipstoneConfig",
    "AutoModel": "SkipstoneModel",
    "AutoModelForCausalLM": "SkipstoneForCausalLM",
    "AutoModelForSequenceClassification": "SkipstoneForSequenceClassification",
}
AUTO_MAP = {auto: f"{MODULE}.{name}" for auto, name in CLASSES.items()}


def write_shim(folder: str | PathLike[str]) -> None:
    """Write modeling_skipstone.py, a module with one import of skipstone, into `folder`, which is created if needed.

    `auto_map` in config.json names it, so that transformers loads the model with `trust_remote_code=True` in a process
    that has not imported skipstone.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    names = ", ".join(sorted(CLASSES.values()))
    (target / f"{MODULE}.py").write_text(f"from skipstone import {names}  # noqa: F401\n", encoding="utf-8")
