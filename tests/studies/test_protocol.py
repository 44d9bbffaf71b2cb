"""The protocol of studies at equal FLOPs: planning, tuning, shared weights, what a record and a page say."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run
from skipstone.train.setup import model_config
from skipstone_studies import protocol
from skipstone_studies import protocol_page as pages
from skipstone_studies import record as records
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.measure import executed_training
from skipstone_studies.protocol import ProtocolConfig, SharedStart, best_rate, climb, planned, tuning_figures
from skipstone_studies.quality import decisive, depth
from skipstone_studies.run import reproduce
from skipstone_studies.text_loss import by_block, capacities, spaced


def tried(losses: dict[float, float], first: float, most: int = 7) -> list[float]:
    """The rates that `climb` asks for, where a rate that is not listed is as bad as possible."""
    asked: list[float] = []

    def loss(rate: float) -> float:
        asked.append(rate)
        return losses.get(rate, math.inf)

    climb(loss, first, 2.0, most)
    return asked


def test_tuning_goes_on_until_the_best_rate_has_two_worse_ones_on_either_side() -> None:
    assert tried({1: 3, 2: 2, 4: 2.5}, 2) == [2, 4, 1, 8, 0.5]
    assert tried({1: 4, 2: 3, 4: 2, 8: 1, 16: 5}, 2) == [2, 4, 8, 16, 32]
    assert tried({0.25: 1, 0.5: 3, 1: 2, 2: 3}, 1) == [1, 2, 0.5, 4, 0.25, 0.125, 0.0625]  # it gets over a bump
    assert len(tried({2.0**i: -i for i in range(40)}, 1, most=5)) == 5


def test_what_a_record_says_of_the_rates() -> None:
    found = tuning_figures({1e-3: 2.0, 2e-3: 1.5, 4e-3: math.inf})
    assert found == {"losses": {"0.001": 2.0, "0.002": 1.5}, "rate": 2e-3, "inside": True}
    assert not tuning_figures({1e-3: 1.0, 2e-3: 1.5})["inside"]
    with pytest.raises(ValueError, match="diverged at every learning rate"):
        best_rate({1e-3: math.inf})


def test_arms_get_equal_training_flops() -> None:
    for scale in ("laptop", "paper"):
        for recipe in decisive.arms(scale).values():
            train, data = recipe["train"], recipe["data"]
            least = decisive.LEAST_TOKENS.get(scale, protocol.LEAST_TOKENS)
            assert train["batch_size"] * data["context"] >= least
            assert train["min_lr_ratio"] == 0
            assert train["average_last"] == protocol.AVERAGED
            model = protocol.json.dumps(recipe["model"], sort_keys=True)
            step = protocol.step_flops(model, data["context"], train["batch_size"])
            assert abs(train["steps"] * step / recipe["protocol"]["budget"] - 1) < 0.01


def test_narrow_models_have_the_arms_of_the_wide_ones() -> None:
    for scale, (_, budget) in decisive.NARROW.items():
        narrow = decisive.narrow_arms(scale)
        assert list(narrow) == list(decisive.arms(scale))
        assert all(recipe["protocol"]["tuning"] * budget <= depth.LONGEST_TUNING for recipe in narrow.values())
        for recipe in narrow.values():
            model = protocol.json.dumps(recipe["model"], sort_keys=True)
            step = protocol.step_flops(model, recipe["data"]["context"], recipe["train"]["batch_size"])
            assert abs(recipe["train"]["steps"] * step / budget - 1) < 0.01


def test_a_warm_up_of_the_capacity_is_paid_for() -> None:
    entry = {"name": "mixture_of_depths", "layers": "2:6", "capacity": 0.125, "decision": "ema_threshold"}
    steps = [
        decisive.arm("laptop", "python-code", 8, [{**entry, **more}])["train"]["steps"]
        for more in ({}, {"capacity_warmup": 0.2})
    ]
    assert steps[0] * 0.85 < steps[1] < steps[0]


def test_the_shares_that_blocks_keep_are_those_of_the_whole_text() -> None:
    def part(predictions: int, *layers: dict[str, float | None]) -> Any:
        shown = [{name: {"capacity": share} for name, share in layer.items()} for layer in layers]
        return SimpleNamespace(predictions=predictions, summaries=SimpleNamespace(layers=lambda: shown))

    first = part(300, {}, {"mod": 0.5, "segment": 0.9}, {"mod": None})
    second = part(100, {}, {"mod": 0.1, "segment": 0.0}, {"mod": 0.25})
    assert capacities([first, second]) == {"1": pytest.approx(0.4), "2": 0.25}
    assert capacities([part(10, {}, {"polyglu": None})]) == {}


def test_steps_of_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8,192 tokens, got 4,096"):
        planned({"hidden_size": 16}, {"context": 256}, {"batch_size": 16}, {"budget": 1e9, "rate": 1e-3})
    with pytest.raises(ValueError, match="factor above 1"):
        ProtocolConfig(budget=1e9, rate=1e-3, factor=1.0)


def test_evenly_spaced_rows() -> None:
    assert spaced(10, 3) == [0, 3, 6]
    assert spaced(3, None) == spaced(3, 5) == [0, 1, 2]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The decisive study of two arms of a few steps on a text of its own."""
    monkeypatch.chdir(tmp_path)
    for split, words in (("train", 6000), ("validation", 900), ("test", 900)):
        text = " ".join(f"w{i * i % 97}" for i in range(words))
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")

    def arms(scale: str) -> dict[str, Any]:
        found = decisive.arms(scale, f"text:{tmp_path}")
        chosen = {name: found[name] for name in ("dense-8", "boundary")}
        for recipe in chosen.values():
            recipe["train"] |= protocol.lengths(recipe["train"]["steps"] // 10)
            recipe["protocol"]["most"] = 3
        return chosen

    monkeypatch.setitem(STUDIES, "decisive", protocol.replace(decisive.DECISIVE, arms=arms))
    protocol.rows_of.cache_clear()
    return tmp_path


@pytest.mark.slow
def test_a_study_by_the_protocol(small: Path) -> None:
    page = reproduce("decisive", scale="quick", runs=small / "runs", out=small / "out").read_text(encoding="utf-8")
    found = {record.arm: record for record in records.read_all(small / "out", "decisive")}
    assert list(found) == ["boundary", "dense-8"]
    for record in found.values():
        figures = record.figures
        assert figures["loss"] == pytest.approx(sum(figures["blocks"]) / len(figures["blocks"]), abs=0.05)
        assert len(figures["tuning"]["losses"]) == 3
        assert figures["training_flops"]["executed"] > 0
    assert set(found["boundary"].figures["capacity"]) == {"2", "3", "4", "5"}
    assert found["dense-8"].figures["capacity"] == {}
    folder = small / "runs/decisive/quick/boundary-seed0"
    test_rows = protocol.data_of(protocol.recipe_of(folder)["data"], "test")
    whole = by_block(Run(folder).load_model().eval(), test_rows, protocol.recipe_of(folder)["protocol"]["test_rows"], 1)
    assert found["boundary"].figures["capacity"] == pytest.approx(capacities(whole))
    # equal weights where parameters are shared, and a rate that is tuned once
    rates = small / "runs/decisive/quick/rates"
    assert len(list(rates.glob("*.json"))) == 2
    before = {path: path.stat().st_mtime_ns for path in rates.glob("*.json")}
    reproduce("decisive", scale="quick", runs=small / "runs", out=small / "out", seeds=[1], arms=["dense-8"])
    assert {path: path.stat().st_mtime_ns for path in rates.glob("*.json")} == before
    assert "Compared with dense-8" in page
    assert "The headroom is not known" in page
    assert "| no headroom |" in page


def test_arms_start_from_the_same_weights() -> None:
    seen: dict[str, dict[str, torch.Tensor]] = {}
    for name, recipe in decisive.arms("quick").items():
        torch.manual_seed(len(name))
        model = SkipstoneForCausalLM(model_config(recipe["model"], 32, {}))
        state = type("State", (), {"global_step": 0})()
        SharedStart(3, 8).on_train_begin(None, state, None, model=model)  # type: ignore[arg-type]
        seen[name] = {key: value.detach().clone() for key, value in model.named_parameters()}
    first = seen.pop("dense-8")
    for weights in seen.values():
        shared = first.keys() & weights.keys()
        assert len(shared) > 20
        assert all(torch.equal(first[key], weights[key]) for key in shared)


TUNING = {"losses": {"0.001": 2.0}, "rate": 0.001, "inside": True}


def figures(losses: dict[str, list[float]]) -> dict[str, dict[int, dict[str, Any]]]:
    return {
        arm: {
            seed: {"loss": loss, "blocks": [loss - 0.1, loss + 0.1], "tuning": TUNING}
            for seed, loss in enumerate(values)
        }
        for arm, values in losses.items()
    }


def test_no_verdict_without_headroom() -> None:
    flat = figures({"dense-8": [1.0, 1.001], "dense-5": [1.01, 1.012], "boundary": [0.9, 0.901]})
    verdicts = {claim.verdict for claim in decisive.claims(flat)}
    assert verdicts == {"no headroom"}
    text = decisive.details(flat)
    assert "No headroom: nothing to route." in text
    deep = figures({"dense-8": [1.0, 1.001], "dense-5": [1.05, 1.052], "boundary": [0.9, 0.901]})
    found = {claim.arm: claim.verdict for claim in decisive.claims(deep)}
    assert found["boundary"] == "yes"
    assert found["dense-5"] == "no"
    assert "better" in decisive.details(deep)


def test_one_seed_gets_no_verdict() -> None:
    one = figures({"dense-8": [1.0], "dense-5": [1.05], "boundary": [0.9]})
    assert {claim.verdict for claim in decisive.claims(one)} == {"inconclusive"}
    assert "one seed" in pages.differences(one, "dense-8", False)
    assert "not known before dense-8 and dense-5 have run" in pages.headroom_text(None, "dense-8", ["dense-5"])


class Lines:
    """A run folder, as far as its FLOPs depend on it."""

    def __init__(self, share: float) -> None:
        self.share = share

    def config(self) -> dict[str, Any]:
        return {"data": {"context": 64}, "train": {"batch_size": 2}}

    def metrics(self) -> list[dict[str, Any]]:
        return [{"split": "train", "capacity/2/segment": self.share}]


def test_what_a_segment_kept_counts_in_all_of_its_blocks() -> None:
    def built(capacity: float) -> SkipstoneForCausalLM:
        entry = {"name": "segment", "layers": "2:6", "capacity": capacity, "decision": "ema_threshold"}
        values = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 8, "mechanisms": [entry]}
        return SkipstoneForCausalLM(model_config(values, 64, {"vocab_size": 64}))

    eighth, half = built(0.125), built(0.5)
    expected = half.cost(tokens=64, batch=2).training.total * 3
    assert executed_training(eighth, Lines(0.5), 3) == pytest.approx(expected, rel=1e-6)  # type: ignore[arg-type]
    assert executed_training(eighth, Lines(0.125), 3) < 0.8 * expected  # type: ignore[arg-type]


def test_records_of_different_texts_are_not_compared() -> None:
    def runs(loss: float, size: int) -> dict[int, dict[str, Any]]:
        return {seed: {"loss": loss + 0.001 * seed, "test_bytes": size} for seed in range(3)}

    figures = {"dense": runs(1.0, 500), "routed": runs(0.9, 500), "elsewhere": runs(0.9, 501)}
    table = pages.differences(figures, "dense", refused=False)
    assert [line.split("|")[-2].strip() for line in table.splitlines()[-2:]] == ["better", "other text"]
