"""Neuron groups: an exact share, one decision per chunk known at its start, and one gathering per chunk in decoding."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from generate.folders import text_data, write_run
from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.records import NeuronGroupsRecord
from skipstone.evaluate.evaluation import evaluate
from skipstone.measure.compute import compute_shares
from skipstone.measure.flops import count_flops
from skipstone.measure.model_view import mechanisms_in_words
from skipstone.measure.record_meter import RecordMeter
from skipstone.mechanisms.neuron_groups import NAME, NeuronGroups
from skipstone.model.card import render_card

CHUNK, TOTAL, KEPT = 4, 6, 3
GROUPS: dict[str, Any] = {"group_size": 8, "capacity": 0.5, "chunk_size": CHUNK}


def model(activation: Any = "silu", **options: Any) -> SkipstoneForCausalLM:
    groups = {**GROUPS, **options}
    if options.get("decision") == "magnitude":  # for each token by itself
        del groups["chunk_size"]
    sizes = {"vocab_size": 19, "intermediate_size": TOTAL * 8, "num_attention_heads": 4, "initializer_range": 0.3}
    return tiny_model(3, **sizes, neuron_groups=groups, activation=activation)


def ids(rows: int = 2, length: int = 18) -> Tensor:
    return torch.randint(0, 19, (rows, length), generator=torch.Generator().manual_seed(1))


def record(built: SkipstoneForCausalLM, tokens: Tensor, layer: int = 0, **more: Any) -> NeuronGroupsRecord:
    with torch.no_grad():
        found = built(tokens, output_records=True, **more).records[layer][NAME]
    assert isinstance(found, NeuronGroupsRecord)
    return found


@pytest.mark.parametrize("decision", ["learned", "random"])
def test_share_is_exact_and_chunks_share_a_decision(decision: str) -> None:
    kept_BTG = record(model(decision=decision), ids()).kept_BTG
    assert (kept_BTG.sum(-1) == KEPT).all()
    for start in range(0, 18, CHUNK):
        assert (kept_BTG[:, start : start + CHUNK] == kept_BTG[:, start : start + 1]).all()
    assert len({tuple(chunk) for chunk in kept_BTG[:, ::CHUNK].flatten(0, 1).int().tolist()}) > 2


def test_a_chunk_is_decided_by_its_first_token_and_what_came_before() -> None:
    built, changed = model(), ids()
    changed[:, 5:8] = (changed[:, 5:8] + 1) % 19  # in the second chunk, behind its first token
    before, after = (record(built, x).score_BTG for x in (ids(), changed))
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.isclose(before[:, 8:], after[:, 8:]).all()


@torch.no_grad()
def test_training_sees_no_later_token_either() -> None:
    built, changed = model(activation={"name": "polyglu", "noise": False}).train(), ids()
    changed[:, 9:] = (changed[:, 9:] + 1) % 19
    before, after = built(ids()).logits, built(changed).logits
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 0.01


@pytest.mark.parametrize("document", ["alone", "packed"])
def test_documents_start_chunks_of_their_own(document: str) -> None:
    built, tokens = model(), ids(1, 13)
    where = {"document_ids": torch.tensor([[0] * 6 + [1] * 7])} if document == "packed" else {}
    kept = record(built, tokens if where else tokens[:, 6:], **where).kept_BTG[0, -7:]
    assert torch.equal(kept, record(built, tokens[:, 6:]).kept_BTG[0])


def test_decoding_gathers_once_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    built, calls = model(), []
    cache = DynamicCache(config=built.config)
    mlp: Any = built.model.layers[0].mlp
    part: Callable[..., Any] = mlp._part
    monkeypatch.setattr(mlp, "_part", lambda group_K: calls.append(group_K) or part(group_K))
    tokens = ids(1, 4 * CHUNK)
    kept = record(built, tokens).kept_BTG[0, ::CHUNK]
    with torch.no_grad():
        for t in range(4 * CHUNK):
            built(tokens[:, t : t + 1], past_key_values=cache)
    changes = 1 + sum(not torch.equal(a, b) for a, b in pairwise(kept))
    assert len(calls) == changes <= 4


def test_decoding_in_inference_mode_and_out_of_it() -> None:
    built, tokens = model(), ids(2, 3 * CHUNK)
    cache, logits = DynamicCache(config=built.config), []
    for t in range(3 * CHUNK):
        with torch.inference_mode() if t % 2 else torch.no_grad():
            logits.append(built(tokens[:, t : t + 1], past_key_values=cache).logits.clone())
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(logits, 1), built(tokens).logits)
    cache.reset()
    assert not cache.layers[0].scratch  # type: ignore[attr-defined]


def test_flops_fall_by_the_share_that_is_off() -> None:
    def mlp(built: SkipstoneForCausalLM) -> int:
        return count_flops(lambda: built(ids())).by_kind["mlp"]

    with torch.no_grad():
        assert mlp(model()) * 2 == mlp(model(capacity=1.0))
    cost = model().cost(18, batch=2)
    assert cost.dense is not None
    assert cost.forward.mlp * 2 == cost.dense.forward.mlp


def test_compute_of_a_token() -> None:
    built = model()
    with torch.no_grad():
        shares = compute_shares(built.model.layers, built(ids(), output_records=True).records)
    attention, mlp = 4 * 32 * 32, 3 * 32 * TOTAL * 8
    assert shares.shape == (2, 18)
    torch.testing.assert_close(shares, torch.full((2, 18), (attention + mlp / 2) / (attention + mlp)))


def test_capacity_falls_during_the_warm_up() -> None:
    built = model(capacity_warmup=0.5)
    with pytest.warns(UserWarning, match="capacity_warmup was never advanced"):
        built.generate(ids(1, 3), max_new_tokens=1, pad_token_id=0)
    for progress, kept in ((0.0, TOTAL), (0.25, 4), (0.5, KEPT), (1.0, KEPT)):
        for mechanism in built.routing_modules():
            mechanism.advance(progress, None)
        assert (record(built, ids()).kept_BTG.sum(-1) == kept).all()


def test_balance_moves_towards_groups_that_are_on_less() -> None:
    built = model(balance_rate=0.5)
    router: Any = next(built.routing_modules())
    found = router.statistics(record(built, ids()))
    assert found.shape == (TOTAL,)
    assert found.sum() == pytest.approx(KEPT)
    router.advance(0.5, found)
    assert torch.equal(router.balance_bias, 0.5 * (found.mean() - found).sign())
    for _ in range(60):
        router.advance(0.5, router.statistics(record(built, ids())))
    assert record(built, ids()).kept_BTG.any(0).any(0).all()
    assert next(model().routing_modules()).statistics(record(model(), ids())) is None


def test_the_card_and_the_report_tell() -> None:
    assert mechanisms_in_words(model()) == "3 of 6 neuron groups on"
    assert "gated, silu, 48 neurons, 3 of 6 neuron groups on" in render_card(model(), title="name")


def test_figures_of_training_and_of_evaluation(tmp_path: Path) -> None:
    built, meter = model(), RecordMeter()
    with torch.no_grad():
        meter.add(list(built.routing_modules()), built(ids(), output_records=True).records)
    figures = meter.read()
    assert figures[f"on/0/{NAME}"] == pytest.approx(0.5)
    assert 0 < figures[f"changing/0/{NAME}"] <= 1
    run = write_run(tmp_path / "run", text_data(tmp_path), [], neuron_groups={**GROUPS, "group_size": 16})
    layer = evaluate(run).to_dict()["ways"]["executed"]["layers"][0][NAME]
    assert layer["on"] == pytest.approx(sum(layer["groups"]) / len(layer["groups"]))
    assert layer["always_on"] == sum(share == 1 for share in layer["groups"])


WRONG = {
    "group_size must divide intermediate_size, got 7 and 48": {"group_size": 7},
    "keeps none of 6 groups": {"capacity": 0.1},
    "capacity must be in": {"capacity": 0},
    "chunk_size must be at least 1": {"chunk_size": 0},
    "decay must be in": {"decay": 1.0},
    "capacity_warmup must be in": {"capacity_warmup": 1.0},
    "balance_rate must not be negative": {"balance_rate": -1.0},
    "did you mean 'chunk_size'": {"chunksize": 4},
    "left has 1 entries, but there are 2 layers": {"left": [6]},
    "left must be 3 to 6 groups, got 2": {"left": [6, 2]},
}


@pytest.mark.parametrize("message", WRONG)
def test_refused_options(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**WRONG[message])


@pytest.mark.parametrize(
    ("message", "values"),
    [
        ("needs mlp 'gated', got 'plain'", {"mlp": "plain"}),
        ("cannot be combined with mlp_bias", {"mlp_bias": True}),
        ("cannot be combined with mlp_hidden_dropout", {"mlp_hidden_dropout": 0.1}),
        (
            "cannot be combined with activation 'fixed_mix'",
            {"activation": {"name": "fixed_mix", "groups": {"silu": 64}}},
        ),
    ],
)
def test_refused_combinations(message: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        SkipstoneConfig(hidden_size=24, intermediate_size=64, neuron_groups={"group_size": 8}, **values)


def test_scores_are_fp32_whatever_the_model_is() -> None:
    built = model().bfloat16()
    assert record(built, ids()).score_BTG.dtype == torch.float32
    assert isinstance(built.model.layers[0].mlp.router, NeuronGroups)


def alone(**options: Any) -> SkipstoneForCausalLM:
    return model(decision="magnitude", group_size=1, **options)


def test_by_magnitude_every_token_keeps_its_own_largest_activations() -> None:
    built, tokens, seen = alone(), ids(), []
    mlp: Any = built.model.layers[0].mlp
    mlp.activation.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    kept_BTG = record(built, tokens).kept_BTG
    assert (kept_BTG.sum(-1) == TOTAL * 4).all()
    sizes = seen[0].abs()
    least, most = (sizes.masked_fill(which, fill) for which, fill in ((~kept_BTG, torch.inf), (kept_BTG, -torch.inf)))
    assert (least.amin(-1) >= most.amax(-1)).all()
    assert len({tuple(row) for row in kept_BTG.flatten(0, 1).int().tolist()}) == kept_BTG[..., 0].numel()


def test_by_magnitude_a_single_token_multiplies_its_neurons_alone() -> None:
    built, token = alone(), ids(1, 1)
    whole = 2 * 2 * 3 * 32 * TOTAL * 8  # layers, FLOPs, matrices
    with torch.no_grad():
        assert count_flops(lambda: built(token)).by_kind["mlp"] == whole * 2 / 3
        assert count_flops(lambda: built(token, executor="masked")).by_kind["mlp"] == whole
        for others in (ids(1, 2), ids(2, 1)):
            assert count_flops(lambda given=others: built(given)).by_kind["mlp"] == 2 * whole  # type: ignore[misc]
    assert count_flops(lambda: built(token)).by_kind["mlp"] == whole  # gradients are wanted


def test_by_magnitude_nothing_can_be_balanced() -> None:
    with pytest.raises(ValueError, match=r"neuron_groups\.balance_rate is read with decision learned or random alone"):
        alone(balance_rate=0.1)


@pytest.mark.parametrize("options", [{}, {"group_size": 4, "capacity": 0.25}])
@pytest.mark.parametrize("activation", ["silu", "polyglu"])
def test_by_magnitude_decoding_in_part_is_the_whole_forward_pass(activation: str, options: dict[str, Any]) -> None:
    built, tokens = model(activation, **{"decision": "magnitude", "group_size": 1, **options}), ids(1, 12)
    cache = DynamicCache(config=built.config)
    with torch.no_grad():
        logits = [built(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(12)]
        torch.testing.assert_close(torch.cat(logits, 1), built(tokens).logits)
