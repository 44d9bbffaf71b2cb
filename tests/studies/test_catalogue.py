"""Registered studies agree with their names and files, and published pages render again from their records."""

from __future__ import annotations

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from skipstone.adapt.adapt_recipe import read_recipe as read_adapt_recipe
from skipstone.train.recipe import read_recipe
from skipstone.train.setup import model_config
from skipstone.train.training import train
from skipstone_studies import record as records
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.isoflop.run import PLAN
from skipstone_studies.page import lookup, pictures, render
from skipstone_studies.quality.reset_s3 import JUDGED, captured, interpolate
from skipstone_studies.study import SCALES, Study, seeded
from skipstone_studies.timing import training_speeds
from studies.kept_records import read_all

RESULTS = Path(__file__).resolve().parents[2] / "results"
ALL = [(name, scale) for name, e in STUDIES.items() for scale in e.seeds]


@pytest.mark.parametrize("name", STUDIES)
def test_names_and_scales(name: str) -> None:
    assert STUDIES[name].name == name
    assert set(STUDIES[name].seeds) <= set(SCALES)
    assert "laptop" in STUDIES[name].seeds


@cache  # scales and variants of a study share most models
def built(model: str) -> object:
    return model_config(json.loads(model), 64, {"vocab_size": 64})


@pytest.mark.parametrize(
    ("name", "scale"), [pytest.param(*each, marks=pytest.mark.slow if each[1] == "paper" else ()) for each in ALL]
)
def test_every_recipe_can_be_built(name: str, scale: str) -> None:
    for arms in STUDIES[name].variants(scale):
        assert len(arms) > 1 or name in ("full_size", "released")
        for recipe in arms.values():
            seed = seeded(recipe, 1)
            parts = {part: seed[part] for part in ("model", "data", "train", "adapt") if part in seed}
            if "adapt" in recipe:
                read_adapt_recipe({**parts, "data": {"corpus": "wikitext-2", **parts["data"]}})
            elif "train" in recipe:
                read_recipe(parts)
                built(json.dumps(recipe["model"]))


@pytest.mark.parametrize(("name", "scale"), ALL)
def test_recipes_are_fresh_values(name: str, scale: str) -> None:
    first, study = STUDIES[name].recipes(scale), STUDIES[name]
    next(iter(first.values())).clear()
    assert next(iter(study.recipes(scale).values()))


PAGES = sorted(path.stem for path in RESULTS.glob("*.md") if path.stem != "README")
STUDY_PAGES = [name for name in PAGES if not (RESULTS / name / PLAN).is_file()]  # isoFLOP studies have a test of theirs


@cache
def drawn(name: str) -> dict[str, str]:
    return pictures(STUDIES[name], read_all(RESULTS, name))


@pytest.mark.parametrize("name", STUDY_PAGES)
def test_what_is_published_is_what_its_records_say(name: str) -> None:
    study, found = STUDIES[name], read_all(RESULTS, name)
    page = render(study, found)
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == page
    assert "other configurations are left out" not in page, f"{name}: delete the records of earlier configurations"
    assert {path.name for path in RESULTS.glob("*.svg") if path.name.startswith(f"{name}-")} >= set(drawn(name))
    for file, drawing in drawn(name).items():
        assert (RESULTS / file).read_text(encoding="utf-8") == drawing


def test_every_page_has_records_and_every_record_a_page() -> None:
    assert len(PAGES) >= 35, "pages are missing, so that next to nothing would be compared"
    assert {path.parent.name for path in RESULTS.glob("*/records")} == set(PAGES)
    assert {path.name for path in RESULTS.glob("*.svg")} == {file for name in STUDY_PAGES for file in drawn(name)}
    assert not list(RESULTS.glob("*.json")), "figures belong into records"


def test_the_index_names_every_page() -> None:
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\(([a-z0-9_-]+)\.md\)", index))) == PAGES


def test_converted_records_say_so_and_carry_no_digest() -> None:
    found = [record for name in STUDY_PAGES for record in read_all(RESULTS, name)]
    converted = [record for record in found if record.converted is not None]
    assert all(record.digest == "" and record.converted["commit"] for record in converted)  # type: ignore[index]
    assert all(len(record.digest) == records.DIGEST_LENGTH for record in found if record.converted is None)


SMALL: dict[str, dict[str, Any]] = {
    "demo": {"model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}, "data": {"context": 32}},
    "reset_s3": {"model": {"hidden_size": 16, "num_attention_heads": 2}, "data": {"context": 24}},
}
SMALL["mod_decisions"] = SMALL["mod_decisions_code"] = {
    "model": {"hidden_size": 16, "num_attention_heads": 2},
    "data": {"context": 32, "corpus": "python-stdlib"},
}
SMALL["polyglu_routing"] = {
    **SMALL["mod_decisions"],
    "model": {**SMALL["mod_decisions"]["model"], "num_hidden_layers": 2},
}
SMALL["ffn_groups"] = {**SMALL["mod_decisions"], "model": {**SMALL["mod_decisions"]["model"], "num_hidden_layers": 2}}
STEPS = {
    "log_every": 1,
    "steps": 2,
    "batch_size": 2,
    "warmup_steps": 1,
    "eval_every": 0,
    "save_every": 0,
    "eval_rows": 2,
}


def shrunk(study: Study, arm: str) -> dict[str, Any]:
    """An arm as it is, but for its size."""
    recipe = study.recipes("laptop", next(iter(reversed(study.corpora)), None))[arm]
    small = SMALL[study.name]
    mechanisms = recipe["model"].get("mechanisms")
    model = {**recipe["model"], **small["model"], **({"mechanisms": mechanisms} if mechanisms else {})}
    data = {**recipe["data"], **small["data"], "validation_rows": 4}
    return {"model": model, "data": data, "train": {**recipe["train"], **STEPS}}


@pytest.mark.slow
def test_reset_s3_from_training_to_headroom(tmp_path: Path) -> None:
    study = STUDIES["reset_s3"]
    figures = {}
    for arm in study.recipes("laptop"):
        figures[arm] = study.measure(train(shrunk(study, arm), out=tmp_path / arm, progress=False))
    assert figures["mod-guided"]["flops"] < 2 * figures["dense-4"]["flops"]
    assert set(figures["mod-forced"]["evaluation"]["ways"]) == {"forced"}
    derived = captured(figures)
    assert set(derived) == set(JUDGED)
    assert "16+" not in derived["mod-guided"]["headroom"], "rows so short have nothing in that bin"
    assert "0-3" in derived["mod-guided"]["headroom"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["dense", "ema_threshold"])
def test_mod_decisions_measures_what_it_shows(tmp_path: Path, arm: str) -> None:
    study = STUDIES["mod_decisions"]
    figures = study.measure(train(shrunk(study, arm), out=tmp_path / "run", progress=False))
    shown = {column.title: lookup(figures, column.key) for column in study.columns}
    missing = [title for title, figure in shown.items() if figure is None]
    kept = [column.title for column in study.columns if not column.key.startswith("evaluation")][1:]
    assert missing == ([] if arm != "dense" else kept)


@pytest.mark.slow
def test_ffn_groups_at_equal_flops_beside_teal(tmp_path: Path) -> None:
    study, figures = STUDIES["ffn_groups"], {}
    for arm in ("dense", "narrow 0.4", "groups 0.4", "random 0.6"):
        figures[arm] = study.measure(train(shrunk(study, arm), out=tmp_path / arm, progress=False))
    assert study.derive is not None
    assert study.details is not None
    derived = study.derive(figures)
    shares = {arm: found["mlp_ratio"] for arm, found in derived.items()}
    assert shares == pytest.approx({"dense": 1.0, "narrow 0.4": 0.4, "groups 0.4": 0.4, "random 0.6": 0.6})
    assert derived["dense"]["loss_ratio"] == 0
    page = study.details({arm: {0: found} for arm, found in figures.items()})
    assert "TEAL" in page
    assert "40.0 %" in page
    assert figures["dense"]["teal"]["60%"]["executed"] == pytest.approx(0.6, abs=0.05)


@pytest.mark.slow
def test_polyglu_routing_tells_what_the_routing_came_to(tmp_path: Path) -> None:
    study, figures = STUDIES["polyglu_routing"], {}
    for arm in ("swiglu", "scale 1, noise", "scale 64, quiet"):
        figures[arm] = study.measure(train(shrunk(study, arm), out=tmp_path / arm, progress=False))
    for column in study.columns:
        assert lookup(figures["scale 1, noise"], column.key) is not None, column.key
    assert "diversity" not in figures["swiglu"]
    fresh = figures["scale 1, noise"]
    assert fresh["static_entropy"] == pytest.approx(math.log(4), rel=1e-3), "two steps leave preferences at 0"
    assert fresh["static_entropy"] > figures["scale 64, quiet"]["static_entropy"]
    assert list(fresh["course"]) == ["20%", "40%", "60%", "80%", "100%"]
    assert all(sum(layer.values()) == pytest.approx(1, abs=1e-5) for layer in fresh["neurons"])
    assert study.details is not None
    page = study.details({arm: {0: found} for arm, found in figures.items()})
    assert "| static entropy stays at ln 4" in page
    assert "| scale 64, quiet | 0 |" in page


@pytest.mark.slow
def test_the_demo_from_training_to_speeds(tmp_path: Path) -> None:
    study = STUDIES["demo"]
    runs = {arm: train(shrunk(study, arm), out=tmp_path / arm, progress=False) for arm in study.recipes("laptop")}
    alone = {arm: study.measure(folder) for arm, folder in runs.items()}
    assert study.measure_together is not None
    beside = study.measure_together(runs)
    assert study.details is not None
    assert "def " in study.details({arm: {0: found} for arm, found in alone.items()})
    for column in study.columns:
        for arm in runs:
            steps, at = column.key.split("."), {**alone[arm], **beside[arm]}
            for step in steps:
                at = at[step]
            assert at > 0, (arm, column.key)


@pytest.mark.slow
def test_training_is_timed_in_turns(tmp_path: Path) -> None:
    study = STUDIES["reset_s3"]
    runs = {arm: train(shrunk(study, arm), out=tmp_path / arm, progress=False) for arm in ("dense-2", "mod-forced")}
    speeds = training_speeds(runs, rounds=2)
    assert list(speeds) == list(runs)
    assert all(speed["tokens_per_second"] > 0 and speed["rounds"] == 2 for speed in speeds.values())


@pytest.mark.parametrize(("x", "y"), [(0.0, 1.0), (1.0, 1.0), (1.5, 2.0), (2.0, 3.0), (9.0, 3.0)])
def test_interpolate(x: float, y: float) -> None:
    assert interpolate(x, [(1.0, 1.0), (2.0, 3.0)]) == pytest.approx(y)


def test_headroom_is_measured_at_equal_flops() -> None:
    def arm(flops: float, accuracy: float) -> dict[str, Any]:
        return {"flops": flops, "accuracy": dict.fromkeys(("0-3", "4-7", "8-15", "16+", "all operations"), accuracy)}

    figures = {
        "dense-2": arm(2.0, 0.2),
        "dense-4": arm(4.0, 0.4),
        "mod-guided": arm(3.0, 0.5),
        "mod-random": arm(3.0, 0.3),
        "mod-forced": arm(3.0, 0.7),
    }
    derived = captured(figures)
    assert derived["mod-guided"]["headroom"]["16+"] == pytest.approx(0.5)
    assert derived["mod-random"]["headroom"]["all operations"] == pytest.approx(0.0)
    assert captured({"dense-2": arm(1.0, 0.1)}) == {}
