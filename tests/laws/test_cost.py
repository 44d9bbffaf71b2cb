"""Law 7: `cost` equals what executes: FLOPs counted by operation, and bytes of the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from laws.builders import (
    ALL,
    CAUSAL,
    DECIDED,
    LENGTH,
    NESTED,
    ORDERS,
    ROWS,
    SITES,
    VARIANTS,
    VOCAB,
    Case,
    case,
    config,
    entry,
    fresh,
    ids,
    lively,
)
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.measure.flops import count_flops
from skipstone.model.cost import Flops, kept_from_records

MOD = entry("mixture_of_depths")
PARTS = [
    case(MOD, tie_word_embeddings=True),
    case(MOD, entry("token_selective"), mlp="plain", activation="gelu", mlp_bias=True, attention_bias=True),
    case(MOD, entry("token_selective"), num_key_value_heads=4, qk_norm=True),
    case(MOD, num_key_value_heads=1, head_dim=16, norm="layernorm"),
    case(entry("token_selective"), attn_implementation="eager"),
    case(entry("token_selective"), attention_dropout=0.1, embedding_dropout=0.1, residual_dropout=0.1),
    case(MOD, activation="polyglu", positions="learned"),
]
BATCHED = SITES + NESTED + VARIANTS + PARTS + [c for c in DECIDED if dict(c.entries[0])["weight"] == "none"]
CACHED = [c for c in ORDERS if c.activation == "polyglu"] + SITES + NESTED + [c for c in VARIANTS if not c.oracle_only]


def counted(fn: Callable[[], Any]) -> tuple[dict[str, int], Any]:
    """FLOPs by kind, zeros left out, and what `fn` returned."""
    results: list[Any] = []
    count = count_flops(lambda: results.append(fn()))
    assert count.unknown == ()
    assert count.total == sum(count.by_kind.values())
    return {kind: flops for kind, flops in count.by_kind.items() if flops}, results[0]


def kinds(flops: Flops) -> dict[str, float]:
    return {kind: value for kind, value in vars(flops).items() if value}


def with_rows(cases: list[Case]) -> list[Any]:
    """Every case with one row, and those where rows differ in more ways than one as a batch, too."""
    chosen = [(c, 1) for c in cases] + [(c, ROWS) for c in cases if c in BATCHED]
    return [pytest.param(c, rows, id=f"{c}-{rows}") for c, rows in chosen]


@pytest.mark.parametrize(("chosen", "rows"), with_rows(ALL + PARTS))
def test_training_executes_what_cost_says(chosen: Case, rows: int) -> None:
    model, tokens = lively(chosen).train(), ids(rows)

    def step() -> Any:
        out = model(tokens, labels=tokens, routing="oracle", output_records=True)
        out.loss.backward()
        return out

    found, out = counted(step)
    cost = model.cost(LENGTH, batch=rows, routing="oracle", kept=kept_from_records(model, out.records))
    backward = found.pop("backward")
    assert found == kinds(cost.forward)
    assert found["attention_score"] > 0
    assert sum(found.values()) + backward == cost.training.total


@pytest.mark.parametrize(("chosen", "rows"), with_rows(CAUSAL + PARTS))
@torch.no_grad()
def test_causal_forward_executes_what_cost_says(chosen: Case, rows: int) -> None:
    model, tokens = lively(chosen), ids(rows)
    found, out = counted(lambda: model(tokens, routing="causal", output_records=True))
    cost = model.cost(LENGTH, batch=rows, kept=kept_from_records(model, out.records))
    assert found == kinds(cost.forward)


@pytest.mark.parametrize("chosen", CACHED, ids=str)
@torch.no_grad()
def test_decoding_executes_what_cost_says(chosen: Case) -> None:
    model, row = lively(chosen), ids(1)
    cache = DynamicCache(config=model.config)
    model(row[:, :8], past_key_values=cache)
    for t in range(8, 12):
        stored = {i: layer.kv.width for i, layer in enumerate(cache.layers)}
        token = row[:, t : t + 1]
        found, out = counted(lambda token=token: model(token, past_key_values=cache, output_records=True))
        kept = kept_from_records(model, out.records)
        cost = model.cost(1, past=t, kept=kept, stored=stored)
        assert found == kinds(cost.forward)


@pytest.mark.parametrize("chosen", CACHED, ids=str)
@torch.no_grad()
def test_cache_holds_the_bytes_that_cost_says(chosen: Case) -> None:
    model = lively(chosen)
    cache = DynamicCache(config=model.config)
    out = model(ids(1), past_key_values=cache, routing="causal", output_records=True)
    cost = model.cost(LENGTH, kept=kept_from_records(model, out.records))
    layers = [layer for layer in cache.layers if isinstance(layer, SkipstoneCacheLayer)]
    assert len(layers) == model.config.num_hidden_layers
    assert cost.kv_bytes_per_token * LENGTH == pytest.approx(sum(layer.kv.bytes() for layer in layers), rel=1e-12)
    state = sum(store.bytes() for layer in layers for store in layer.stores.values())
    assert cost.state_bytes_per_token * LENGTH == pytest.approx(state, rel=1e-12)


def alternate(capacity: float, **more: Any) -> SkipstoneForCausalLM:
    entries = [{"name": "mixture_of_depths", "layers": "1::2", "capacity": capacity, "decision": "threshold"}]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 50}
    return SkipstoneForCausalLM(SkipstoneConfig(mechanisms=entries, **sizes, **more))


@pytest.mark.parametrize("routing", ["oracle", "causal"])
def test_published_arithmetic_of_every_other_block(routing: Any) -> None:
    """Raposo et al. 2024 at capacity 1/8: linear (1 + c) / 2, scores (1 + c^2) / 2, cache (1 + c) / 2 of dense."""
    cost = alternate(0.125).cost(1024, routing=routing)
    assert cost.dense is not None
    assert cost.forward.linear / cost.dense.forward.linear == 0.5625
    assert cost.forward.attention_score / cost.dense.forward.attention_score == 0.5078125
    assert cost.kv_bytes_per_token / cost.dense.kv_bytes_per_token == 0.5625
    assert cost.training.linear / cost.dense.training.linear == 0.5625
    assert cost.forward.head == cost.dense.forward.head == 2 * 1024 * 64 * 50
    assert cost.forward.router == 2 * 2 * 1024 * 64


def test_quota_is_rounded_as_the_block_does() -> None:
    cost = alternate(0.125).cost(15, routing="oracle")  # floor(15 / 8) = 1
    assert cost.dense is not None
    assert cost.forward.linear / cost.dense.forward.linear == pytest.approx((15 + 1) / 30, rel=1e-12)


def test_a_decoded_token_costs_its_share_in_the_mean() -> None:
    """A kept token sees the kept ones before it and itself."""
    cost = alternate(0.125).cost(1, past=800)
    assert cost.dense is not None
    assert cost.forward.linear / cost.dense.forward.linear == 0.5625
    pairs = cost.forward.attention_score / (cost.dense.forward.attention_score / 4 / 801)
    assert pairs == pytest.approx(2 * 801 + 2 * 0.125 * (100 + 1), rel=1e-12)


def test_dense_twin_is_the_model_without_mechanisms() -> None:
    chosen = case(MOD, entry("token_selective", on="mlp"), activation="polyglu")
    twin, plain = fresh(chosen).cost(LENGTH, past=4, batch=2).dense, fresh(case()).cost(LENGTH, past=4, batch=2)
    assert twin is not None
    assert plain.dense is not None
    assert plain.ratio == 1.0
    assert plain.forward == plain.dense.forward == twin.forward
    assert (plain.training, plain.parameters) == (twin.training, twin.parameters)
    assert plain.kv_bytes_per_token == twin.kv_bytes_per_token
    assert twin.state_bytes_per_token == 0


def test_parameters() -> None:
    model = fresh(case(MOD, entry("token_selective"), activation="polyglu", positions="learned"))
    mechanisms = sum(p.numel() for m in model.routing_modules() for p in m.parameters())
    found = model.cost(LENGTH).parameters
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.embedding == VOCAB * 32 + 64 * 32
    assert found.mechanism == mechanisms > 0


@pytest.mark.parametrize("chosen", [PARTS[0], ALL[-1], case(MOD, activation="polyglu")], ids=str)
def test_a_model_on_the_meta_device_will_do(chosen: Case) -> None:
    with torch.device("meta"):
        shapes = SkipstoneForCausalLM(config(chosen))
    assert next(shapes.parameters()).is_meta
    assert shapes.cost(37, past=5, batch=2) == fresh(chosen).cost(37, past=5, batch=2)


def test_decoder_without_head() -> None:
    model = fresh(case(MOD))
    whole, body = model.cost(LENGTH), model.model.cost(LENGTH)
    assert body.forward.head == 0
    assert body.forward.total == whole.forward.total - whole.forward.head


@torch.no_grad()
def test_prefill_that_keeps_one_logit() -> None:
    model, row = fresh(case(entry("early_exit"))), ids(1)
    found, out = counted(lambda: model(row, logits_to_keep=1, output_records=True))
    kept = kept_from_records(model, out.records)
    assert found == kinds(model.cost(LENGTH, logits_to_keep=1, kept=kept).forward)


@torch.no_grad()
def test_plain_numbers_serve_where_nothing_is_nested() -> None:
    model = lively(case(MOD))
    measured = kept_from_records(model, model(ids(1), output_records=True).records)
    numbers = {i: {name: counts.kv_tokens for name, counts in kept.items()} for i, kept in measured.items()}  # type: ignore[union-attr]
    assert model.cost(LENGTH, kept=numbers).forward == model.cost(LENGTH, kept=measured).forward


@torch.no_grad()
def test_widest_row_is_executed_and_mean_is_useful() -> None:
    model = lively(case(entry("mixture_of_depths", decision="threshold")))
    records = model(ids(), output_records=True).records
    rows = records[1]["mixture_of_depths"].kept_BT.sum(1).double()
    assert rows.min() < rows.max(), "rows must differ"
    widest, mean = (kept_from_records(model, records, rows)[1] for rows in ("widest", "mean"))  # type: ignore[arg-type]
    assert widest["mixture_of_depths"].kv_tokens == rows.max()  # type: ignore[union-attr]
    assert float(mean["mixture_of_depths"].kv_tokens) == pytest.approx(float(rows.mean()))  # type: ignore[union-attr]


@torch.no_grad()
def test_masked_executor_computes_everything() -> None:
    """Why the gathered one exists: masking afterwards saves nothing."""
    model, row = lively(case(MOD)), ids(1)
    found, _ = counted(lambda: model(row, executor="masked"))
    dense = model.cost(LENGTH).dense
    assert dense is not None
    assert found["mlp"] == dense.forward.mlp
    assert found["attention_score"] == dense.forward.attention_score


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"batch": 0}, {"past": -1}])
def test_sizes_that_make_no_call(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"got .*{next(iter(sizes))}="):
        fresh(case()).cost(**sizes)


def test_unknown_routing() -> None:
    with pytest.raises(ValueError, match="unknown routing 'orakel'; did you mean 'oracle'"):
        fresh(case()).cost(routing="orakel")
