"""The way of `make gpu-paper`, from training to page, with tiny sizes: arms side by side, one of them resumed."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__)
ARMS = ["dense", "tsa", "hard=0.5", "random=0.95", "early-exit", "dense-2"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_paper_from_training_to_its_page(data_dir: Path, tmp_path: Path) -> None:
    """In a process of its own, since it replaces the sizes of the study."""
    command = [sys.executable, str(CASES), str(tmp_path)]
    path = [str(CASES.parents[1]), str(CASES.parents[2] / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    whole, stopped = (
        {record["arm"]: record for record in map(read, (tmp_path / name).glob("*/records/paper/*.json"))}
        for name in ("whole", "stopped")
    )
    assert set(whole) == set(ARMS)
    same = [record["dense"]["figures"]["overfitting"] for record in (whole, stopped)]
    assert same[0] == same[1], "a run that was stopped and resumed ends as one that was not"
    assert all(record["environment"]["jobs"] == 3 for record in whole.values())
    assert all(record["sitting"] for record in whole.values())
    page = (tmp_path / "whole" / "tsa_shakespeare.md").read_text()
    assert "Comparison with the paper" in page
    assert "Last and best step" in page


def read(path: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(path.read_text())
    return found


def run(folder: Path) -> None:
    """Run six arms three at a time; then one arm that is stopped after its first checkpoint and resumed."""
    from skipstone_studies import side_by_side
    from skipstone_studies.catalogue import STUDIES
    from skipstone_studies.run import reproduce
    from skipstone_studies.speed.gpu.verbs import StopAt, Stopped
    from studies import small_tsa

    side_by_side.COMMAND = [sys.executable, str(small_tsa.__file__)]
    name, study = "tsa_shakespeare", STUDIES["tsa_shakespeare"]
    options = {"scale": "paper", "seeds": [42]}
    reproduce(name, arms=ARMS, jobs=3, runs=folder / "whole", **options)  # type: ignore[arg-type]

    def until_four(recipe, where, resume, callbacks):  # type: ignore[no-untyped-def]
        study.make(recipe, where, resume, [*callbacks, StopAt(4)])

    STUDIES[name] = dataclasses.replace(study, make=until_four)
    try:
        reproduce(name, arms=["dense"], runs=folder / "stopped", **options)  # type: ignore[arg-type]
    except Stopped:
        STUDIES[name] = study
        reproduce(name, arms=["dense"], jobs=2, runs=folder / "stopped", **options)  # type: ignore[arg-type]


if __name__ == "__main__":
    run(Path(sys.argv[1]))
