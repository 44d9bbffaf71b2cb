"""What the segments of routed models do, and which bytes a dense model's blocks help: word starts or others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone_studies.quality import decisive_short, headroom_short
from studies.test_headroom import unit


def model(**options: Any) -> SkipstoneForCausalLM:
    entry = {"name": "segment", "layers": "1:2", **options}
    return tiny_model(vocab_size=258, num_hidden_layers=3, initializer_range=0.2, mechanisms=[entry])


def text(rows: int, length: int = 24) -> Any:
    """Prepared data of random letters and spaces, as `of_segment` reads them."""
    letters = torch.tensor([*b"ab  "])[torch.randint(0, 4, (rows, length))]
    items = [{"input_ids": row, "labels": row} for row in letters]

    class Rows(list[dict[str, torch.Tensor]]):
        def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
            return [self[i] for i in indices]

    return SimpleNamespace(
        validation=Rows(items),
        collate=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
    )


def test_word_starts_are_what_the_decision_keeps() -> None:
    line = b"def f(x):\n    return  x_1 + 22\n"
    ids = torch.tensor([[*line], [*line[::-1]]])
    with torch.no_grad():
        out = model(decision="boundary")(ids, output_records=True)
    kept_N = headroom_short.word_starts([{"input_ids": row} for row in ids])
    assert torch.equal(kept_N, out.records[1]["segment"].kept_BT.flatten())


def test_a_rule_is_its_own_control() -> None:
    found = headroom_short.of_segment(model(decision="boundary"), text(6), 6)
    assert found["words"] == found["found"] == 1
    assert found["loss"]["own"] == pytest.approx(found["loss"]["words"], abs=1e-6)
    assert found["loss"]["none"] != pytest.approx(found["loss"]["own"], abs=1e-4)
    share, gain = found["kept"], found["gain"]
    # labels are shifted, so the last byte of a row is kept or not without counting
    assert share * gain["kept"] + (1 - share) * gain["others"] == pytest.approx(
        found["loss"]["none"] - found["loss"]["own"], abs=1e-5
    )


def test_a_segment_that_does_nothing_gains_nothing() -> None:
    dead = model(decision="positional", capacity=0.5)
    with torch.no_grad():
        for name, parameter in dead.model.layers[1].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    found = headroom_short.of_segment(dead, text(4), 4)
    assert len({round(loss, 5) for loss in found["loss"].values()}) == 1
    assert found["gain"]["kept"] == pytest.approx(0, abs=1e-6)
    assert 0.3 < found["kept"] < 0.7


def test_the_page_ranks_word_starts_and_tells_what_segments_do() -> None:
    measured = {"loss": 1.5, "units": [unit([1, 2], 0.03, 0.5)]}
    for share in measured["units"][0]["kept"].values():
        share[headroom_short.WORDS] = 1.75
    runs = {"loss": 1.5, "validation_loss": 1.5, "blocks": [1.5]}
    losses = {"own": 1.5, "none": 1.6, "chance": 1.55, "words": 1.5}
    segment = {"loss": losses, "kept": 0.125, "words": 1.0, "found": 1.0, "gain": {"kept": 0.05, "others": 0.11}}
    figures = {
        headroom_short.SHALLOW: {0: {**runs, "loss": 1.6}},
        decisive_short.SAME_TEXT: {0: {**runs, "benefit": measured}},
        "boundary": {0: {**runs, "segment": segment}},
    }
    page = headroom_short.details(figures)
    assert "| word starts | +0.2500 | +0.2500 | +0.2500 |" in page
    assert "dense-8-same-text, seed 0: blocks 1 to 2 together" in page
    assert "| boundary, seed 0 | 12.5% | 100% | 1.5000 | 1.6000 | 1.5500 | 1.5000 | +0.0500 | +0.1100 |" in page
    assert headroom_short.segments({}) == ""


def test_depths_are_compared_on_the_seeds_that_they_share() -> None:
    def runs(losses: dict[int, float]) -> dict[int, dict[str, float]]:
        return {seed: {"validation_loss": loss} for seed, loss in losses.items()}

    # dense-5 has the lower mean, because it has only the seeds on which all models are better
    figures = {"dense-4": runs({0: 1.50, 1: 1.52, 2: 1.55, 3: 1.54}), "dense-5": runs({0: 1.51, 1: 1.53})}
    assert decisive_short.best_dense(figures) == "dense-4"
    assert decisive_short.best_dense({**figures, "dense-3": runs({0: 1.49})}) == "dense-3"
    assert decisive_short.best_dense({"boundary": runs({0: 1.0})}) is None
