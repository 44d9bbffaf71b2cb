"""Run one part of the GPU study in this process: `python -m skipstone_studies.speed.gpu.child PART OUT`.

PART is the name of the part, OUT the file for its measurements; its recipe is read as JSON from stdin.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import torch

from skipstone_studies.speed.gpu.bench import Bench


def main(part: str, out: Path) -> None:
    """Measure one part of the GPU study in this process, and write the measurements to the file `out`.

    What is measured follows from the recipe, an entry of `parts.arms` with a key "seed", which is read as JSON from
    stdin. part: its name; not used here.
    """
    sizes = json.load(sys.stdin)
    torch.manual_seed(sizes["seed"])
    bench = Bench(out=out, device=torch.device(sizes["device"]), sizes=sizes)
    bench.write()
    import_module(f"skipstone_studies.speed.gpu.{sizes['module']}").measure(bench)
    bench.write()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
