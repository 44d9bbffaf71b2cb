"""A KL budget chooses the setting that reads the least within it, and writes it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from generate.folders import TSA, text_data, write_run
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.budget import BudgetTable
from skipstone.core import checksums
from skipstone.evaluate.kl_budget import kl_run
from skipstone.measure.bytes_read import head_bytes
from skipstone.model.head_preview import with_head_candidates


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return text_data(tmp_path_factory.mktemp("text") / "text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of bytes with 260 tokens and a preview of its head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 600, "max_position_embeddings": 64}
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, initializer_range=0.2)).eval()
    made = with_head_candidates(model, torch.randint(0, 260, (4, 48)), 300, 64)
    path = tmp_path_factory.mktemp("saved") / "model"
    made.save_pretrained(path)
    checksums.record(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_fewer_candidates_for_a_larger_budget(copied: Path, text: dict[str, Any]) -> None:
    options = {"corpus": text["corpus"], "context": 24, "rows": 2}
    exact = kl_run(copied, 1e-9, **options)
    assert [s.setting for s in exact.settings] == ["256 candidates", "512 candidates", "600 candidates"]
    assert exact.chosen == ("600 candidates",)
    kl = [s.kl for s in exact.settings]
    assert kl[0] > kl[1] > kl[2] == pytest.approx(0, abs=1e-6)
    assert [s.bytes for s in exact.settings] == sorted(s.bytes for s in exact.settings)
    assert exact.settings[1].flops - exact.settings[0].flops == 2 * 256 * 64
    assert json.loads((copied / "config.json").read_text(encoding="utf-8"))["head_candidates"] == 600
    loose = kl_run(copied, kl[0] * 1.01, **options)
    assert loose.chosen == ("256 candidates",)
    assert checksums.check(copied)
    model = SkipstoneForCausalLM.from_pretrained(copied)
    assert model.head_preview is not None
    assert model.head_preview.candidates == 256
    assert "| 256 candidates |" in loose.markdown()
    assert head_bytes(model) < head_bytes(model, by_candidates=False) + 600 * (32 + 8) + 65 * 65 * 4


def test_a_budget_that_cannot_be_met_is_one_line(copied: Path, text: dict[str, Any]) -> None:
    torch.manual_seed(1)
    other = SkipstoneForCausalLM(SkipstoneConfig(vocab_size=600, hidden_size=32, num_hidden_layers=1))
    other.save_pretrained(copied.parent / "other")
    with pytest.raises(
        ValueError, match=r"kl 1e-06 cannot be met: the smallest that this model reaches is .* with 600 candidates"
    ):
        kl_run(copied, 1e-6, source=str(copied.parent / "other"), corpus=text["corpus"], context=24, rows=2)
    for limit in (0.0, math.inf):
        with pytest.raises(ValueError, match="kl must be a number above 0"):
            kl_run(copied, limit, corpus=text["corpus"])
    with pytest.raises(ValueError, match="has nothing that a KL budget sets"):
        kl_run(copied.parent / "other", 0.1, corpus=text["corpus"], context=24)


@pytest.mark.slow
def test_thresholds_are_set_by_the_points_of_the_budget_table(tmp_path: Path, text: dict[str, Any]) -> None:
    run = write_run(tmp_path / "run", text, [TSA])
    found = kl_run(run, 0.5, rows=2)
    assert all(s.setting.startswith("budget ") for s in found.settings)
    within = [s for s in found.settings if s.kl <= 0.5]
    (chosen,) = found.chosen
    assert chosen == min(within, key=lambda s: s.bytes).setting
    assert any(s.kl > 0.5 or s.bytes > within[0].bytes for s in found.settings)
    assert f"--budget {chosen.removeprefix('budget ')}" in found.written
    assert BudgetTable.find(run / "model") is not None
