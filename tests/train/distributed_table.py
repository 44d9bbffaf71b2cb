"""The table of docs/distributed.md: losses of 1, 2 and 4 processes with every mechanism.

PYTHONPATH=src:tests python -m train.distributed_table docs/distributed.md           # all of it
PYTHONPATH=src:tests python -m train.distributed_table docs/distributed.md segment   # that row alone
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from train.ranks import on_ranks
from train.tool import DENSE, MODELS, lines, mod, recipe, train

GROUPS = {"group_size": 8, "capacity": 0.5}
GATES = {"name": "gate_skip", "layers": "1:", "capacity": 0.75}
MORE: dict[str, dict[str, Any]] = {
    "gate_skip": {**DENSE, "mechanisms": [{**GATES, "on": "attention"}, {**GATES, "on": "mlp"}]},
    "skipgpt": {**DENSE, "mechanisms": [{**mod("ema_threshold"), "on": site} for site in ("attention", "mlp")]},
    "neuron_groups": {**DENSE, "intermediate_size": 64, "neuron_groups": {**GROUPS, "chunk_size": 8}},
    "magnitude": {**DENSE, "neuron_groups": {"decision": "magnitude", "capacity": 0.5, "group_size": 1}},
    "zeros": {**DENSE, "activation": "relu", "neuron_groups": {"decision": "zeros", "price": 0.1}},
    "layer_dropout": {**DENSE, "mechanisms": [{"name": "layer_dropout", "layers": ":", "rate": 0.5}]},
    "benefit": {**DENSE, "mechanisms": [mod("ema_threshold", benefit=True, auxiliary_weight=1.0)]},
    "dynamic_chunking": {**DENSE, "mechanisms": [{"name": "dynamic_chunking", "layers": ":", "share": 0.5}]},
    "tied": {**MODELS["all"], "tie_word_embeddings": True},
}
# Dropout draws other numbers in each process, so that no two of these runs could be compared with it.
CASES = {name: {k: v for k, v in model.items() if "dropout" not in k} for name, model in (MODELS | MORE).items()}
WAYS = (("ddp", 2), ("fsdp2", 2), ("ddp", 4), ("fsdp2", 4))
ON_FOUR = ("dense", "topk", "experts", "segment", "all")  # four processes take a minute a model on two cores
BEGIN, END = "<!-- processes:begin -->", "<!-- processes:end -->"


def losses(folder: Path) -> list[dict[str, float]]:
    """Return all losses in a run's metrics, a dict for each line."""
    return [{k: v for k, v in line.items() if "loss" in k and v is not None} for line in lines(folder)]


def differences(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Return the largest difference between two runs' losses, which must have the same names and lines."""
    assert len(ours) == len(theirs) > 1
    assert all(a.keys() == b.keys() and a for a, b in zip(ours, theirs, strict=True))
    return max(abs(a[name] - b[name]) for a, b in zip(ours, theirs, strict=True) for name in a)


def measure(name: str, folder: Path) -> list[str]:
    """Return the cells of a row of the table for the model `name`.

    Each is the largest difference in loss between several processes and one process that divides a step into as many
    micro-batches.
    """
    common = {"steps": 20, "log_every": 1, "eval_every": 10, "eval_rows": 5, "save_every": 0, "device": "cpu"}
    found: dict[int, list[dict[str, float]]] = {}
    cells = []
    for kind, count in WAYS:
        if count == 4 and name not in ON_FOUR:
            cells.append("")
            continue
        if count not in found:
            wanted = recipe(folder, CASES[name], gradient_accumulation=count, **common)
            found[count] = losses(train(wanted, folder / f"one-{count}"))
        wanted = recipe(folder, CASES[name], parallel=kind, **common)
        run = folder / f"{kind}-{count}"
        codes = on_ranks(count, partial(_into, wanted, run))
        cells.append(f"{differences(found[count], losses(run)):.1e}" if not any(codes) else f"failed {codes}")
    return cells


def _into(wanted: dict[str, Any], run: Path, rank: int) -> None:
    train(wanted, run)


def main(page: Path, *names: str) -> None:
    text = page.read_text(encoding="utf-8")
    rows = (
        {} if not names else {line.split()[1]: line for line in text.partition(BEGIN)[2].split(END)[0].splitlines()[3:]}
    )
    for name in names or CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = f"| {name} | " + " | ".join(measure(name, Path(folder))) + " |"
        print(rows[name], flush=True)  # noqa: T201
    head = ["| model | " + " | ".join(f"{kind}, {count}" for kind, count in WAYS) + " |", "|---|" + "---:|" * len(WAYS)]
    table = "\n".join([BEGIN, *head, *rows.values(), END])
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
