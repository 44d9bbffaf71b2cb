"""Stages of adapting: which parameters train when, and at which learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from adapt.sources import mixture, recipe, run, source_model
from skipstone.adapt import stages
from skipstone.adapt.adapt_recipe import Lora, Stage, read_recipe
from skipstone.adapt.plan import check_early
from skipstone.adapt.student import route, with_defaults
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.train.setup import plain
from train.tool import weights

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("adapt-*.yaml"))


def filled(**options: Any) -> Stage:
    return Stage(
        **{"train_only": "all", "learning_rate": 0.1, "router_learning_rate": 0.2, "warmup_steps": 0, **options}
    )


def test_rates_start_anew_in_each_stage() -> None:
    two = [filled(steps=4, warmup_steps=2), filled(steps=4, learning_rate=1.0, router_learning_rate=3.0)]
    rates = [stages.rate(two, "weights", 0.1, step) for step in range(9)]
    assert rates[:2] == pytest.approx([0.05, 0.1])
    assert rates[2] == pytest.approx(0.1)
    assert rates[3] == pytest.approx(0.1 * (0.1 + 0.9 / 2))
    assert rates[4] == pytest.approx(1.0)
    assert rates[7] > rates[8] * 0.99, "beyond the last step nothing happens"
    assert stages.rate(two, "routers", 0.1, 4) == pytest.approx(3.0)


def student() -> Any:
    dense = source_model().requires_grad_(False)
    values = {**plain(dense.config), "mechanisms": with_defaults([mixture(capacity=0.5)])}
    return route(dense, SkipstoneConfig.from_plain(values), 0)


def test_every_parameter_has_one_role() -> None:
    model = student()
    stages.add_adapters(model, Lora(rank=2))
    found = stages.roles(model)
    assert {found[n] for n in found if "mechanisms" in n} == {"routers"}
    assert {found[n] for n in found if "lora_" in n} == {"lora"}
    assert {found[n] for n in found if "embed" in n or "norm" in n or "base_layer" in n} == {"weights"}
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n in found if "lora_" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    groups = list(stages.groups(model, [filled(steps=1, train_only="routers+lora")], 0.1))
    assert sum(len(g["params"]) for g in groups) == sum(role != "weights" for role in found.values())
    assert {g["weight_decay"] for g in groups if g["role"] == "lora"} == {0.0}


def test_a_norm_whose_weight_is_a_matrix_does_not_decay() -> None:
    """`qk_norm_over: each_head` has one row of weights for each head."""
    config = SkipstoneConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, qk_norm=True, qk_norm_over="each_head")
    model = SkipstoneForCausalLM(config)
    decay = {id(p): g["weight_decay"] for g in stages.groups(model, [filled(steps=1)], 0.1) for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (decay[id(parameter)] == 0.0) == ("norm" in name)


def test_merged_adapters_are_what_they_computed() -> None:
    model = student().eval()
    tuner = stages.add_adapters(model, Lora(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        stages.merge_adapters(model, tuner)
        assert not any("lora" in name for name in model.state_dict())
        assert (model(ids).logits - before).abs().max() < 1e-4
    assert (student().eval()(ids).logits - before).abs().max() > 1e-2


def moved(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    changed = {name for name in one if name in other and not torch.equal(one[name], other[name])}
    return {"routers" if ".mechanisms." in name else "weights" for name in changed if "threshold" not in name}


@pytest.mark.parametrize(
    ("train_only", "changed"),
    [
        pytest.param("routers", {"routers"}, marks=pytest.mark.slow),
        ("routers+lora", {"routers", "weights"}),
        pytest.param("all", {"routers", "weights"}, marks=pytest.mark.slow),
    ],
)
def test_what_trains(train_only: str, changed: set[str], source: Path, tmp_path: Path) -> None:
    model = {"mechanisms": [mixture(capacity=0.5, capacity_warmup=0.1)]}
    config = recipe(tmp_path, model, {"stages": [{"steps": 3, "train_only": train_only}]}, weight_decay=0.5)
    trained = weights(run(source, config, tmp_path / "run"))
    start = route(source_model(), SkipstoneConfig.from_plain(_config(tmp_path / "run")), 0).state_dict()
    assert moved(trained, start) == changed
    same = torch.equal(trained["model.norm.weight"], start["model.norm.weight"])
    assert same == (train_only != "all"), "adapters sit on projections alone"


def _config(folder: Path) -> dict[str, Any]:
    from skipstone.runs import Run

    return Run(folder).config()["model"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_that_we_ship_can_be_read(path: Path) -> None:
    read = read_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))
    check_early(read)
    assert read.name == path.stem
    assert read.train.steps == sum(stage.steps or 0 for stage in read.adapt.stages)


def test_a_recipe_is_complete_after_reading(tmp_path: Path) -> None:
    given = recipe(tmp_path, {}, {"stages": [{"steps": 3}, {"steps": 2, "train_only": "routers"}]}, warmup_steps=4)
    given["adapt"]["router_learning_rate"] = 0.5
    read = read_recipe(given)
    assert read.train.steps == 5
    first, second = read.adapt.stages
    assert (first.train_only, second.train_only) == ("all", "routers")
    assert first.learning_rate == second.learning_rate == read.train.learning_rate
    assert first.router_learning_rate == 0.5
    assert (first.warmup_steps, second.warmup_steps) == (3, 2)
    assert read_recipe({**given, "train": {"warmup_steps": 99}}).adapt.stages[1].warmup_steps == 2
    alone = read_recipe(recipe(tmp_path, {}))
    assert [stage.steps for stage in alone.adapt.stages] == [12]
