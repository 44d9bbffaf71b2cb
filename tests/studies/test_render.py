"""Rendering is a pure function of the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skipstone_studies.page import command, groups, lookup, mean_and_spread, render, terminal
from skipstone_studies.record import Record, digest, read, read_all, write
from skipstone_studies.study import Column, Study

ENVIRONMENT = {
    "skipstone": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "python": "3.12.1",
    "git_commit": "0123456789abcdef",
    "git_dirty": False,
    "machine": {"cpu": "A CPU", "cores": 2, "threads": 1, "gpu": None},
}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"model": {}, "data": {"corpus": "c"}},
    "mod": {"model": {"a": 1}, "data": {}},
}


def study(**options: Any) -> Study:
    given: dict[str, Any] = {
        "name": "e",
        "purpose": "a purpose",
        "about": "All about it.",
        "arms": lambda scale: ARMS,
        "seeds": {"laptop": (0, 1), "paper": (0,)},
        "columns": (
            Column(key="loss", title="loss", better="low"),
            Column(key="speed.decode 1", title="speed (k)", format=",.1f", unit=1e3, better="high", relative=True),
        ),
    }
    return Study(**{**given, **options})


def record(arm: str, seed: int, loss: float | None, speed: float, **changes: Any) -> Record:
    given: dict[str, Any] = {
        "study": "e",
        "scale": "laptop",
        "arm": arm,
        "seed": seed,
        "config": ARMS[arm],
        "digest": digest(ARMS[arm]),
        "environment": ENVIRONMENT,
        "command": "skipstone reproduce e --scale laptop",
        "figures": {"loss": loss, "speed": {"decode 1": speed}},
        "timing_session": {"time": f"t{seed}", "arms": ["dense", "mod"]},
    }
    return Record(**{**given, **changes})


RECORDS = [
    record("mod", 1, 1.2, 3000.0),
    record("dense", 0, 2.0, 1000.0),
    record("mod", 0, 1.0, 2000.0),
    record("dense", 1, 2.2, 1000.0),
]


def test_the_whole_page() -> None:
    assert render(study(), RECORDS) == (
        "# e\n\n"
        "a purpose\n\n"
        "All about it.\n\n"
        "## laptop, c\n\n"
        "| arm | loss | speed (k) |\n"
        "| --- | ---: | ---: |\n"
        "| dense | 2.100 ± 0.141 | 1.0 ± 0.0 |\n"
        "| mod | **1.100 ± 0.141** | **2.5 ± 0.7 (2.50×)** |\n\n"
        "2 seeds (0, 1). Mean ± standard deviation over seeds.\n\n"
        "`skipstone reproduce e --scale laptop --seeds 0,1`\n\n"
        "Made with skipstone 0.1.0, torch 2.13.0, transformers 5.23.0, python 3.12.1, commit 0123456789ab, "
        "on A CPU, 2 cores, 1 threads.\n"
    )


def test_the_order_of_records_does_not_matter_and_files_give_the_same_bytes(tmp_path: Path) -> None:
    page = render(study(), RECORDS)
    assert render(study(), RECORDS[::-1]) == page
    for entry in RECORDS:
        write(entry, tmp_path)
    assert render(study(), read_all(tmp_path, "e")) == page


def test_scales_are_tables_of_their_own() -> None:
    page = render(study(), [*RECORDS, record("dense", 0, 9.0, 1.0, scale="paper")])
    assert page.index("## laptop") < page.index("## paper")


def test_what_another_configuration_gave_is_left_out_and_counted() -> None:
    page = render(study(), [*RECORDS, record("dense", 2, 9.0, 1.0, digest="0" * 16)])
    assert "2 seeds" in page
    assert page.endswith("1 records of other configurations are left out.\n")


def test_missing_figures_and_seeds_are_shown_as_missing() -> None:
    page = render(study(), [*RECORDS[1:3], record("dense", 1, None, 1.0)])
    assert "| dense | 2.000 |" in page
    assert "Fewer seeds so far: mod 1." in page


def test_speeds_of_different_sittings_are_marked() -> None:
    late = record("mod", 0, 1.0, 1.0, timing_session={"time": "later", "arms": ["mod"]})
    assert "not all timed in one session" in render(study(), [RECORDS[1], late])
    assert "not all timed in one session" not in render(study(), RECORDS)


def test_corpora_are_tables_of_their_own() -> None:
    either = study(corpora=("c", "d"))
    found = []
    for corpus in ("d", "c"):
        recipe = either.recipes("laptop", corpus)["dense"]
        found.append(record("dense", 0, 1.0, 1.0, config=recipe, digest=digest(recipe)))
    assert [group[0].config["data"]["corpus"] for group in groups(either, found)] == ["c", "d"]


def test_figures_that_follow_from_other_arms_are_derived_seed_by_seed() -> None:
    def gap(figures: Any) -> Any:
        return {"mod": {"gap": figures["mod"]["loss"] - figures["dense"]["loss"]}}

    page = render(study(derive=gap, columns=(Column(key="gap", title="gap", format="+.2f"),)), RECORDS)
    assert "| dense | – |" in page
    assert "| mod | -1.00 ± 0.00 |" in page or "| mod | -1.00 ± +0.00 |" in page


def test_details_see_every_seed_of_each_arm() -> None:
    def losses(figures: Any) -> str:
        return str({arm: {seed: found["loss"] for seed, found in seeds.items()} for arm, seeds in figures.items()})

    page = render(study(details=losses), RECORDS)
    assert "{'dense': {0: 2.0, 1: 2.2}, 'mod': {0: 1.0, 1: 1.2}}" in page


def test_the_terminal_has_arms_as_columns() -> None:
    section = terminal(study(), next(iter(groups(study(), RECORDS))))
    assert section.columns == ["", "dense", "mod"]
    assert section.rows[-1] == ["  × dense", "", "2.50"]


@pytest.mark.parametrize(
    ("values", "form", "text"),
    [([], ".1f", "–"), ([1.25], ".2f", "1.25"), ([1.0, 3.0], ".1f", "2.0 ± 1.4"), ([1000.0], ",d", "1,000")],
)
def test_mean_and_spread(values: list[float], form: str, text: str) -> None:
    assert mean_and_spread(values, form) == text


@pytest.mark.parametrize(
    ("key", "value"), [("a.b", 1.5), ("a.c", None), ("x", None), ("a", None), ("nan", None), ("text", None)]
)
def test_lookup(key: str, value: float | None) -> None:
    assert lookup({"a": {"b": 1.5, "c": None}, "nan": float("nan"), "text": "no"}, key) == value


def test_the_command_names_all_seeds() -> None:
    assert command(RECORDS) == "skipstone reproduce e --scale laptop --seeds 0,1"


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = write(RECORDS[0], tmp_path)
    assert path == tmp_path / "e" / "records" / "laptop" / "mod-seed1.json"
    assert read(path) == RECORDS[0]


@pytest.mark.parametrize("text", ["{", "{}", '{"experiment": 1}', "[]"])
def test_a_file_that_is_no_record_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is no record"):
        read(path)


def test_the_digest_ignores_the_order_of_keys_alone() -> None:
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
