"""Arms of a study side by side: the records are those of arms one after the other, and failures are said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from skipstone_studies import side_by_side
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.run import reproduce

WORKER = Path(__file__).with_name("small_worker.py")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    from studies import small_worker

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(STUDIES, "small", small_worker.SMALL)
    monkeypatch.setattr(side_by_side, "COMMAND", [sys.executable, str(WORKER)])
    monkeypatch.setattr(side_by_side, "POLL", 0.05)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "small"


def records(folder: Path) -> dict[str, Any]:
    paths = (folder / "small" / "records" / "laptop").glob("*.json")
    return {record["arm"]: record for record in (json.loads(path.read_text()) for path in paths)}


@pytest.mark.slow
def test_the_records_are_those_of_one_arm_after_the_other(small: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of small's runs failed: .*arm 'broken'.*nowhere"):
        reproduce(small, jobs=3, runs=tmp_path / "beside")
    reproduce(small, arms=["dense", "half"], runs=tmp_path / "alone")
    beside, alone = records(tmp_path / "beside"), records(tmp_path / "alone")
    assert set(beside) == set(alone) == {"dense", "half"}
    for arm, record in beside.items():
        assert record["figures"]["evaluation"]["ways"] == alone[arm]["figures"]["evaluation"]["ways"]
        assert record["figures"]["beside"] == {"arms": 2}, "what compares arms was measured when both had ended"
        assert record["environment"]["jobs"] == 3
        assert "jobs" not in alone[arm]["environment"]
    page = (tmp_path / "beside" / "small.md").read_text()
    assert "3 arms at a time" in page


def test_a_timing_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'decoder' is a timing: its arms run alone, so jobs must be 1, got 2"):
        reproduce("decoder", jobs=2)
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        reproduce("decoder", jobs=0)
