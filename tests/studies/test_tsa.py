"""The studies of Token-Selective Attention, each arm trained for two steps, measured and rendered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from published import token_layers
from skipstone.evaluate.evaluation import evaluate
from skipstone.runs import Run
from skipstone.train.training import train
from skipstone_studies import gates, text_blocks
from skipstone_studies.catalogue import FILES, STUDIES
from skipstone_studies.claims import Claim, PublishedColumn, beside, claims_table, paired_differences
from skipstone_studies.page import lookup
from skipstone_studies.quality.tsa import equal_flops, judged, published
from train.tool import quick

NAMES = [name for name, file in FILES.items() if file.startswith("quality.tsa.")]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
STEPS = {"steps": 2, "batch_size": 2, "warmup_steps": 1, "eval_every": 0, "save_every": 0, "eval_rows": 2}
TEXT = "a stone that skips over water, and another that sinks.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 300, encoding="utf-8")
    return f"text:{path}"


def shrunk(recipe: dict[str, Any], text: str) -> dict[str, Any]:
    """The arm as it is, but for its size and its text."""
    corpus = recipe["data"]["corpus"].split(":")[0]
    own = corpus if corpus in ("reset-s3", "switched-s3", "copy", "sort") else text
    size = {"corpus": f"mixed:{text}" if corpus == "mixed" else own, "validation_rows": 4}
    size |= {} if corpus in ("copy", "sort") else {"context": 40}
    return {
        **recipe,
        "model": {**recipe["model"], **SMALL},
        "data": {**recipe["data"], **size},
        "train": {**recipe["train"], **STEPS},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(NAMES, "tsa_copy_sort"))
def test_every_arm_from_training_to_the_page(name: str, text: str, tmp_path: Path) -> None:
    study, figures = STUDIES[name], {}
    for arm, recipe in study.recipes("laptop").items():
        figures[arm] = dict(study.measure(train(shrunk(recipe, text), out=tmp_path / arm, progress=False)))
    if study.measure_together is not None:
        for arm, found in study.measure_together({arm: tmp_path / arm for arm in figures}).items():
            figures[arm] |= found
    derived = {} if study.derive is None else study.derive(figures)
    whole = {arm: {0: {**found, **derived.get(arm, {})}} for arm, found in figures.items()}
    for column in study.columns:
        shown = [arm for arm in whole if lookup(whole[arm][0], column.key) is not None]
        assert shown or "16+" in column.key or "headroom" in column.key, column.title
    if study.details is not None:
        page = study.details(whole)
        assert name == "tsa_switched_s3" or "| claim, by rule |" in page  # that one compares arms where seeds repeat


@pytest.fixture(scope="module")
def gated(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run whose gates stand on both sides of the threshold."""
    recipe = shrunk(STUDIES["tsa_shakespeare"].recipes("laptop")["tsa"], text)
    recipe["model"]["mechanisms"][0]["start_bias"] = 0.0
    return train(recipe, out=tmp_path_factory.mktemp("run") / "tsa", progress=False)


def test_savings_are_the_papers_metric_and_what_was_skipped(gated: Path) -> None:
    found = gates.savings(evaluate(gated).to_dict())
    model, rows = Run(gated).load_model(), Run(gated).data().validation
    ids = torch.stack([rows[i]["input_ids"] for i in range(len(rows))])
    with torch.no_grad():
        records = [model(ids, routing=way, output_records=True).records for way in ("oracle", "causal")]
    soft, hard = map(token_layers, records)
    assert (found["alpha"], found["claimed"]) == (pytest.approx(soft.alpha), pytest.approx(soft.saved))
    assert found["skipped"] == pytest.approx(hard.saved)  # kept tokens have gain 1, so both shares are one there
    assert 0 < found["skipped"] < 0.75


def test_variants_are_the_passes_that_they_say(gated: Path) -> None:
    found = gates.variants(gated)
    model, data = Run(gated).load_model(), Run(gated).data()
    batch = data.collate([data.validation[i] for i in range(len(data.validation))])

    def loss(routing: Any) -> float:
        out = model(input_ids=batch["input_ids"], labels=batch["labels"], routing=routing, noise=False)
        return float(out.token_loss)

    with torch.no_grad():
        assert found["one"] == pytest.approx(loss("causal"), abs=1e-5)
        records = model(input_ids=batch["input_ids"], routing="oracle", output_records=True).records
        for block, decided in list(zip(model.model.layers, records, strict=True))[1:]:
            halted = 1 - float(decided["token_selective"].weight_BT.mean())
            block.mechanisms["token_selective"].router.constant(math.log(halted / (1 - halted)))
        assert found["constant"] == pytest.approx(loss("oracle"), abs=1e-4)
    assert found["at_start"] == pytest.approx(0.75 * 0.5)
    assert len({round(found[name], 6) for name in ("one", "gate", "random", "constant")}) == 4
    assert gates.exits(gated) == {}


@pytest.mark.slow
def test_exits_execute_less_the_higher_the_threshold(text: str, tmp_path: Path) -> None:
    recipe = shrunk(STUDIES["tsa_shakespeare"].recipes("laptop")["early-exit"], text)
    recipe["model"]["mechanisms"][0]["start_bias"] = 0.5
    found = gates.exits(train(recipe, out=tmp_path / "exit", progress=False))
    skipped = [found[gates.exit_name(threshold)]["skipped"] for threshold in gates.EXITS]
    assert skipped == sorted(skipped)
    assert skipped[0] < skipped[-1]
    flops = [found[gates.exit_name(threshold)]["flops"] for threshold in gates.EXITS]
    assert flops[-1] < flops[0]


def test_headroom_lies_between_dense_and_forced() -> None:
    def arm(flops: float, accuracy: float) -> dict[str, Any]:
        return {"flops": flops, "accuracy": dict.fromkeys(("0-3", "4-7", "8-15", "16+", "all operations"), accuracy)}

    arms = {"dense-2": arm(2.0, 0.2), "dense-4": arm(4.0, 0.4), "tsa-hard": arm(3.0, 0.5), "tsa-forced": arm(3.0, 0.7)}
    derive = STUDIES["tsa_switched_s3"].derive
    assert derive is not None
    assert derive(arms)["tsa-hard"]["headroom"]["all operations"] == pytest.approx(0.5)


def test_the_published_metric() -> None:
    assert published.saved(0.726) == pytest.approx(0.228, abs=5e-4)
    assert published.saved(0.833) == pytest.approx(0.139, abs=5e-4)


def figures(loss: float, flops: float, **more: Any) -> dict[str, Any]:
    ways = {"oracle": {"loss": loss - 0.1}, "executed": {"loss": loss}}
    return {
        "evaluation": {"ways": ways, "flops_per_token": {"counted": flops}},
        "stretches": [loss - 0.2, loss + 0.2],
        **more,
    }


def test_rivals_are_met_at_equal_flops() -> None:
    exits = {
        "30%": {"loss": 1.7, "flops": 3.0, "stretches": [1.6, 1.8]},
        "90%": {"loss": 2.1, "flops": 1.0, "stretches": [2.0, 2.2]},
    }
    arms = {
        "dense": figures(1.5, 4.0),
        "dense-2": figures(2.0, 2.0),
        "tsa": figures(1.8, 3.0),
        "random=0.5": figures(1.9, 2.0),
        "early-exit": figures(1.7, 3.0, exits=exits),
        "little": figures(3.0, 0.5),
    }
    found = equal_flops.at_equal_flops(arms)
    whole = {
        arm: {name: over for name, over in own.items() if name in equal_flops.RIVALS} for arm, own in found.items()
    }
    assert whole["tsa"] == pytest.approx({"over_dense": 0.05, "over_random": 0.1, "over_exit": 0.1})
    assert whole["dense"] == pytest.approx({"over_exit": -0.2})
    assert whole["early-exit"] == pytest.approx({"over_dense": -0.05, "over_random": 0.0})
    assert whole["random=0.5"] == pytest.approx({"over_dense": -0.1, "over_exit": 0.0})
    assert whole["little"] == {}
    assert found["tsa"]["over_exit_by_block"] == pytest.approx([0.0, 0.2])
    once = equal_flops.intervals({arm: {0: {**arms[arm], **own}} for arm, own in found.items()})
    assert "| tsa | +0.050, one seed | +0.100, one seed | +0.100, one seed |" in once
    assert "little" not in once
    twice = equal_flops.intervals({arm: {seed: {**arms[arm], **own} for seed in (0, 1)} for arm, own in found.items()})
    text = 6.314 * 0.2**0.5 / 10**0.5 * 0.5**0.5  # the seeds agree; two blocks differ by .2
    assert (
        f"| tsa | +0.050 [+0.050, +0.050] | +0.100 [+0.100, +0.100] | +0.100 [{0.1 - text:+.3f}, {0.1 + text:+.3f}]"
        in twice
    )


@pytest.mark.slow
def test_blocks_of_text_are_the_loss_in_parts(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_blocks, "WINDOWS", 2)
    folder = train(
        shrunk(STUDIES["tsa_shakespeare"].recipes("laptop")["tsa"], text), out=tmp_path / "run", progress=False
    )
    found = text_blocks.block_losses(folder)
    assert len(found) == 2
    whole = STUDIES["tsa_shakespeare"].measure(folder)["evaluation"]["ways"]["executed"]["loss"]
    assert sum(found) / 2 == pytest.approx(whole, abs=1e-5)


def test_claims_follow_from_figures_alone() -> None:
    def gated(seed: int) -> dict[str, Any]:
        shift = seed / 1000
        variants = {"one": 1.9 + shift, "random": 2.0 - shift, "at_start": 0.2}
        return figures(1.62 + shift, 3.0, claimed=0.3, skipped=0.1 + shift, over_dense=0.05 + shift, variants=variants)

    dense, arm = ({seed: make(seed) for seed in (0, 1)} for make in (lambda seed: figures(1.6, 4.0), gated))
    claims = judged.language({"dense": dense, "tsa": arm})
    assert {claim.arm for claim in claims} == {"tsa"}
    expected = {
        "at least 90% of the claimed saving is skipped (skipped - 90% of claimed)": "no",
        "the claimed saving exceeds that of the start bias before training (claimed - before)": "yes",
        "soft loss within 0.01 nats of dense": "no",
        "executed loss within 0.01 nats of dense": "no",
        "skipping beats as many random tokens": "yes",
        "executed loss below that of fewer blocks at equal FLOPs": "no",
    }
    assert {claim.text: claim.verdict for claim in claims} == expected
    flat = judged.language({"dense": dense, "dense-2": {seed: figures(1.61, 2.0) for seed in (0, 1)}, "tsa": arm})
    verdicts = {claim.text: claim.verdict for claim in flat}
    assert verdicts == {**expected, "executed loss below that of fewer blocks at equal FLOPs": "no headroom"}
    alone = judged.language({"dense": {0: dense[0]}, "tsa": {0: arm[0]}})
    assert {claim.verdict for claim in alone} == {"inconclusive"}
    assert judged.language({"dense": {0: figures(1.6, 4.0)}}) == []


def test_tables_of_claims_and_of_published_figures() -> None:
    arms = {"dense": {0: {"a": 1.0}, 1: {"a": 1.5}}, "mod": {1: {"a": 2.0}}}
    assert paired_differences(arms, "mod", "dense", "a") == [0.5]
    shown = (PublishedColumn(title="loss", key="a", published="loss", format=".2f"),)
    page = beside("Beside", arms, {"dense": {"loss": 1.1}}, shown, "a source")
    assert "| arm | loss, paper | loss, ours |" in page
    assert "| dense | 1.10 | 1.25 ± 0.35 |" in page
    assert "| mod | – | 2.00 |" in page
    assert page.endswith("a source")
    assert claims_table("Claims", []) == ""
    claims = [
        Claim(arm="a", text="it is so", found="1", verdict="no"),
        Claim(arm="b", text="and so", found="2", verdict="yes"),
    ]
    assert "| claim, by rule | a | b |" in claims_table("Claims", claims)
    assert "| it is so | no: 1 | – |" in claims_table("Claims", claims)
