"""The study tsa_shakespeare at scale paper, but with tiny sizes, for this process and those of single arms."""

from __future__ import annotations

import json
import sys

from skipstone_studies import side_by_side
from skipstone_studies.quality.tsa import shakespeare
from skipstone_studies.quality.tsa.recipes import LANGUAGE

LANGUAGE["paper"] = {
    "model": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    "context": 16,
    "train": {**LANGUAGE["paper"]["train"], "steps": 6, "batch_size": 4, "eval_every": 3, "eval_rows": 8},
}
shakespeare.SHAKESPEARE = {**shakespeare.SHAKESPEARE, "validation_rows": 130}  # type: ignore[dict-item]

if __name__ == "__main__":
    sys.exit(side_by_side.main(json.loads(sys.argv[1])))
