"""The ledger sums over records, and the README of the results agrees with the records beside it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from skipstone.evaluate.tables import Section
from skipstone_cli.errors import one_line_errors
from skipstone_cli.main import main
from skipstone_studies import ledger, ledger_page
from skipstone_studies.ledger_charts import forest, hours
from skipstone_studies.record import Record, digest, write
from skipstone_studies.study import Study
from studies.kept_records import read_all

RESULTS = Path(__file__).resolve().parents[2] / "results"
MACHINE: dict[str, Any] = {"cpu": "A CPU", "cores": 2, "threads": 2, "gpu": None}


def record(**figures: Any) -> Record:
    return Record(
        study="tiny",
        scale="laptop",
        arm="dense",
        seed=0,
        config={},
        digest=digest({}),
        environment={"machine": MACHINE},
        command="skipstone reproduce tiny",
        figures=figures,
    )


TRAINED = {"tokens": 1000, "seconds": 7200.0, "parameters": 500}


def test_flops_are_three_forward_passes_and_hours_those_of_all_threads() -> None:
    found = ledger.compute_of(record(training=TRAINED, evaluation={"flops_per_token": {"counted": 1e6}}))
    assert found == ledger.Compute(tokens=1000, hours=4.0, flops=3e9, parameters=500, gpu=False)


def test_a_grid_has_counted_its_flops_itself() -> None:
    figures = {"training": TRAINED, "training_flops": {"executed": 7e9}}
    found = ledger.compute_of(record(**figures, evaluation={"flops_per_token": {"counted": 1e6}}))
    assert found is not None
    assert found.flops == 7e9


def test_hours_of_a_gpu_are_not_multiplied_by_threads() -> None:
    on_gpu = replace(record(training=TRAINED), environment={"machine": {**MACHINE, "gpu": "A GPU"}})
    found = ledger.compute_of(on_gpu)
    assert found is not None
    assert (found.gpu, found.hours, found.flops) == (True, 2.0, None)


def test_a_timing_took_no_training() -> None:
    assert ledger.compute_of(record(seconds={"dense": 1.0})) is None


def test_rows_are_sums(tmp_path: Path) -> None:
    """Two runs of 3e9 FLOPs in 4 core hours each, and a record of a timing."""
    figures = {"training": TRAINED, "evaluation": {"flops_per_token": {"counted": 1e6}}}
    for seed in (0, 1):
        write(replace(record(**figures), seed=seed), tmp_path)
    write(replace(record(speed=1.0), seed=2), tmp_path)
    table = ledger.compute(tmp_path)
    assert "| tiny | 3 | 2 | 8.00 | – | 6.0e+09 | 0.0 | 0.00 M, 0.001 M |" in table
    assert "| **all** | 3 | 2 | 8.00 | – | 6.0e+09 | 0.0 | 0.00 M, 0.001 M |" in table


@pytest.fixture(scope="module")
def published() -> tuple[Section, list[ledger.Judged]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipstone_studies.record.read_all", read_all)
        return ledger.compute_section(RESULTS), ledger.judged(RESULTS)


def test_the_readme_shows_the_ledgers_of_the_records_beside_it(published: Any) -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    costs, found = published
    for name, section in ((ledger.COMPUTE, costs), (ledger.CLAIMS, ledger.claims_section(found))):
        shown = text.partition(f"<!-- {name}:begin -->\n")[2].partition(f"\n<!-- {name}:end -->")[0]
        assert shown == ledger.without_title(section), "run `skipstone reproduce --ledger --out results`"
        assert shown.count("\n") > 20


def test_the_page_draws_the_ledger_of_the_records_beside_it(published: Any) -> None:
    costs, found = published
    claims = ledger.claims_section(found)
    page = ledger_page.render(costs, claims, ledger.by_study(found))
    made = (RESULTS / ledger.PAGE).read_text(encoding="utf-8")
    assert made == page, "run `skipstone reproduce --ledger --out results`"
    pictures = re.findall(r"<svg viewBox.*?</svg>", page, re.DOTALL)
    assert len(pictures) == page.count('<details class="numbers">') == 2 + len(claims.rows)
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
    assert len(page.encode()) < 1_000_000


def test_a_forest_has_an_interval_for_each_arm_and_the_limit_of_the_claim() -> None:
    decided = ledger.Claim(arm="<a>", text="t", found="-1", verdict="yes", estimate=-1.0, ends=(-1.5, -0.5), limit=0.2)
    alone = ledger.Claim(arm="b", text="t", found="2, one seed", verdict="inconclusive", estimate=2.0, limit=0.2)
    drawn = forest([decided, alone], "study: t")
    root = ElementTree.fromstring(drawn)
    lines = [line for line in root.findall("line") if line.get("stroke")]
    (low, high), (mark,) = sorted(float(lines[0].get(x, 0)) for x in ("x1", "x2")), root.findall("line[@class='mark']")
    first, second = root.findall("circle")
    assert len(lines) == 1
    assert low < float(first.get("cx", 0)) < high < float(mark.get("x1", 0)) < float(second.get("cx", 0))
    assert second.get("fill") == "var(--card)", "hollow: not decided"
    assert drawn.rows == [("<a>", "yes", "-1", "0.2"), ("b", "inconclusive", "2, one seed", "0.2")]


def test_the_bars_are_the_core_hours_of_studies_wherever_the_column_is() -> None:
    rows = [["a", "9", "1.50"], ["b", "8", "–"], ["**all**", "17", "1.50"]]
    drawn = hours(Section(title="t", columns=["study", "GPU hours", "core hours"], rows=rows))
    assert drawn.rows == [("a", "1.50")]
    assert "a: 1.50 core hours" in drawn
    with pytest.raises(ValueError, match="core hours"):
        hours(Section(title="t", columns=["study", "GPU hours"], rows=[]))


def test_claims_are_gathered_by_their_text(tiny: Any, tmp_path: Path) -> None:
    def judged(figures: Any) -> Any:
        texts: dict[str, ledger.Verdict] = {"dense": "yes", "mod": "no"}
        return [ledger.Claim(arm=arm, text="it is small", found="1", verdict=word) for arm, word in texts.items()]

    study: Study = tiny(claims=judged)
    for arm, recipe in study.recipes("laptop").items():
        made = record(training=TRAINED, evaluation={"flops_per_token": {"counted": 1e6}})
        write(replace(made, arm=arm, config=recipe, digest=digest(recipe)), tmp_path)
    table = ledger.claims(tmp_path)
    assert "| tiny | it is small | yes (dense), no (mod) | 1 | 0.001 M | 6.0e+09 | another scale |" in table


@pytest.mark.parametrize(
    ("words", "says"), [(["demo"], "takes neither a name nor --list"), ([], "has no place for the table")]
)
def test_a_mistake_is_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("nothing", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["skipstone", "reproduce", *words, "--ledger", "--out", str(tmp_path)])
    with pytest.raises(SystemExit), one_line_errors():
        main()
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
