"""Models whose MLP is a mixture of experts: configuration, cost, card, figures of an evaluation, shares of compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from generate.folders import MOD, text_data, write_run
from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.evaluate.evaluation import evaluate
from skipstone.measure.compute import compute_shares
from skipstone.measure.record_meter import RecordMeter
from skipstone.model.card import render_card
from skipstone.report.rendering import write_report

SIZES = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
STAGED = {"mechanisms": [{"name": "mixture_of_depths", "layers": "1:", "capacity": 0.5, "decision": "threshold"}]}
INTEGRATED = {"count": 4, "no_op": 2}


def build(experts: dict[str, Any] | None = None, **more: Any) -> SkipstoneForCausalLM:
    return tiny_model(None, **SIZES, mlp="experts", experts=experts, **more)


def ids() -> torch.Tensor:
    return torch.randint(0, 31, (3, 20))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": {"top_k": 2}}, "experts is set, but mlp is 'gated'; it needs mlp 'experts'"),
        ({"mlp": "expert"}, "unknown mlp 'expert'; did you mean 'experts'"),
        ({"mlp": "experts", "experts": {"topk": 1}}, "unknown key in experts 'topk'; did you mean 'top_k'"),
        ({"mlp": "experts", "experts": {"count": "many"}}, "experts.count must be int, got 'many'"),
        ({"mlp": "experts", "experts": {"top_k": 9}}, "experts: top_k must be at most count . no_op = 8, got 9"),
        (
            {"mlp": "experts", "activation": {"name": "polyglu"}},
            "activation 'polyglu' needs mlp 'gated', got 'experts'",
        ),
        ({"mlp": "experts", "mlp_bias": True}, "mlp 'experts' has no mlp_bias"),
        ({"mlp": "experts", "hidden_size": 20}, "hidden_size must be a multiple of 8 with mlp 'experts', got 20"),
    ],
)
def test_configurations_that_cannot_be_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        SkipstoneConfig.from_plain({**SIZES, **values})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("start", ["normal", "torch"])
def test_experts_start_like_the_dense_mlp(start: str) -> None:
    options = {"linear_init": start, "scaled_output_init": True, "hidden_size": 64}
    dense = SkipstoneForCausalLM(SkipstoneConfig(**{**SIZES, **options}))
    mixed = SkipstoneForCausalLM(
        SkipstoneConfig(**{**SIZES, **options}, mlp="experts", experts={"intermediate_size": 48})
    )
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected = getattr(dense.model.layers[0].mlp, name).weight.std()
        torch.testing.assert_close(getattr(mixed.model.layers[0].mlp, name).std(), expected, rtol=0.05, atol=0)


def test_a_token_costs_what_the_dense_mlp_costs() -> None:
    dense, mixed = SkipstoneForCausalLM(SkipstoneConfig(**SIZES)), build()
    assert mixed.cost(20).forward.mlp == dense.cost(20).forward.mlp
    assert mixed.cost(20).forward.router == 2 * 20 * 2 * 8 * 32
    found, plain = mixed.cost(20).parameters, dense.cost(20).parameters
    router = 2 * 8 * 32
    assert plain.active == plain.total
    assert found.active == plain.total + router
    assert found.total == plain.total + router + 2 * 3 * (3 * 32 * 48)  # eight experts of half the size: four times
    assert found.mechanism == 0


def test_no_ops_are_promised_their_share_of_the_choices() -> None:
    cost = build(INTEGRATED).cost(20)
    assert cost.dense is not None
    assert cost.forward.mlp == cost.dense.forward.mlp * 4 / 6
    assert cost.training.mlp == 3 * cost.forward.mlp
    assert cost.ratio < 1
    assert cost.parameters == cost.dense.parameters


@torch.no_grad()
def test_share_of_the_compute_that_a_token_took() -> None:
    model, tokens = build(INTEGRATED, **STAGED), ids()
    model.model.layers[1].mechanisms["mixture_of_depths"].router.weight.mul_(20)
    records = model(tokens, output_records=True).records
    kept = records[1]["mixture_of_depths"].kept_BT
    assert 0 < kept.float().mean() < 1
    computed = [layer["experts"].chosen_BTX[..., :4].sum(-1).float() for layer in records]
    assert (computed[1][~kept] == 0).all()
    attention, expert = 4 * 32 * 32, 3 * 32 * 24
    expected = attention + computed[0] * expert + kept * (attention + computed[1] * expert)
    torch.testing.assert_close(compute_shares(model.model.layers, records), expected / (2 * (attention + 2 * expert)))


def test_card() -> None:
    card = render_card(build(INTEGRATED), title="A")
    assert "| MLP | 4 experts of 24 neurons (silu) and 2 no-ops, top 2 |" in card
    assert f", of which a token uses {build(INTEGRATED).cost().parameters.active:,} |" in card
    assert "with conditional computation" in card
    assert "None: every token passes every block." in card


def test_logged_figures() -> None:
    model, meter = build(INTEGRATED), RecordMeter()
    meter.add(model.routing_modules(), model(ids(), output_records=True).records)
    logs = meter.read()
    assert logs.keys() == {f"{kind}/{layer}/experts" for kind in ("no_op", "busiest", "entropy") for layer in (0, 1)}
    assert 0.1 < logs["no_op/0/experts"] < 0.6
    assert 0.9 < logs["entropy/0/experts"] <= 1


@pytest.mark.parametrize("mechanisms", [[], [MOD]], ids=["integrated", "staged"])
def test_evaluation_and_report(mechanisms: list[dict[str, Any]], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", text_data(tmp_path / "text"), mechanisms, mlp="experts", experts=INTEGRATED)
    found = evaluate(run, batch_size=4)
    assert found.flops.agree
    assert found.flops.share < 1
    assert abs(found.executed_minus_causal or 0) < 1e-6
    layers = found.measured[found.primary].summaries.layers()
    for layer in layers:
        assert sum(layer["experts"]["experts"]) + layer["experts"]["no_op"] == pytest.approx(1)
    assert "experts by layer" in found.markdown()
    (run / "environment.json").write_text("{}", encoding="utf-8")
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    page = tmp_path / "page.html"
    write_report([run], page)
    text = page.read_text(encoding="utf-8")
    assert "Which experts the tokens chose" in text
    assert "4 experts of " in text
