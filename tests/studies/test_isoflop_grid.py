"""The plan of an isoFLOP study: FLOPs, steps, sizes, arms, rates, and text that is read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from skipstone.core.strict import from_dict
from skipstone.data.config import DataConfig
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.train.recipe import read_recipe
from skipstone_studies.isoflop.estimate import GridEstimate, step_times, step_times_at
from skipstone_studies.isoflop.grid import (
    CorpusFacts,
    Grid,
    check_once,
    compact,
    corpus_share,
    read_corpus,
    read_corpus_if_cheap,
)
from skipstone_studies.isoflop.run import with_vocabulary
from skipstone_studies.isoflop.spec import GridSize, GridSpec, arms_of, make_spec, parse_size
from skipstone_studies.pace import duration

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MOD = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.25, "decision": "ema_threshold"}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": 258,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mechanisms": [MOD],
    },
    "data": {"corpus": "python-stdlib", "tokenizer": "byte", "context": 16},
    "train": {"steps": 10, "batch_size": 2, "warmup_steps": 2},
}


def spec(recipe: dict[str, Any] = RECIPE, **given: Any) -> GridSpec:
    return make_spec(recipe, **{"budgets": [2e7, 6e7], "sizes": ["16", "32x4", "24"], "rates": [1e-3, 2e-3], **given})


def test_every_run_is_within_half_a_step_of_its_budget() -> None:
    grid = Grid(spec())
    cells = grid.everything()
    assert len(cells) == 3 * 2 * 3
    for cell in cells:
        assert abs(cell.flops - cell.budget) <= cell.shape.step_flops / 2
        config = SkipstoneConfig.from_plain({"max_position_embeddings": 16, **cell.recipe["model"]})
        cost = SkipstoneForCausalLM(config).cost(tokens=16, batch=2)
        assert cell.shape.step_flops == cost.training.total
        assert cell.recipe["train"]["steps"] == cell.steps
        assert cell.recipe["train"]["warmup_steps"] == round(cell.steps / 5)
        read_recipe(cell.recipe)


def test_an_arm_that_skips_takes_more_steps() -> None:
    grid = Grid(spec())
    dense, mod, random = (grid.cell(arm, 6e7, GridSize(32, 4), 1e-3) for arm in ("dense", "mod", "random"))
    assert mod.steps == random.steps > 1.2 * dense.steps
    assert dense.recipe["model"]["mechanisms"] == []
    assert [entry["decision"] for entry in random.recipe["model"]["mechanisms"]] == ["random"]
    assert mod.recipe["model"]["mechanisms"] == [MOD]


def test_heads_follow_the_width_and_keep_their_size() -> None:
    model = {**RECIPE["model"], "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
    grid = Grid(spec({**RECIPE, "model": model}, sizes=["16", "32"]))
    made = grid.shape("dense", GridSize(32, 2)).model
    assert (made["num_attention_heads"], made["num_key_value_heads"], made["head_dim"]) == (8, 4, 4)
    assert made["intermediate_size"] == 80
    with pytest.raises(ValueError, match=r"multiple of 8, because heads keep their size \(4\) and 2 share"):
        Grid(spec({**RECIPE, "model": model}, sizes=["36"]))


@pytest.mark.parametrize(
    ("word", "found"),
    [("128", GridSize(128, 6)), ("128x4", GridSize(128, 4)), (" 64x2 ", GridSize(64, 2)), (96, GridSize(96, 6))],
)
def test_sizes(word: object, found: GridSize) -> None:
    assert parse_size(word, 6) == found


@pytest.mark.parametrize("word", ["", "x4", "64x", "0", "64x0", "-64", "64y4", "64.5", "64x4x2"])
def test_what_is_no_size(word: str) -> None:
    with pytest.raises(ValueError, match=r"is neither WIDTH nor WIDTHxBLOCKS"):
        parse_size(word, 6)


OTHERS = {
    "swiglu": None,
    "mixed": {"activation": {"name": "fixed_mix", "groups": {"silu": 0.5, "tanh": 0.5}}},
    "wide": {"intermediate_size": 96},
}


def test_a_recipe_may_name_its_arms() -> None:
    """Each is the recipe's model with changes, at every size; the first one is what others are held against."""
    found = spec({**RECIPE, "arms": OTHERS})
    assert (found.arms, found.base) == (["swiglu", "mixed", "wide"], "swiglu")
    assert "arms" not in found.recipe
    assert spec({**RECIPE, "arms": OTHERS}, arms=["wide", "mixed"]).base == "wide"
    assert spec({**RECIPE, "arms": {"other": {}, "dense": {}}}).base == "dense"
    grid, size = Grid(found), GridSize(32, 2)
    assert grid.shape("swiglu", size).model["mechanisms"] == [MOD]
    assert grid.shape("wide", size).model["intermediate_size"] == 192
    plain, mixed = (grid.shape(arm, size) for arm in ("swiglu", "mixed"))
    assert (plain.parameters, plain.step_flops) == (mixed.parameters, mixed.step_flops)
    assert from_dict(GridSpec, found.to_dict(), "plan") == found


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ([], "arms must be a mapping of names to changes of the model"),
        ({"a": [1]}, r"arms.a must be a mapping, changes of the model, got \[1\]"),
        ({"a": {"hidden_size": 3}}, "arms.a changes hidden_size, but sizes are the grid's"),
        ({"a": {"actvation": "relu"}}, "did you mean 'activation'"),
    ],
)
def test_arms_that_cannot_be(arms: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Grid(spec({**RECIPE, "arms": arms}))
    assert "\n" not in str(caught.value)


def test_arms_follow_from_the_recipe() -> None:
    tsa = {"name": "token_selective"}
    assert list(arms_of({})) == ["dense"]
    assert list(arms_of({"model": {"mechanisms": [tsa]}})) == ["dense", "routed"]
    assert list(arms_of({"model": {"mechanisms": [MOD, tsa]}})) == ["dense", "routed", "random"]
    assert list(arms_of({"model": {"mechanisms": [{**MOD, "decision": "random"}]}})) == ["dense", "mod"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budgets": []}, "budgets must be at least one value"),
        ({"budgets": [1e9, 1e9]}, "none twice"),
        ({"budgets": [-1.0]}, "budgets must be above 0, got -1"),
        ({"rates": [float("nan")]}, "rates must be above 0, got nan"),
        ({"sizes": ["16", "16x2"]}, "sizes must be at least one value, none twice; got 16x2, 16x2"),
        ({"arms": ["dnese"]}, "unknown arm of this recipe 'dnese'; did you mean 'dense'"),
        ({"scale": "papr"}, "did you mean 'paper'"),
        ({"optimum_seeds": 0}, "optimum_seeds must be from 1 to 1,000"),
        ({"optimum_seeds": 10**9}, "optimum_seeds must be from 1 to 1,000, got 1,000,000,000"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_what_a_spec_refuses(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        spec(**given)
    assert "\n" not in str(caught.value)


def test_a_budget_below_one_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r"budget 100000 is less than one step of dense 16x2, which takes"):
        Grid(spec(budgets=[1e5])).everything()


def test_an_arm_without_a_causal_form_is_refused() -> None:
    recipe = {**RECIPE, "model": {**RECIPE["model"], "mechanisms": [{**MOD, "decision": "topk"}]}}
    with pytest.raises(ValueError, match="arm 'mod' has no causal loss to compare"):
        Grid(spec(recipe)).everything()


def test_rates_are_tried_alike_by_every_arm() -> None:
    grid = Grid(spec(rate_rule="inverse_width"))
    assert [str(size) for size in grid.sizes] == ["16x2", "24x2", "32x4"]
    assert grid.middle == GridSize(24, 2)
    for arm in grid.spec.arms:
        assert [(c.rate, c.budget, c.size) for c in grid.sweep(arm)] == [(r, 2e7, grid.middle) for r in (1e-3, 2e-3)]
    assert {c.rate for c in grid.cells("mod", 2e-3) if c.size == grid.middle} == {2e-3}
    assert {c.rate for c in grid.cells("mod", 2e-3) if c.size.width == 16} == {3e-3}
    assert {c.rate for c in Grid(spec()).cells("mod", 2e-3)} == {2e-3}


def test_text_is_read_once_unless_that_is_allowed() -> None:
    grid = Grid(spec())
    most = max(cell.steps for cell in grid.everything()) * 2 * 16
    check_once(grid, CorpusFacts(tokens=most))
    with pytest.raises(ValueError, match=r"it would see text 1\.\d times.*--allow-repeats") as caught:
        check_once(grid, CorpusFacts(tokens=most - 16))
    assert "\n" not in str(caught.value)
    allowed = Grid(spec(allow_repeats=True))
    check_once(allowed, CorpusFacts(tokens=100))
    cell = grid.everything()[0]
    assert cell.recipe["data"]["sampling"] == "once"
    assert "sampling" not in allowed.everything()[0].recipe["data"]
    assert corpus_share(grid, cell, CorpusFacts(tokens=cell.steps * 64)) == 0.5


def test_the_corpus_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a stone that skips over water\n" * 60, encoding="utf-8")
    facts = read_corpus(DataConfig(corpus=f"text:{path}", tokenizer="byte", context=16))
    assert (facts.vocab_size, facts.tokens) == (258, 1620)
    assert facts.data is not None
    assert facts.sha256 == read_corpus(DataConfig(corpus=f"text:{path}", tokenizer="byte", context=8)).sha256
    assert "was not read" in read_corpus_if_cheap(DataConfig(corpus="hf:nobody/nothing")).trouble
    with pytest.raises(ValueError, match=r"was not read; set model\.vocab_size"):
        with_vocabulary(spec({**RECIPE, "model": {}}, sizes=["64"]), CorpusFacts(trouble="corpus x was not read"))


def test_an_estimate_names_every_run() -> None:
    grid = Grid(spec(budgets=[2e7], rates=[1e-3]))
    estimate = GridEstimate(grid=grid, facts=CorpusFacts(tokens=10_000), step_times=step_times(grid))
    runs, total = estimate.sections()
    assert len(runs.rows) == 9
    assert [row[0] for row in total.rows][-1] == "all"
    assert total.rows[-1][1] == str(9 + 3 * 2)  # no rate to try; two more seeds for each arm
    assert all(estimate.seconds(cell) > 0 for cell in grid.everything())
    assert not any("~" in cell for row in runs.rows for cell in row)


def test_an_estimate_for_another_machine_is_flops_by_speed() -> None:
    grid = Grid(spec())
    estimate = GridEstimate(grid=grid, facts=CorpusFacts(), step_times=step_times_at(grid, 1e6), source="made")
    for cell in grid.everything():
        assert estimate.seconds(cell) == pytest.approx(cell.flops / 1e6)
    with pytest.raises(ValueError, match="must be above 0"):
        step_times_at(grid, 0.0)


@pytest.mark.slow
def test_the_papers_grid_is_a_recipe() -> None:
    recipe = yaml.safe_load((RECIPES / "isoflop-paper.yaml").read_text(encoding="utf-8"))
    grid = Grid(make_spec(recipe, scale="paper"))
    parameters = [grid.shape("dense", size).parameters for size in grid.sizes]
    assert grid.budgets == [6e18, 2e19, 1e20]
    assert 5e7 < parameters[0] < 7e7
    assert 2.7e9 < parameters[-1] < 3.3e9
    assert any(2.1e8 < count < 2.3e8 for count in parameters)  # the 220M model that the paper speaks of
    assert all(abs(cell.flops / cell.budget - 1) < 0.01 for cell in grid.everything())


@pytest.mark.parametrize(("value", "text"), [(6e18, "6e18"), (1.5e12, "1.5e12"), (250.0, "250")])
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.2, "3 s"), (150, "2.5 min"), (9000, "2.5 h"), (864_000, "10.0 d"), (157_788_000, "5.0 y")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
