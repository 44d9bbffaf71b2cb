"""Recipes are parsed strictly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from skipstone.train.recipe import read_recipe, to_dict
from skipstone.train.setup import check_early
from skipstone_studies.isoflop.grid import Grid
from skipstone_studies.isoflop.spec import make_spec

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(set(FOLDER.glob("*.yaml")) - set(FOLDER.glob("adapt-*.yaml")))  # those are read by tests/adapt


def test_defaults_and_round_trip() -> None:
    recipe = read_recipe({})
    assert read_recipe(to_dict(recipe)) == recipe
    full = read_recipe({"name": "a", "model": {"hidden_size": 8}, "train": {"learning_rate": "1e-3", "loggers": []}})
    assert read_recipe(yaml.safe_load(yaml.safe_dump(to_dict(full)))) == full
    assert full.train.learning_rate == 0.001


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "unknown key in Recipe 'modle'; did you mean 'model'"),
        ({"train": {"learningrate": 1}}, "unknown key in train 'learningrate'; did you mean 'learning_rate'"),
        ({"data": {"contex": 8}}, "did you mean 'context'"),
        ({"train": {"steps": 0}}, "train: steps must be at least 1, got 0"),
        ({"train": {"steps": 2.5}}, "train.steps must be int"),
        ({"train": {"seed": -1}}, "seed must not be negative, got -1"),
        ({"train": {"learning_rate": 0}}, "learning_rate must be above 0, got 0"),
        ({"train": {"learning_rate": float("nan")}}, "learning_rate must be above 0, got nan"),
        ({"train": {"weight_decay": float("inf")}}, "weight_decay must be finite, got inf"),
        ({"train": {"weight_decay": float("nan")}}, "weight_decay must not be negative, got nan"),
        ({"train": {"min_lr_ratio": 1.5}}, "min_lr_ratio must be in"),
        ({"train": {"beta2": 1}}, "beta2 must be in"),
        ({"train": {"steps": 10, "warmup_steps": 11}}, r"warmup_steps \(11\) must not exceed steps \(10\)"),
        ({"train": {"batch_size": 6, "gradient_accumulation": 4}}, r"batch_size \(6\) must be a multiple"),
        ({"train": {"precision": "fp16"}}, "unknown train.precision 'fp16'"),
        ({"train": {"loggers": ["tensorbord"]}}, "unknown loggers 'tensorbord'; did you mean 'tensorboard'"),
        ({"train": {"log_every": 0}}, "log_every must be at least 1"),
        (
            {"train": {"routing": "difficulty"}},
            "'difficulty' needs a corpus of known difficulty .*, got 'tiny-shakespeare'",
        ),
        ({"name": "a/b"}, "name must be the name of a folder, got 'a/b'"),
        ({"train": []}, "train must be a mapping"),
    ],
)
def test_a_wrong_value_is_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem == "activations" else ())
        for path in RECIPES
    ],
)
def test_every_recipe_that_we_ship_can_be_built(path: Path) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "arms" in values:
        with pytest.raises(ValueError, match="a recipe with arms is a comparison: run it by `skipstone isoflop`"):
            read_recipe(values)
        Grid(make_spec(values)).everything()
        values.pop("arms")
    recipe = read_recipe(values)
    check_early(recipe)
    assert recipe.name == path.stem


def test_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"dense", "mod", "tsa", "polyglu", "early_exit", "all", "reset-s3"}
