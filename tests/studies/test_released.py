"""The study of the released model: its recipe is the published one, and its page shows every format of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models import tiny_model
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.quality import released
from skipstone_studies.run import reproduce

ROOT = Path(__file__).parents[2]


def test_the_arm_is_the_recipe_that_users_have() -> None:
    written = yaml.safe_load((ROOT / f"recipes/{released.NAME}.yaml").read_text(encoding="utf-8"))
    assert written == {"name": released.NAME, **released.arms("laptop")[released.NAME]}


def test_a_model_is_timed_beside_a_dense_one_of_its_sizes() -> None:
    entry = {"name": "segment", "layers": "1:2", "decision": "boundary"}
    model = tiny_model(vocab_size=258, num_hidden_layers=3, mechanisms=[entry])
    twin = released.dense_twin(model)
    assert not list(twin.routing_modules())
    assert twin.config.hidden_size == model.config.hidden_size
    found = released.speed(model, twin, torch.arange(12)[None], 2)
    assert found["tokens_per_second"] > 0
    assert found["speed"]["min"] <= found["speed"]["median"] <= found["speed"]["max"]


def test_the_page_lists_formats_from_most_bits_to_fewest() -> None:
    one = {"megabytes": 1.0, "loss": 0.9, "tokens_per_second": 1e3, "speed": dict.fromkeys(("median", "min", "max"), 2)}
    figures = {"formats": {str(bits): one for bits in released.BITS}, "samples": dict.fromkeys(released.SAMPLES, "x")}
    page = released.details({released.NAME: {0: figures}})
    assert "| 32 | 1.0 | 0.9000 | 1,000 | 2.00 (2.00 to 2.00) |" in page
    assert page.index("| 32 |") < page.index("| 16 |") < page.index("| 8 |") < page.index("| 4 |")
    assert "def mean(values):\nx" in page
    assert released.details({}) == ""


@pytest.mark.slow
def test_it_is_trained_measured_and_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, words in (("train", 4000), ("validation", 900), ("test", 900)):
        (tmp_path / f"{split}.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(words)), encoding="utf-8")

    def one(scale: str) -> dict[str, Any]:
        (recipe,) = released.arms(scale).values()
        return {released.NAME: {**recipe, "data": {**recipe["data"], "corpus": f"text:{tmp_path}"}}}

    monkeypatch.setitem(STUDIES, "released", replace(released.RELEASED, arms=one))
    page = reproduce("released", scale="quick", runs=tmp_path / "runs", out=tmp_path / "out").read_text("utf-8")
    assert "### By format of the weights" in page
