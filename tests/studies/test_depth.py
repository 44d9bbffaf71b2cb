"""The study of depth: models of 8 and 5 blocks at equal training FLOPs, by width and length."""

from __future__ import annotations

from skipstone_studies import protocol
from skipstone_studies.quality import depth


def figures(loss: float) -> dict[str, object]:
    return {
        "loss": loss,
        "training": {"tokens": 20e6, "parameters": 1e5},
        "tuning": protocol.untuned(0.004),
        "blocks": [loss - 0.01, loss + 0.01],
    }


def test_both_models_are_trained_for_the_same_flops() -> None:
    arms = depth.arms("laptop")
    for width, budget in depth.LENGTHS["laptop"]:
        deep, shallow = (arms[depth.name_of(blocks, width, budget)] for blocks in (8, 5))
        assert (deep["model"]["num_hidden_layers"], shallow["model"]["num_hidden_layers"]) == (8, 5)
        assert deep["train"]["steps"] < shallow["train"]["steps"]
        for recipe in (deep, shallow):
            tuning = recipe["protocol"].get("tuning", protocol.ProtocolConfig.tuning) * budget
            assert tuning <= budget / 4
            assert tuning <= 7.5e11 or (width, budget) in depth.IN_FULL


def test_the_page_tells_what_three_blocks_gain_and_judges_it() -> None:
    deep, shallow = depth.name_of(8, 32, 1e13), depth.name_of(5, 32, 1e13)
    assert (deep, shallow) == ("dense-8-width-32-1e13", "dense-5-width-32-1e13")
    found = {deep: {seed: figures(1.4 + seed / 1000) for seed in range(3)}}
    assert "What three more blocks gain" not in depth.details(found)
    found[shallow] = {seed: figures(1.45 + seed / 999) for seed in range(3)}
    assert "| 32 | 1e13 | 200 | 3 | +0.0500" in depth.details(found)
    (claim,) = depth.claims(found)
    assert claim.verdict == "yes"
    found[shallow] = {seed: figures(1.41 + seed / 999) for seed in range(3)}
    (claim,) = depth.claims(found)
    assert claim.verdict == "no"


def test_other_widths_are_not_mixed_up() -> None:
    found = {depth.name_of(8, 32, 1e13): {0: figures(1.4)}, depth.name_of(5, 64, 1e13): {0: figures(1.5)}}
    assert list(depth.claims(found)) == []
    assert "| width |" not in depth.details(found)
