"""A short version of `kills.py`: commands that are killed between two file operations resume without a difference."""

from __future__ import annotations

from pathlib import Path

import pytest

from kills import NAMES, Scenario, attack, forked


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_killed_command_goes_on(name: str, tmp_path: Path) -> None:
    from kill_scenarios import make_given, scenarios  # they import everything

    [scenario] = [scenario for scenario in scenarios() if scenario.name == name]
    given = tmp_path / "given"
    given.mkdir()
    assert forked(lambda: make_given(given), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    tally = attack(scenario, 6, 1, given, tmp_path / "space")
    assert tally.runs >= 6
    assert not tally.wrong


def test_a_command_that_does_not_survive_is_found(tmp_path: Path) -> None:
    """It takes its half file for a whole one."""

    def act(out: Path) -> None:
        if not out.is_dir():
            out.mkdir()
            for name in ("one", "two"):
                (out / name).write_text(name)

    (tmp_path / "given").mkdir()
    tally = attack(Scenario(name="bad", act=act), 10, 0, tmp_path / "given", tmp_path / "space")
    assert len(tally.wrong) >= 2
    assert "different: two" in "".join(tally.wrong)
