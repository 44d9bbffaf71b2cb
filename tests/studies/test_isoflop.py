"""A small isoFLOP grid that is really run: interrupted and resumed, and rendered as table and page."""

from __future__ import annotations

import json
import re
import signal
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from skipstone.report.templating import script
from skipstone.train.watch import MetricsFile
from skipstone_cli.errors import one_line_errors
from skipstone_cli.main import main
from skipstone_studies.isoflop import run as runs
from skipstone_studies.isoflop.result import find
from skipstone_studies.isoflop.spec import GridSpec, make_spec
from skipstone_studies.isoflop.table import optima, same
from skipstone_studies.isoflop.table import runs as all_runs
from train.tool import quick

RESULTS = Path(__file__).resolve().parents[2] / "results"
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mechanisms": [{"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "ema_threshold"}],
    },
    "data": {"corpus": "text:text.txt", "tokenizer": "byte", "context": 16},
    "train": {"steps": 10, "batch_size": 2, "warmup_steps": 2, "save_every": 1},
}
COMMAND = "skipstone isoflop tiny.yaml"


def spec(**given: Any) -> GridSpec:
    grid = {
        "budgets": [1.5e7, 3e7],
        "sizes": ["16", "24", "32"],
        "rates": [1e-3, 1e-2],
        "arms": ["dense", "mod"],
        "optimum_seeds": 2,
    }
    return make_spec(RECIPE, **{**grid, **given})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"stone {i} skips over water {i * i} times\n" for i in range(300))
    (tmp_path / "text.txt").write_text(lines, encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the whole tiny experiment, run once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("isoflop")
        monkeypatch.chdir(folder)
        lines = "".join(f"stone {i} skips over water {i * i} times\n" for i in range(300))
        (folder / "text.txt").write_text(lines, encoding="utf-8")
        written = runs.isoflop(spec(), out=Path("out"), runs=Path("runs"), command=COMMAND)
        assert written == [Path("out/tiny.md"), Path("out/tiny.html")]
        yield folder


def record_files(folder: Path) -> dict[str, dict[str, Any]]:
    found = sorted((folder / "out" / "tiny" / "records" / "grid").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in found}


@pytest.mark.slow
def test_what_is_recorded(finished: Path) -> None:
    records = record_files(finished)
    assert len(records) == 2 * (6 + 1 + 2)  # grid, the other rate, another seed at each optimum
    for record in records.values():
        figures = record["figures"]
        cell, flops = figures["cell"], figures["training_flops"]
        assert record["command"] == COMMAND
        assert record["environment"]["torch"]
        assert len(figures["corpus"]["sha256"]) == 64
        assert abs(flops["planned"] - cell["budget"]) <= flops["planned"] / cell["steps"] / 2
        assert 0 < figures["corpus"]["seen"] <= 1
        assert figures["predictions"] > 1000
        if cell["arm"] == "dense":
            assert flops["executed"] == flops["planned"]
            assert figures["forward_flops"] == figures["forward_flops_dense"]
        else:
            assert list(figures["capacity"]) == ["1"]
    timed = [record for record in records.values() if "training_speed" in record["figures"]]
    assert {r["figures"]["cell"]["budget"] for r in timed} == {1.5e7}
    assert len(timed) == 6


@pytest.mark.slow
def test_tables_say_what_the_records_say(finished: Path) -> None:
    findings = find(runs.load(finished / "out", "tiny"))
    records = record_files(finished)
    shown = {(row[2], row[0], row[1], row[5]): row for row in all_runs(findings).rows}
    for record in records.values():
        cell = record["figures"]["cell"]
        if cell["rate"] == findings.collected.chosen[cell["arm"]]:
            row = shown.pop(
                (cell["arm"], "1.5e7" if cell["budget"] == 1.5e7 else "3e7", cell["size"], str(record["seed"]))
            )
            assert row[-2] == f"{record['figures']['loss']:.4f}"
            assert row[3] == f"{cell['parameters']:,}"
    assert not shown
    assert len(optima(findings).rows) == 4
    assert [row[:2] for row in same(findings).rows] == [["1.5e7", "mod"], ["3e7", "mod"]]
    assert findings.noise is not None
    assert (findings.noise.source, findings.noise.degrees) == ("seeds", 4)
    sweep = findings.collected.sweep["mod"]
    assert findings.collected.chosen["mod"] == min(sweep, key=lambda rate: sweep[rate])


class Checked(HTMLParser):
    """Every element that is loaded is closed; nothing is fetched; no script but the one that saves pictures."""

    VOID = {"meta"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attributes}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_is_whole(finished: Path) -> None:
    html = (finished / "out" / "tiny.html").read_text(encoding="utf-8")
    parser = Checked()
    parser.feed(html)
    assert parser.open == []
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [script()["script"]]
    pictures = re.findall(r"<svg viewBox=\"0 0 500.*?</svg>", html, re.DOTALL)
    assert len(pictures) == 2 + 2 + 2  # budgets; budgets against FLOPs; equal seconds and all seconds
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "nan" not in picture
    assert pictures[0].count("<circle") == 6 + 2 * 2  # cells, and the seeds of two of them
    assert "dense optimum" in pictures[2]
    assert "★" in html


@pytest.mark.slow
def test_rendering_again_changes_no_byte(finished: Path) -> None:
    before = {path: path.read_bytes() for path in (finished / "out").glob("tiny.*")}
    assert len(before) == 2
    runs.render(finished / "out", "tiny")
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.slow
def test_nothing_is_trained_twice(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished)

    def never(*args: Any, **kwargs: Any) -> Path:
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "train", never)
    monkeypatch.setattr(runs, "training_speeds", never)
    runs.isoflop(spec(), out=Path("out"), runs=Path("runs"), command=COMMAND)


@pytest.mark.slow
def test_a_killed_grid_goes_on_from_its_checkpoint(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal within the second run; that run goes on from where it was, the first is not repeated."""
    small = {"budgets": [1.2e7], "sizes": ["16"], "rates": [1e-3], "arms": ["dense", "mod"], "optimum_seeds": 1}
    logged, log = [], MetricsFile.on_log

    def stop_in_the_second(self: MetricsFile, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        log(self, args, state, *rest, **kwargs)
        logged.append(state.global_step)
        if state.global_step == 2 and "mod" in str(self.path):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsFile, "on_log", stop_in_the_second)
        with pytest.raises(SystemExit):
            runs.isoflop(spec(**small), out=Path("out"), runs=Path("runs"), command=COMMAND)
    assert [name.partition("-")[0] for name in record_files(here)] == ["dense"]
    assert "Not finished: 1 of the grid's 2 cells" in Path("out/tiny.md").read_text(encoding="utf-8")
    runs.isoflop(spec(**small), out=Path("out"), runs=Path("runs"), command=COMMAND)
    dense, mod = record_files(here).values()
    assert "resumed" not in dense["environment"]
    assert [entry["step"] for entry in mod["environment"]["resumed"]] == [3]
    assert mod["figures"]["training"]["steps"] == mod["figures"]["cell"]["steps"] > 3


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runs.train

    def failing(recipe: dict[str, Any], **options: Any) -> Path:
        if recipe["model"]["hidden_size"] == 24:
            raise ValueError("the training loss was not finite")
        return real(recipe, **options)

    monkeypatch.setattr(runs, "train", failing)
    small = {"budgets": [1.5e7], "rates": [1e-3], "arms": ["dense"], "optimum_seeds": 1}
    with pytest.raises(ValueError, match=r"1 runs failed: tiny, arm 'dense-1.5e7-24x2-lr0\.001', seed 0: the training"):
        runs.isoflop(spec(**small, sizes=["16", "32", "24"]), out=Path("out"), runs=Path("runs"), command=COMMAND)
    assert len(record_files(here)) == 2
    assert "too few sizes" in Path("out/tiny.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--sizes", "64,12q"], "size '12q' is neither WIDTH nor WIDTHxBLOCKS"),
        (["--sizes", "20"], "size '20x2': the width must be a multiple of 8"),
        (["--sizes", "16,,24"], "--sizes must be different values separated by commas"),
        (["--budgets", "1e12,x"], "--budgets must be numbers separated by commas"),
        (["--budgets", "10"], "budget 10 is less than one step of dense 16x2"),
        (["--budgets", "1e9"], "it would see text"),
        (["--rates", "1e-3,1e-3"], "--rates must be different values"),
        (["--arms", "dense,mood"], "unknown arm of this recipe 'mood'; did you mean 'mod'?"),
        (["--estimate", "--render"], "give only one of them"),
        (["--flops-per-second", "1e9"], "--flops-per-second would have no effect"),
        (["--render"], "no isoFLOP study 'tiny' was started there"),
        (["model.hiden_size=3"], "did you mean 'hidden_size'"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], says: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "tiny.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    usual = {"--sizes": "16", "--budgets": "1.5e7", "--rates": "1e-3"}
    given = [word for option, value in usual.items() if option not in words for word in (option, value)]
    monkeypatch.setattr("sys.argv", ["skipstone", "isoflop", "tiny.yaml", *given, *words])
    with pytest.raises(SystemExit) as stop, one_line_errors():
        main()
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not (here / "runs").exists()


def test_the_command_estimates_without_training(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "tiny.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    words = "isoflop tiny.yaml --sizes 16,24 --budgets 1.5e7 --rates 1e-3 --estimate"
    monkeypatch.setattr("sys.argv", ["skipstone", *words.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "24x2" in out
    assert "all runs, one after the other" in out
    assert sorted(path.name for path in here.iterdir()) == ["text.txt", "tiny.yaml"]


PUBLISHED = sorted(path.parent.name for path in RESULTS.glob("*/plan.json"))


def test_plans_are_published() -> None:
    assert len(PUBLISHED) >= 3, "plans are missing, so that next to nothing would be compared"


@pytest.mark.parametrize("name", quick(PUBLISHED, "isoflop"))  # `test_ledger.py` reads the records of all
def test_what_is_published_is_what_its_records_say(name: str) -> None:
    findings = find(runs.load(RESULTS, name))
    assert (RESULTS / f"{name}.md").read_text(encoding="utf-8") == runs.page.as_markdown(findings)
    assert (RESULTS / f"{name}.html").read_text(encoding="utf-8") == runs.page.as_html(findings)
