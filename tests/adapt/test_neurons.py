"""Adapting a dense checkpoint so that it leaves neurons out, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from adapt.sources import recipe, run
from skipstone.adapt.adapt_recipe import read_recipe
from skipstone.adapt.export import export_dense
from skipstone.adapt.plan import prepare_plan
from skipstone.evaluate.evaluation import evaluate
from skipstone.measure.flops import count_flops
from skipstone.mechanisms.neuron_groups import NAME
from skipstone.runs import Run

HALF = {"neuron_groups": {"capacity": 0.75, "down_capacity": 0.25}}  # in the mean


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return run(source, recipe(folder, HALF, {"loss": {"language_modelling": 0.0, "distillation": 1.0}}), folder / "run")


def test_it_starts_as_the_source_and_ends_with_half_of_the_neurons(finished: Path) -> None:
    one = Run(finished)
    neutral = one.result()["neutral_start"]
    assert neutral["difference"] <= 1e-5 * neutral["largest"]
    model = one.load_model().eval()
    assert model.config.neuron_groups == {
        "decision": "magnitude",
        "group_size": 1,
        "capacity_warmup": 0.15,
        "capacity": 0.75,
        "down_capacity": 0.25,
    }
    ids = torch.arange(12)[None] + 3
    with torch.no_grad():
        records = model(ids, output_records=True).records
    assert all((decided[NAME].tried_BTG.sum(-1) == 36).all() for decided in records)
    assert all((decided[NAME].kept_BTG.sum(-1) == 12).all() for decided in records)


@torch.no_grad()
def test_it_knows_how_large_the_other_factor_typically_is(source: Path, tmp_path: Path) -> None:
    plan = prepare_plan(str(source), read_recipe(recipe(tmp_path, HALF)))
    mlp: Any = plan.model.model.layers[0].mlp
    seen: list[torch.Tensor] = []
    mlp.up_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    for row in plan.rows:
        plan.model(**{name: row[name] for name in ("input_ids", "attention_mask") if name in row})
    expected_F = torch.cat([x.flatten(0, 1) for x in seen]).square().mean(0).sqrt()
    torch.testing.assert_close(mlp.router.typical_F, expected_F)
    assert expected_F.std() > 0


@torch.no_grad()
@pytest.mark.slow
def test_decoding_executes_the_share_that_is_promised(finished: Path) -> None:
    result, model = Run(finished).result(), Run(finished).load_model().eval()
    context = Run(finished).config()["data"]["context"]
    cache, ids = DynamicCache(config=model.config), torch.arange(context + 1)[None] % 40
    model(ids[:, :-1], past_key_values=cache)
    found = count_flops(lambda: model(ids[:, -1:], past_key_values=cache))
    assert not found.unknown
    dense = model.cost(tokens=1, past=context).dense
    assert dense is not None
    assert found.total / dense.forward.total == pytest.approx(result["decoding_share"], abs=1e-4)
    assert found.by_kind["mlp"] == dense.forward.mlp * 2 / 3
    assert result["executed_share"] == 1.0  # a prompt is computed in full


def test_an_evaluation_tells_what_decoding_saves(finished: Path) -> None:
    notes = evaluate(finished).notes
    assert len(notes) == 1
    assert notes[0].startswith("FLOPs of whole rows; neurons by magnitude save in decoding, ")


def test_it_generates(finished: Path) -> None:
    model = Run(finished).load_model().eval()
    ids = torch.arange(8)[None] + 3
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(out[0, 8:], model(out).logits.argmax(-1)[0, 7:-1])


def test_it_comes_back_as_a_dense_checkpoint(source: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="neuron_groups are left out: all neurons are on"):
        export_dense(finished, tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        ({"capacity": 0.5, "decision": "learned"}, "decision must be 'magnitude' to adapt, got 'learned'"),
        ([0.5], r"model.neuron_groups must be a mapping, got \[0.5\]"),
        ({"capacity": 1.5}, r"capacity must be in \(0, 1\], got 1.5"),
        ({"capasity": 0.5}, "capasity"),
        ({"capacity": 0.5, "down_capacity": 0.6}, r"down_capacity must be in \(0, capacity = 0.5\], got 0.6"),
        ({"capacity": 0.5, "down_capacity": 0.01}, r"neuron_groups.down_capacity 0.01 keeps none of 48 groups"),
        ({"capacity": 0.5, "group_size": 7}, "group_size must divide intermediate_size, got 7 and 48"),
        ({"capacity": 0.5, "capacity_warmup": 0.0}, "the start is not neutral"),
    ],
)
def test_what_is_refused(source: Path, tmp_path: Path, groups: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        run(source, recipe(tmp_path, {"neuron_groups": groups}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_beside_tokens_that_skip(source: Path, tmp_path: Path) -> None:
    both = {**HALF, "mechanisms": [{"name": "mixture_of_depths", "layers": [1], "capacity": 0.5}]}
    plan = prepare_plan(str(source), read_recipe(recipe(tmp_path, both)))
    assert plan.record["neutral_start"]["difference"] <= 1e-5 * plan.record["neutral_start"]["largest"]
    assert plan.record["neuron_groups"]["capacity"] == 0.75
