"""Progress: lines with the time left where there is no terminal, a bar where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from skipstone.core import progress_bar
from skipstone.core.progress_bar import ProgressBar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress_bar, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_with_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(10_000, "tokens", done=1000) as bar:
        for clock[0], done in ((1.0, 1100), (9.0, 1900), (30.0, 4000), (31.0, 4100), (90.0, 10_000)):
            bar.update(done, f"loss {done}")
    assert capsys.readouterr().err.splitlines() == [
        "4,000 of 10,000 tokens  loss 4000  1:00 left",
        "10,000 of 10,000 tokens  loss 10000",
    ]


def test_what_an_earlier_process_did_is_no_measure_of_speed(clock: list[float]) -> None:
    bar = ProgressBar(100, "steps", done=50)
    assert bar.left() == ""
    clock[0] = 3600.0
    bar.update(60)
    assert bar.left() == "4:00:00 left"


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)
    with ProgressBar(9, "rows") as bar:
        bar.update(4, "loss 2.5")
        bar.line()
    bar.close()
    shown = capsys.readouterr().err
    assert "\u2501" in shown
    assert "4 of 9 rows  loss 2.5" in shown


@pytest.fixture
def shown() -> Iterator[None]:
    progress_bar.show()
    yield
    progress_bar.show(False)


@pytest.mark.usefixtures("shown")
def test_work_inside_of_work_is_a_part_of_it(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar.work(20, "rows"):
        for _ in range(2):
            clock[0] += 30.0
            with progress_bar.work(3, "timings"):
                progress_bar.advance("timings", note="another unit")
            progress_bar.advance("runs", note="not what is counted here")
            progress_bar.advance("rows", 10, "loss 1.5")
    assert capsys.readouterr().err.splitlines() == ["10 of 20 rows  loss 1.5  0:30 left", "20 of 20 rows  loss 1.5"]


@pytest.mark.usefixtures("shown")
def test_each_stage_is_announced_and_an_error_is_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar.stages("reading", "writing") as stage:
        next(stage)
        next(stage)
    assert capsys.readouterr().err.splitlines() == ["stage 1 of 2: reading", "stage 2 of 2: writing", "done"]
    stopped = progress_bar.stages("reading")
    next(stopped.__enter__())
    stopped.__exit__(ValueError, ValueError("torn"), None)
    assert capsys.readouterr().err.splitlines() == ["stage 1 of 1: reading"]
    assert not progress_bar._begun


def test_nothing_is_shown_unless_the_process_asks_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar.work(2, "rows"):
        progress_bar.advance("rows", 2)
    progress_bar.say("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("shown")
def test_only_the_first_of_several_processes_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    progress_bar.show()
    progress_bar.say("a line")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("shown")
def test_a_total_that_is_not_known(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar.work(None, "documents"):
        clock[0] = 11.0
        progress_bar.advance("documents", 1200, "3 tokens")
    assert capsys.readouterr().err == "1,200 documents  3 tokens\n"
