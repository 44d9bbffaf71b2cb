"""Checkpoints are checked before a run goes on from one: what is damaged or absent is named, never used."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from skipstone.core import atomic_write, checksums
from skipstone.core.checksums import Damaged
from skipstone.runs import CHECKPOINTS, checkpoints
from skipstone.train.log_window import FILE as WINDOW

PARTIAL = ".partial"  # beside the checkpoints: where one is written before it gets its name
NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", WINDOW)
RANDOM = "rng_state*.pth"  # one of each process


def check(checkpoint: Path) -> None:
    """Raise ValueError, one line, naming what is damaged or absent in a checkpoint and the one before it.

    Sizes and hashes are compared; of a checkpoint of an earlier release, which has none, every file is looked at.
    """
    try:
        if not checksums.check(checkpoint):
            _look_at(checkpoint)
    except Damaged as error:
        before = [path for path in checkpoints(checkpoint.parent.parent) if path != checkpoint]
        where = f"from {before[-1].name}" if before else "from the beginning"
        raise ValueError(f"{error}; remove {str(checkpoint)!r} to go on {where}") from None


def tidy(folder: Path, keep: int) -> None:
    """Do what a process has left undone that was killed just after it had written a run's last checkpoint."""
    atomic_write.remove(folder / CHECKPOINTS / PARTIAL)
    for old in checkpoints(folder)[:-keep]:
        atomic_write.remove(old)


def _look_at(checkpoint: Path) -> None:
    names = [name for name in NEEDED if not (name == "model.safetensors" and any(checkpoint.glob("*.index.json")))]
    for name in names:
        if not (checkpoint / name).is_file():
            raise Damaged(f"{str(checkpoint / name)!r} is absent: the checkpoint is not whole")
    if not any(checkpoint.glob(RANDOM)):
        raise Damaged(f"{str(checkpoint / 'rng_state.pth')!r} is absent: the checkpoint is not whole")
    for path in sorted(checkpoint.iterdir()):
        try:
            _open(path)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Damaged(f"{str(path)!r} is damaged ({reason})") from None


def _open(path: Path) -> None:
    """Read as much of a file as shows that it is whole. Whatever its library raises goes through."""
    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            file.keys()
    elif path.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is not None:
            raise ValueError(f"checksum of {broken}")
