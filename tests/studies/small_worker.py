"""The process of one arm of a small study that only tests register."""

from __future__ import annotations

import json
import sys
from typing import Any

from skipstone_studies import side_by_side
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.study import Column, Study

MODEL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DATA = {"corpus": "python-stdlib", "tokenizer": "byte", "context": 16, "validation_rows": 4}
TRAIN = {"steps": 3, "batch_size": 2, "eval_every": 0, "save_every": 0, "eval_rows": 2, "log_every": 1}


def arms(scale: str) -> dict[str, Any]:
    """Return the recipes of two arms that train and one that cannot."""
    half = [{"name": "mixture_of_depths", "capacity": 0.5}]
    return {
        "dense": {"model": MODEL, "data": DATA, "train": TRAIN},
        "half": {"model": {**MODEL, "mechanisms": half}, "data": DATA, "train": TRAIN},
        "broken": {"model": MODEL, "data": {**DATA, "corpus": "text:/nowhere"}, "train": TRAIN},
    }


SMALL = Study(
    name="small",
    purpose="A small study",
    arms=arms,
    seeds={"laptop": (0,)},
    measure_together=lambda runs: {arm: {"beside": {"arms": len(runs)}} for arm in runs},
    columns=(
        Column(key="evaluation.ways.executed.loss", title="loss"),
        Column(key="beside.arms", title="measured beside", format="d"),
    ),
)
STUDIES["small"] = SMALL

if __name__ == "__main__":
    sys.exit(side_by_side.main(json.loads(sys.argv[1])))
