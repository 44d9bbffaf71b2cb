"""`evaluate` returns the model's own loss, for the pass that is executed."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from generate.folders import MOD, TEXT, TSA, reset_data, text_data, write_run
from skipstone.evaluate.evaluation import Evaluation, evaluate
from skipstone.measure.passes import NEEDS_MASKS, NO_CAUSAL_FORM
from skipstone.ops import reference as ops
from skipstone.runs import Run
from train.tool import quick

ARMS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "dense": ([], "silu"),
    "mod": ([MOD], "silu"),
    "tsa": ([TSA], "silu"),
    "polyglu": ([], "polyglu"),
    "all": ([MOD, TSA], "polyglu"),
    "topk": ([{**MOD, "decision": "topk"}], "silu"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    data = text_data(root / "text")
    for name, (mechanisms, activation) in ARMS.items():
        write_run(root / name, data, mechanisms, activation)
    return root


@cache
def evaluated(run: Path) -> Evaluation:
    return evaluate(run, batch_size=4)


@torch.no_grad()
def by_hand(run: Path, **options: Any) -> float:
    """Mean loss of the model's own loss function, one row after another."""
    loaded, nats, count = Run(run), 0.0, 0
    model = loaded.load_model()
    for row in loaded.data().validation:
        labels = int((row["labels"] != -100).sum())
        out = model(row["input_ids"][None], labels=row["labels"][None], use_cache=False, noise=False, **options)
        nats, count = nats + float(out.token_loss) * labels, count + labels
    assert count == loaded.data().validation_labels == len(TEXT.encode()) * 5 - 1
    return nats / count


@pytest.mark.parametrize("name", quick(["dense", "mod", "tsa", "all"], "all"))
def test_losses_are_the_models_own(runs: Path, name: str) -> None:
    found = evaluated(runs / name)
    ways = {way: m.loss for way, m in found.measured.items()}
    assert ways == {
        "oracle": pytest.approx(by_hand(runs / name, routing="oracle"), abs=1e-6),
        "causal": pytest.approx(by_hand(runs / name, routing="causal", executor="masked"), abs=1e-6),
        "executed": pytest.approx(by_hand(runs / name, routing="causal", executor="gathered"), abs=1e-6),
    }
    assert abs(found.executed_minus_causal or 0) < 1e-6
    if name != "dense":
        assert abs(ways["oracle"] - ways["causal"]) > 1e-4
    assert found.measured["causal"].perplexity == pytest.approx(math.exp(ways["causal"]))
    nats = ways["causal"] * found.measured["causal"].predictions
    assert found.to_dict()["ways"]["causal"]["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / len(TEXT.encode()) / 5
    )


@pytest.mark.parametrize("name", quick(["all", "topk"], "all"))
def test_the_batch_size_changes_nothing(runs: Path, name: str) -> None:
    """The last row is shorter, so that a batch of 7 has padding and a batch of 1 has none."""
    one, seven = evaluate(runs / name, batch_size=1), evaluate(runs / name, batch_size=7)
    assert one.rows % 7 != 0
    for way, m in one.measured.items():
        other = seven.measured[way]
        assert m.loss == pytest.approx(other.loss, abs=1e-6)
        assert m.predictions == other.predictions
        for layer, same in zip(m.summaries.layers(), other.summaries.layers(), strict=True):
            for mechanism, figures in layer.items():
                assert flat(figures) == pytest.approx(flat(same[mechanism]), abs=1e-6)


def flat(figures: dict[str, Any]) -> dict[str, float]:
    nested = {f"{k}.{n}": x for k, v in figures.items() if isinstance(v, dict) for n, x in v.items()}
    return {**{k: v for k, v in figures.items() if not isinstance(v, dict)}, **nested}


def test_realised_capacity_counts_kept_among_asked(runs: Path) -> None:
    found = evaluated(runs / "all")
    layers = found.measured["executed"].summaries.layers()
    loaded = Run(runs / "all")
    model, kept, asked, rows = loaded.load_model(), 0, 0, []
    for row in loaded.data().validation:
        records = model(row["input_ids"][None], routing="causal", output_records=True).records
        decided = records[1].get("token_selective")
        if decided is not None:
            kept, asked = kept + int(decided.kept_BT.sum()), asked + int(decided.reached_BT.sum())
            rows += [float(decided.kept_BT.sum() / decided.reached_BT.sum())] if decided.reached_BT.any() else []
    assert 0 < kept < asked
    assert layers[1]["token_selective"]["capacity"] == pytest.approx(kept / asked)
    assert layers[1]["token_selective"]["capacity_p99"] == pytest.approx(max(rows))
    assert set(layers[0]) == {"polyglu"}
    assert sum(layers[0]["polyglu"]["shares"].values()) == pytest.approx(1)
    assert 0 < layers[0]["polyglu"]["entropy"] <= 1


def test_the_hard_mix_is_the_strongest_activation_of_each_neuron(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = evaluated(runs / "polyglu")
    assert found.hard_mix is not None

    def strongest(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, _: Tensor) -> Tensor:
        best_BTF = (static_BFA[:, None] + dynamic_BTA[:, :, None]).argmax(-1)
        values = torch.stack([function(gate_BTF) for function in ops.ACTIVATIONS], dim=-1)
        return values.gather(-1, best_BTF.expand_as(gate_BTF)[..., None])[..., 0]

    monkeypatch.setattr("skipstone.mechanisms.polyglu.mix_activations", strongest)
    assert found.hard_mix.loss == pytest.approx(by_hand(runs / "polyglu", routing="causal"), abs=1e-5)
    assert found.hard_minus_soft == pytest.approx(found.hard_mix.loss - found.measured["executed"].loss)
    assert found.hard_minus_soft != 0
    assert f"mix: {found.hard_minus_soft:+.1e} nats" in found.markdown()
    assert evaluated(runs / "dense").hard_minus_soft is None


@pytest.mark.parametrize("name", list(ARMS))
def test_counted_flops_are_those_of_the_cost_model(runs: Path, name: str) -> None:
    executed = evaluated(runs / name).flops
    assert executed.agree
    assert executed.counted == executed.predicted
    assert executed.needed <= executed.counted
    if name == "dense":
        assert executed.share == 1
    if name == "topk":
        assert executed.share < 0.75
        assert executed.syncs == pytest.approx(1 / 3)  # of three batches the last is padded, and looks at its mask
    if name == "tsa":
        assert executed.syncs >= 3


def test_topk_has_no_causal_form_and_says_so(runs: Path) -> None:
    found = evaluated(runs / "topk")
    assert found.unavailable == {"causal": NO_CAUSAL_FORM, "executed": NO_CAUSAL_FORM}
    assert (found.primary, set(found.measured)) == ("oracle", {"oracle"})
    assert found.executed_minus_causal is None
    assert f"| causal | {NO_CAUSAL_FORM} |" in found.markdown()


def test_figures_leave_as_json_markdown_and_table(runs: Path) -> None:
    found = evaluated(runs / "all")
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["ways"]["executed"]["loss"] == found.measured["executed"].loss
    assert values["flops_per_token"]["counted"] == values["flops_per_token"]["cost"]
    for words in ("bits per byte", "1 mixture_of_depths", "3 polyglu", "host syncs"):
        assert words in found.markdown()
    assert found.table().row_count >= 8


def test_a_saved_model_and_another_corpus(runs: Path) -> None:
    corpus = f"text:{runs / 'text'}"
    own = evaluated(runs / "mod")
    found = evaluate(runs / "mod" / "model", corpus=corpus, context=24, batch_size=4)
    assert found.measured["causal"].loss == own.measured["causal"].loss
    shorter = evaluate(runs / "mod", context=12, split="test")
    assert shorter.measured["causal"].predictions == 3 * len(TEXT.encode()) - 1


def test_wrong_input_is_one_clear_line(runs: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (runs / "mod" / "model", {}, "saved model without a recipe; name the corpus"),
        (runs / "mod", {"split": "dev"}, "unknown split"),
        (runs / "mod", {"batch_size": 0}, "batch_size must be at least 1"),
        (runs / "mod", {"context": 48}, "context 48 is longer than the model's 24"),
        (runs / "mod", {"corpus": "tiny_shakespeare"}, "did you mean 'tiny-shakespeare'"),
        (tmp_path, {}, "is neither a run folder"),
    ]
    for folder, options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            evaluate(folder, **options)
        assert "\n" not in str(caught.value)


def accuracies(found: Evaluation) -> dict[str, dict[str, float]]:
    return {name: m.accuracy for name, m in found.measured.items() if m.accuracy is not None}


def test_reset_s3_tells_accuracy_by_difficulty(tmp_path: Path) -> None:
    found = evaluate(write_run(tmp_path / "mod", reset_data(), [MOD]), batch_size=5)
    by_way = accuracies(found)
    assert set(by_way) == {"oracle", "causal", "executed", "forced"}
    assert by_way["causal"] == by_way["executed"]
    assert by_way["forced"] != by_way["oracle"]
    loaded = Run(tmp_path / "mod")
    model, right, count = loaded.load_model(), 0, 0
    for row in loaded.data().validation:
        guess = model(row["input_ids"][None], routing="causal").logits[0].argmax(-1)
        inside = (row["difficulty"] >= 4) & (row["difficulty"] <= 7)
        right, count = right + int((guess == row["shift_labels"])[inside].sum()), count + int(inside.sum())
    assert by_way["executed"]["4-7"] == pytest.approx(right / count)
    kept = found.measured["forced"].summaries.layers()[1]["mixture_of_depths"]["capacity"]
    operations = sum(int((row["difficulty"] >= 0).sum()) for row in loaded.data().validation)
    assert kept == pytest.approx(operations / (12 * 32))
    assert "accuracy by difficulty" in found.markdown()


@pytest.mark.parametrize("decision", ["forced", "threshold"])
def test_a_model_routed_by_difficulty_is_only_measured_so(tmp_path: Path, decision: str) -> None:
    mechanisms = [{**MOD, "decision": decision}]
    found = evaluate(write_run(tmp_path / "run", reset_data(), mechanisms, train={"routing": "difficulty"}))
    assert (found.primary, set(found.measured)) == ("forced", {"forced"})
    assert set(found.unavailable.values()) == {NEEDS_MASKS}
    assert found.flops.agree


def test_packed_documents_are_kept_apart(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text("abcdefgh"[i % 8 :] + "ij" * (i + 3), encoding="utf-8")
    data = {"corpus": f"text:{folder}", "tokenizer": "byte", "context": 16, "packing": "packed"}
    found = evaluate(write_run(tmp_path / "run", data, [MOD, TSA], "polyglu"), batch_size=3)
    assert found.measured["causal"].predictions == Run(tmp_path / "run").data().validation_labels
    assert abs(found.executed_minus_causal or 0) < 1e-6
    one = evaluate(tmp_path / "run", batch_size=1)
    assert one.measured["oracle"].loss == pytest.approx(found.measured["oracle"].loss, abs=1e-6)


@pytest.mark.parametrize("budget", [0.0, -0.5, math.nan, math.inf])
def test_a_budget_that_is_no_share_is_refused_before_anything_is_read(tmp_path: Path, budget: float) -> None:
    with pytest.raises(ValueError, match="budgets must be shares of the dense FLOPs above 0"):
        evaluate(tmp_path / "nothing", budgets=[0.5, budget])
