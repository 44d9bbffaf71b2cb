"""What a saved folder carries for processes that never import skipstone: they load it with `trust_remote_code=True`.

transformers runs the file that `auto_map` in config.json names. Ours holds one import, so the code that runs is the
installed package, never a copy that ages in the folder.
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
    """Write the one-line module into `folder`, which is made if it is not there."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    names = ", ".join(sorted(CLASSES.values()))
    (target / f"{MODULE}.py").write_text(f"from skipstone import {names}  # noqa: F401\n", encoding="utf-8")
