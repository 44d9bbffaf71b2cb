"""The study of headroom: depth at equal FLOPs and on the same text, and the benefit of a trained model's blocks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from skipstone_studies import benefit_page, protocol
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.quality import decisive, headroom
from skipstone_studies.run import reproduce
from skipstone_studies.study import seeded


def unit(blocks: list[int], causal: float, bound: float) -> dict[str, Any]:
    kept = {
        f"{share:g}": dict.fromkeys(("entropy", "gradient norm", "surprise"), 2.0)
        | {"random": 2.0, "regression on the stream": 2.0 - causal, "benefit": 2.0 - bound}
        for share in (0.125, 0.25, 0.5)
    }
    correlation = dict.fromkeys(kept["0.5"], 0.1)
    return {
        "blocks": blocks,
        "removed": 2.5,
        "mean_benefit": 0.4,
        "explained": 0.05,
        "correlation": correlation,
        "kept": kept,
    }


def test_the_rule_on_what_a_router_could_gain() -> None:
    measured = {"loss": 1.5, "units": [unit([1, 2], 0.03, 0.5), unit([0], 0.01, 0.4)]}
    lines = benefit_page.verdict(measured).splitlines()
    assert "+0.0300 nats better" in lines[0]
    assert "a router could gain" in lines[0]
    assert "no router that reads this stream gains enough" in lines[1]
    text = benefit_page.tables(measured, "dense-8")
    assert "dense-8: blocks 1 to 2 together" in text
    assert "| benefit | +0.0000 | +0.0000 | +0.0000 |" in text
    assert "With no token kept: +1.0000. The whole model: 1.5000." in text


def test_the_rival_on_the_same_text_reads_as_much_as_the_full_model() -> None:
    for scale in ("laptop", "paper"):
        arms = headroom.arms(scale)
        assert arms["dense-5-same-text"]["train"]["steps"] == arms["dense-8"]["train"]["steps"]
        assert {name: arms[name] for name in ("dense-8", "dense-5")} == {
            name: decisive.arms(scale)[name] for name in ("dense-8", "dense-5")
        }


def test_each_claim_names_the_rival_that_it_is_measured_against() -> None:
    losses = {"dense-8": [1.0, 1.1], "dense-5": [1.05, 1.15], "dense-5-same-text": [1.2, 1.3]}
    figures = {arm: {seed: {"loss": loss} for seed, loss in enumerate(found)} for arm, found in losses.items()}
    found = {claim.text: claim.estimate for claim in headroom.claims(figures)}
    assert found == {
        "test loss at least 0.02 nats below dense-5 at equal training FLOPs": pytest.approx(0.05),
        "test loss at least 0.02 nats below dense-5-same-text on the same text": pytest.approx(0.2),
    }


def test_the_units_are_the_middle_and_every_block() -> None:
    assert headroom.units_of(8) == [(2, 3, 4, 5), *((i,) for i in range(8))]
    assert headroom.units_of(5)[0] == (1, 2, 3)
    assert headroom.units_of(30)[1:] == [(0,), (5,), (10,), (15,), (20,), (25,)]
    assert headroom.units_of(2) == [(0,), (1,)]


@pytest.mark.slow
def test_a_run_of_another_study_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split, words in (("train", 4000), ("validation", 900), ("test", 900)):
        (tmp_path / f"{split}.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(words)), encoding="utf-8")

    def one(scale: str) -> dict[str, Any]:
        recipe = decisive.arms(scale, f"text:{tmp_path}")["dense-8"]
        recipe["train"] |= protocol.lengths(4)
        recipe["protocol"]["most"] = 3
        return {"dense-8": recipe}

    for name, study in (("decisive", decisive.DECISIVE), ("headroom", headroom.HEADROOM)):
        monkeypatch.setitem(STUDIES, name, protocol.replace(study, arms=one))
    protocol.rows_of.cache_clear()
    reproduce("decisive", scale="quick", runs=tmp_path / "runs", out=tmp_path / "out")
    monkeypatch.setattr(protocol, "_train", lambda *_: pytest.fail("it trains again"))
    page = reproduce("headroom", scale="quick", runs=tmp_path / "runs", out=tmp_path / "out").read_text(
        encoding="utf-8"
    )
    assert "dense-8: blocks 2 to 5 together" in page
    assert "| regression on the stream |" in page
    other = seeded(one("quick")["dense-8"], 1)
    assert not protocol._taken_over(other, tmp_path / "runs/headroom/quick/dense-8-seed1")


def test_a_run_whose_rate_was_not_tuned_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, folder = seeded(decisive.arms("laptop")["dense-8"], 0), tmp_path / "other/laptop/whole-seed0"
    folder.mkdir(parents=True)
    for name in (protocol.USE, "config.yaml"):
        (folder / name).write_text("{}", encoding="utf-8")
    folder.with_name("whole-seed0.recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
    monkeypatch.setattr(protocol.Run, "finished", True)
    own = tmp_path / "headroom/laptop/dense-8-seed0"
    own.parent.mkdir(parents=True)
    assert protocol._taken_over(recipe, own)
    assert (own / protocol.USE).is_file()
    assert not (own.parent / "rates").exists()


def test_your_checkpoint_needs_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(headroom.CHECKPOINT, raising=False)
    with pytest.raises(FileNotFoundError, match="SKIPSTONE_CHECKPOINT must name the folder of a checkpoint"):
        headroom.of_checkpoint(seeded(headroom.checkpoints("quick")["your checkpoint"], 0))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SKIPSTONE_DATA"), reason="SKIPSTONE_DATA is not set")
def test_the_blocks_of_a_real_checkpoint_help() -> None:
    found = headroom.of_checkpoint(seeded(headroom.checkpoints("quick")["stories260K"], 0))[headroom.ORACLE]
    assert found["loss"] < 2.0
    assert all(each["removed"] > found["loss"] + 0.05 for each in found["units"])
