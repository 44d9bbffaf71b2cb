"""Overrides take precedence over the recipe, are parsed as YAML, and are refused clearly if they do not fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from skipstone_cli.errors import UserError
from skipstone_cli.overrides import load_recipe, split

RECIPE = """
seed: 1
model:
  hidden_size: 64
  mechanisms:
    - {name: mixture_of_depths, capacity: 0.5}
    - {name: early_exit}
train: {steps: 10, warmup: "${.steps}"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "way", "value"),
    [
        ([], ["seed"], 1),
        (["seed=2"], ["seed"], 2),
        (["seed=2", "seed=3"], ["seed"], 3),
        (["train.lr=1e-3"], ["train", "lr"], 1e-3),
        (["train.bf16=true"], ["train", "bf16"], True),
        (["train.out=null"], ["train", "out"], None),
        (["train.note=a=b"], ["train", "note"], "a=b"),
        (["train.note="], ["train", "note"], None),
        (["train.steps=20"], ["train", "warmup"], 20),
        (["model.layers=[1,3]"], ["model", "layers"], [1, 3]),
        (["model.mechanisms.0.capacity=0.25"], ["model", "mechanisms", 0, "capacity"], 0.25),
        (["model.mechanisms.0.capacity=0.25"], ["model", "mechanisms", 0, "name"], "mixture_of_depths"),
        (["model.mechanisms[1].name=polyglu"], ["model", "mechanisms", 1, "name"], "polyglu"),
        (["model.mechanisms.0.layers=9:"], ["model", "mechanisms", 0, "layers"], "9:"),
        (["model.mechanisms.0.layers=1::2"], ["model", "mechanisms", 0, "layers"], "1::2"),
        (["model.mechanisms.0.layers=2:6"], ["model", "mechanisms", 0, "layers"], "2:6"),  # base 60 in YAML: 126
        (["model.mechanisms.0.layers=:"], ["model", "mechanisms", 0, "layers"], ":"),
        (["model.mechanisms=[]"], ["model", "mechanisms"], []),
        (["model.activation.name=polyglu"], ["model", "activation"], {"name": "polyglu"}),
        (["model.activation={name: polyglu}"], ["model", "hidden_size"], 64),
    ],
)
def test_the_command_line_wins(recipe: Path, words: list[str], way: list[Any], value: Any) -> None:
    found: Any = load_recipe(recipe, words)
    for step in way:
        found = found[step]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["seed", "=1", "", ".seed=1", "seed.=1", "a..b=1", "se ed =1", " seed=1"])
def test_a_malformed_override_is_named(recipe: Path, word: str) -> None:
    with pytest.raises(UserError, match="does not have the form key=value"):
        load_recipe(recipe, [word])


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("seed.x=1", "seed is 1 and has no keys"),
        ("model.mechanisms.2.capacity=1", "model.mechanisms is a list of 2"),
        ("model.mechanisms.first.capacity=1", "model.mechanisms is a list of 2"),
        ("model.mechanisms.-1.capacity=1", "model.mechanisms is a list of 2"),
        ("model.mechanisms[2].capacity=1", r"model.mechanisms\[2\].capacity=1"),
        ("model.mechanisms.2=1", "model.mechanisms is a list of 2"),
        ("seed=[1", "the value is not YAML"),
        ("seed=010", "the value is not YAML .*to base 8"),
        ("model.layers=[2:6]", "the value is not YAML .*YAML reads 2:6 as a number to base 60; quote it"),
        ("seed=${absent}", "absent"),
    ],
)
def test_an_override_that_fits_nowhere_is_named(recipe: Path, word: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_recipe(recipe, [word])


@pytest.mark.parametrize("text", ["seed: [1", "- 1\n- 2\n", "seed: 1\nseed: 2\n", "a: ???\n", "\0"])
def test_a_bad_recipe_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        load_recipe(path, [])


def test_all_overrides_that_fit_nowhere_are_named(recipe: Path) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(recipe, ["seed", "seed.x=1", "train.steps=3", "model.mechanisms.2.x=1"])
    assert len(error.value.lines) == 3


@pytest.mark.parametrize(
    "text", ["just a text", "a: " + 200 * "[" + 200 * "]", "".join(" " * i + f"k{i}:\n" for i in range(500))]
)
def test_odd_recipes_are_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"odd\.yaml") as error:
        load_recipe(path, [])
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("words", "warmup", "said"),
    [
        (["train.steps=20"], 2, "train.warmup_steps is set to 2 of 20 steps, the same share as the recipe's 60 of 600"),
        (["train.steps=100"], 60, ""),
        (["train.steps=20", "train.warmup_steps=30"], 30, ""),
    ],
)
def test_a_shortened_training_has_a_shorter_warmup(
    words: list[str], warmup: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {steps: 600, warmup_steps: 60}\n", encoding="utf-8")
    assert load_recipe(path, words)["train"]["warmup_steps"] == warmup
    assert said in capsys.readouterr().err


def test_split_keeps_further_equals_signs() -> None:
    assert split("a.b=c=d") == ("a.b", "c=d")


@pytest.mark.parametrize(("number", "base"), [("2:6", 60), ("1:30.5", 60), ("-12:30:45", 60), ("0777", 8)])
def test_a_number_in_disguise_is_refused(number: str, base: int, tmp_path: Path) -> None:
    """A range of blocks without quotes was another block in silence."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"a: 1\nlayers: {number}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"line 2: YAML reads {number} as a number to base {base}; quote it"):
        load_recipe(path, [])
    path.write_text(f"layers: '{number}'\nnote: {number}x\nblocks: 0\n", encoding="utf-8")
    assert load_recipe(path, []) == {"layers": number, "note": f"{number}x", "blocks": 0}


def test_what_is_no_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    for path, kind in ((tmp_path, "a folder"), (Path(os.devnull), "a device or a pipe")):
        with pytest.raises(UserError, match=f"is {kind}, but a file is expected"):
            load_recipe(path, [])


@pytest.mark.parametrize("text", ["", " \n\n", "# a recipe\n  # of nothing\n"])
def test_a_recipe_without_anything_is_not_the_default_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="is empty; for the defaults alone"):
        load_recipe(path, ["train.steps=3"])
    path.write_text("{}")
    assert load_recipe(path, ["train.steps=3"]) == {"train": {"steps": 3}}


def test_several_lines_of_text_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("a stone that skips\nover water\n" * 5)
    with pytest.raises(UserError, match="must be a mapping of keys to values"):
        load_recipe(path, [])
