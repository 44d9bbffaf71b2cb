"""Progress: lines with the time left where there is no terminal, a bar where there is one."""

from __future__ import annotations

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
    assert "4/9" in shown
    assert "loss 2.5" in shown
    assert "rows" not in shown, "lines are for where there is no bar"
