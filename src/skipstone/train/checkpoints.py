"""Check checkpoints before a run is resumed from one, so that damaged or missing files are named and never used."""

from __future__ import annotations

import zipfile
from pathlib import Path

from skipstone.core import atomic_write, checksums
from skipstone.core.checksums import Damaged
from skipstone.core.plain_text import read_object
from skipstone.runs import CHECKPOINTS, checkpoints
from skipstone.train.log_window import FILE as WINDOW

PARTIAL = ".partial"  # folder beside the checkpoints in which one is written before it is renamed
NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", WINDOW)
RANDOM, RANDOM_OF_ONE = "rng_state*.pth", "rng_state.pth"  # one per process


def check(checkpoint: Path) -> None:
    """Raise ValueError if a file of a checkpoint is damaged or missing.

    The message names the file, and the checkpoint before this one as the place from which the run can be continued.
    Sizes and SHA-256 hashes are compared; checkpoints of earlier releases have no hashes, so each of their files is
    opened instead.

    checkpoint: the folder RUN/checkpoints/checkpoint-N.
    """
    try:
        if not checksums.check(checkpoint):
            _look_at(checkpoint)
    except Damaged as error:
        before = [path for path in checkpoints(checkpoint.parent.parent) if path != checkpoint]
        where = f"from {before[-1].name}" if before else "from the beginning"
        raise ValueError(f"{error}; remove {str(checkpoint)!r} to continue {where}") from None


def tidy(folder: Path, keep: int) -> None:
    """Remove partly written checkpoints, and all complete ones except the newest `keep`.

    A process that was killed while it wrote a checkpoint leaves partly written ones behind. folder: the run folder.
    keep: at least 1.
    """
    atomic_write.remove(folder / CHECKPOINTS / PARTIAL)
    for old in checkpoints(folder)[:-keep]:
        atomic_write.remove(old)


def restore_other(checkpoint: Path, rank: int, count: int) -> bool:
    """Restore the random number generators from a checkpoint that another number of processes wrote.

    The generators of Python, numpy and torch are equal in all processes, so the first process's states serve every
    process. checkpoint: the folder RUN/checkpoints/checkpoint-N. rank: the index of this process. count: the number of
    processes now. Returns True if the generators were restored; False if as many processes wrote the checkpoint as
    train now (Trainer itself then restores them), or if it has no random states.
    """
    import random

    import numpy as np
    import torch

    own = checkpoint / (RANDOM_OF_ONE if count == 1 else f"rng_state_{rank}.pth")
    same = own.is_file() and (count == 1 or len(list(checkpoint.glob("rng_state_*.pth"))) == count)
    written = next((p for n in (RANDOM_OF_ONE, "rng_state_0.pth") if (p := checkpoint / n).is_file()), None)
    if same or written is None:
        return False
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        states = torch.load(written, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        one = states["cuda"]
        torch.cuda.random.set_rng_state(one[0] if isinstance(one, list) else one)
    return True


def _look_at(checkpoint: Path) -> None:
    """Check that all files of a checkpoint are there and can be opened."""
    names = [name for name in NEEDED if not (name == "model.safetensors" and any(checkpoint.glob("*.index.json")))]
    for name in names:
        if not (checkpoint / name).is_file():
            raise Damaged(f"{str(checkpoint / name)!r} is absent: the checkpoint is incomplete")
    if not any(checkpoint.glob(RANDOM)):
        raise Damaged(f"{str(checkpoint / 'rng_state.pth')!r} is absent: the checkpoint is incomplete")
    for path in sorted(checkpoint.iterdir()):
        try:
            _open(path)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Damaged(f"{str(path)!r} is damaged ({reason})") from None


def _open(path: Path) -> None:
    """Read enough of the file `path` to see that it is complete; raises whatever its library raises."""
    if path.suffix == ".json":
        read_object(path)
    elif path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            file.keys()
    elif path.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken is not None:
            raise ValueError(f"checksum of {broken}")
