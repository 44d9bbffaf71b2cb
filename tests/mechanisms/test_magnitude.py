"""Neuron groups by magnitude: groups that are tried and groups that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.flops import count_flops
from skipstone.mechanisms import MagnitudeGroups, NeuronGroups
from skipstone.model.card import render_card
from skipstone.nn.grouped_mlp import GroupedMLP
from skipstone.nn.magnitude_mlp import MagnitudeMLP
from skipstone.ops import magnitude

NEURONS = 48


def model(**options: Any) -> SkipstoneForCausalLM:
    sizes = {"vocab_size": 64, "intermediate_size": NEURONS, "num_attention_heads": 4, "num_key_value_heads": 2}
    groups = {"decision": "magnitude", "group_size": 1, "capacity": 0.75, "down_capacity": 0.5, **options}
    return tiny_model(**sizes, pad_token_id=0, neuron_groups=groups)


def ids(count: int) -> torch.Tensor:
    return torch.arange(count)[None] * 7 % 60 + 3


@torch.no_grad()
def test_the_largest_products_of_those_that_are_tried_are_kept() -> None:
    built, products = model(), []
    mlp: Any = built.model.layers[0].mlp
    mlp.router.typical_F.uniform_(0.2, 2.0)
    mlp.activation.register_forward_hook(lambda module, inputs, output: products.append(output[0]))
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: products.append(output))
    found: Any = built(ids(20), output_records=True).records[0]["neuron_groups"]
    a, up = products
    tried = (a.abs() * mlp.router.typical_F).topk(36, -1).indices
    assert found.tried_BTG.gather(-1, tried).all()
    assert (found.tried_BTG.sum(-1) == 36).all()
    kept = ((a * up).abs() * found.tried_BTG).topk(24, -1).indices
    assert found.kept_BTG.gather(-1, kept).all()
    assert (found.kept_BTG.sum(-1) == 24).all()


@torch.no_grad()
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("options", [{}, {"group_size": 4}, {"down_capacity": None}])
def test_decoding_reads_rows_in_place_or_copied_to_the_same_end(
    native: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if native:
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(magnitude, "_kernels", lambda: None)
    built, tokens = model(**options), ids(10)
    cache = DynamicCache(config=built.config)
    logits = [built(tokens[:, t : t + 1], past_key_values=cache).logits for t in range(10)]
    torch.testing.assert_close(torch.cat(logits, 1), built(tokens).logits)
    counted = count_flops(lambda: built(tokens[:, -1:], past_key_values=cache))
    assert not counted.unknown
    tried, kept = built.model.layers[0].mlp.router.tried, built.model.layers[0].mlp.router.kept  # type: ignore[union-attr]
    on = (tried + kept) * options.get("group_size", 1)
    assert counted.by_kind["mlp"] == 2 * 2 * 32 * (NEURONS + on)
    assert counted.by_kind["mlp"] == built.cost(tokens=1, past=10).forward.mlp


def test_what_is_typical_is_saved_and_loaded(tmp_path: Any) -> None:
    built = model()
    for block in built.model.layers:
        block.mlp.router.typical_F.uniform_(0.2, 2.0)  # type: ignore[union-attr]
    built.save_pretrained(tmp_path)
    again = SkipstoneForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again.state_dict(), built.state_dict())


def test_a_saved_model_takes_other_numbers(tmp_path: Any) -> None:
    model().save_pretrained(tmp_path)
    fewer = {"decision": "magnitude", "group_size": 1, "capacity": 0.5, "down_capacity": 0.25}
    again = SkipstoneForCausalLM.from_pretrained(tmp_path, neuron_groups=fewer)
    router: Any = again.model.layers[0].mlp.router
    assert (router.tried, router.kept) == (24, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "36 of 48 neurons tried, 24 kept"),
        ({"group_size": 4, "down_capacity": None}, "9 of 12 neuron groups on"),
    ],
)
def test_the_card_tells_how_many(options: dict[str, Any], words: str) -> None:
    assert f", {words} |" in render_card(model(**options), title="small")


def test_options_for_another_decision_are_refused() -> None:
    with pytest.raises(ValueError, match="down_capacity is read with decision magnitude alone, got 'learned'"):
        model(decision="learned")


def test_a_warm_up_ends_at_both_shares() -> None:
    router: Any = model(capacity_warmup=0.5).model.layers[0].mlp.router
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        router.advance(progress, None)
        seen.append((router.tried, router.kept))
    assert seen == [(48, 48), (42, 36), (36, 24), (36, 24)]


@pytest.mark.parametrize("option", ["chunk_size", "decay", "router_width", "balance_rate"])
def test_options_that_magnitude_does_not_read_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"neuron_groups\.{option} is read with decision learned or random alone"):
        model(**{option: 1})


def test_a_saved_configuration_with_an_option_that_is_not_read_loads(tmp_path: Path) -> None:
    model().config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    saved["neuron_groups"]["chunk_size"] = 32
    file.write_text(json.dumps(saved))
    loaded = SkipstoneConfig.from_pretrained(tmp_path)
    assert "chunk_size" not in loaded.neuron_groups
    assert loaded.neuron_groups == model().config.neuron_groups


def test_neither_way_of_choosing_inherits_what_only_the_other_can_do() -> None:
    assert not issubclass(MagnitudeGroups, NeuronGroups)
    assert not issubclass(MagnitudeMLP, GroupedMLP)
    with pytest.raises(NotImplementedError):
        model().model.layers[0].mlp.router(torch.zeros(1, 1, 32))
