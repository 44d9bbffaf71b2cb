"""Run the studies that need a GPU, or say in one line what is missing: `make gpu`, `make gpu-paper`.

    python tools/gpu.py --out results               # study gpu on this machine's GPU; at most 9 minutes
    python tools/gpu.py --rehearse --out results    # its parts with tiny sizes on a CPU
    python tools/gpu.py --paper --out results       # tsa_shakespeare at scale paper, several arms at a time

Neither network nor installation is needed: the package is imported from src, and its dependencies must be there. Parts
of study gpu that failed are run again; whatever is recorded is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "numpy",
    "psutil",
    "jinja2",
    "markdown_it",
    "yaml",
    "rich",
)
# Those that were most worth comparing, if not all can run: about ten fit beside each other.
PAPER_ARMS = "dense,tsa,hard=0.5,dense-4,dense-5,random=0.95,random=0.9,lambda=0,lambda=0.05,early-exit"


def missing(rehearse: bool) -> str:
    """Return in one line what this machine lacks for the studies; "" if nothing.

    rehearse: whether they are to run on a CPU with tiny sizes.
    """
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        return f"{sys.executable} has no {', '.join(absent)}: name another Python with GPU_PYTHON=..."
    if rehearse:
        return ""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} was built without CUDA; GPU_PYTHON=... names another"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device; `make gpu-rehearsal` needs none"
    if find_spec("triton") is None:
        return f"{sys.executable} has no triton, with which PyTorch for CUDA compiles"
    return ""


def forget_failed(out: Path, scale: str) -> int:
    """Delete the records of parts of the study gpu in which something failed, and return their number.

    out: folder of all records. scale: "paper" (on a GPU) or "laptop" (rehearsed).
    """
    paths = list((out / "gpu" / "records" / scale).glob("*.json"))
    failed = [path for path in paths if json.loads(path.read_text(encoding="utf-8"))["figures"]["failed"]]
    for path in failed:
        path.unlink()
    return len(failed)


def failures(out: Path, scale: str) -> list[str]:
    """Return one line for each failed measurement in the records of the study gpu.

    out, scale: as in `forget_failed`.
    """
    found = []
    for path in sorted((out / "gpu" / "records" / scale).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found += [f"{record['arm']}, {name}: {text}" for name, text in record["figures"]["failures"].items()]
    return found


def main() -> int:
    """Run what the arguments name, and return the exit status: 1 if something is missing or has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of pages and records")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--paper", action="store_true", help="Token-Selective Attention at its paper's size")
    parser.add_argument("--arms", default=PAPER_ARMS, help="with --paper: the arms, separated by commas")
    parser.add_argument("--jobs", type=int, default=10, help="with --paper: arms at a time")
    chosen = parser.parse_args()
    if lack := missing(chosen.rehearse):
        print(f"make gpu: {lack}", file=sys.stderr)
        return 1
    from skipstone_studies.run import reproduce

    if chosen.paper:
        arms = [arm.strip() for arm in chosen.arms.split(",")]
        options = {"scale": "paper", "arms": arms, "seeds": [42], "jobs": chosen.jobs}
        try:
            page = reproduce("tsa_shakespeare", out=chosen.out, runs=chosen.runs, **options)
        except (ValueError, OSError) as error:
            print(f"make gpu-paper: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        print(f"page: {page}")
        return 0
    scale = "laptop" if chosen.rehearse else "paper"
    if again := forget_failed(chosen.out, scale):
        print(f"running {again} parts again, of which something had failed")
    page = reproduce("gpu", scale=scale, out=chosen.out, runs=chosen.runs)
    failed = failures(chosen.out, scale)
    print("\n".join([*failed, f"page: {page}, {len(failed)} failures"]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
