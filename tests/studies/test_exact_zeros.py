"""The page of the study of exact zeros shows by block which share of the neurons is not 0."""

from __future__ import annotations

from typing import Any

from skipstone_studies.quality import exact_zeros


def test_shares_of_neurons_by_block_are_means_over_seeds() -> None:
    figures: dict[str, dict[int, dict[str, Any]]] = {
        "swiglu": {0: {"loss": 1.0, "mlp_read": 1.0, "on": None}},
        "reglu": {
            seed: {"loss": 1.0, "mlp_read": 0.4, "on": [on, *[0.5] * (exact_zeros.BLOCKS - 1)]}
            for seed, on in ((0, 0.1), (1, 0.3))
        },
    }
    text = exact_zeros.details(figures)
    (heading,) = [line for line in text.splitlines() if "Neurons whose activation is not 0" in line]
    lines = [line for line in text.partition(heading)[2].partition("#")[0].splitlines() if line.startswith("|")]
    assert lines[0].startswith("| arm | block 0 | block 1 |")
    assert lines[2:] == ["| reglu | 20.0 % | 50.0 % | 50.0 % | 50.0 % | 50.0 % | 50.0 % |"]
    assert "Neurons" not in exact_zeros.details({"swiglu": figures["swiglu"]})
