"""The GPU study: limits of time, failures that are kept and said, its page, and the whole rehearsal on a CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from skipstone_studies.catalogue import STUDIES
from skipstone_studies.run import reproduce
from skipstone_studies.speed.gpu import page, parts, runner
from skipstone_studies.speed.gpu.bench import Bench, compared

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a GPU")


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(**changes: Any) -> dict[str, Any]:
    found = {"seconds": 1.0, "limit": 60, "measured": 0, "failed": 0, "wrong": 0, "device": "cpu"}
    return {**found, "products": "highest", "measurements": {}, "failures": {}, **changes}


def test_all_limits_together_leave_nine_minutes() -> None:
    assert sum(part.limit for part in parts.PARTS.values()) <= 525


def test_both_scales_measure_the_same_parts() -> None:
    on_gpu, rehearsed = parts.arms("paper"), parts.arms("laptop")
    assert list(on_gpu) == list(rehearsed)
    for name, recipe in on_gpu.items():
        assert set(recipe) == set(rehearsed[name]), name
        json.dumps(recipe)


def test_a_part_is_stopped_at_its_limit_and_says_so() -> None:
    found = runner.measured({**parts.arms("laptop")["decoding"], "seed": 0, "limit": 0.2})
    assert found["failures"] == {"the part itself": "stopped at its limit of 0.2 s"}
    assert found["seconds"] < 30


@pytest.mark.slow
def test_a_part_that_breaks_says_its_last_words() -> None:
    found = runner.measured({**parts.arms("laptop")["decoding"], "seed": 0, "module": "absent"})
    assert "No module named 'skipstone_studies.speed.gpu.absent'" in found["failures"]["the part itself"]


@NO_GPU
def test_without_a_gpu_one_line_says_so(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="needs a CUDA device") as error:
        runner.measured({**parts.arms("paper")["decoding"], "seed": 0})
    assert "\n" not in str(error.value)
    assert "CUDA" in tool.missing(rehearse=False)
    assert tool.missing(rehearse=True) == ""


def test_a_measurement_that_fails_is_kept_and_the_next_one_runs(tmp_path: Path) -> None:
    bench = Bench(out=tmp_path / "part.json", device=torch.device("cpu"), sizes={})
    bench.measure("breaks", lambda bench: {"ms": 1 / 0})
    bench.measure("works", lambda bench, ms: {"ms": ms}, 1.0)
    written = json.loads(bench.out.read_text())
    assert written == {
        "measurements": {"works": {"ms": 1.0}},
        "failures": {"breaks": "ZeroDivisionError: division by zero"},
    }


def test_nan_is_not_equal() -> None:
    one = torch.ones(2)
    assert compared({"result": (one, one)}, 1e-5)["equal"] == 1
    assert compared({"result": (one * float("nan"), one)}, 1e-5)["equal"] == 0
    assert compared({"result": (one + 1e-3, one)}, 1e-5)["equal"] == 0


def test_the_page_says_where_it_was_run_and_what_failed() -> None:
    rehearsed = {"decoding": {0: figures(measurements={"1 row": {"dense_ms": 2.0, "speed": 1.5}})}}
    text = page.details(rehearsed)
    assert "Rehearsed on a CPU only" in text
    assert "| 1 row | 2.00 | 1.50 |" in text
    assert "Nothing." in text
    measured = {"compared": {"error": 1e-3, "equal": 0, "speed_512": 1.25, "dense_512_ms": 3.0}}
    failed = figures(device="NVIDIA H200", measurements=measured, failures={"graph": "a | b"}, failed=1)
    text = page.details({"prompts of an adapted model": {0: failed}})
    assert "**Run on NVIDIA H200**; products of fp32 without TF32." in text
    assert "| compared | 1.0e-03 | **no** | 3.00 | 1.25 |" in text
    assert "* prompts of an adapted model, graph: `a / b`" in text
    assert "Not run yet: kernels;" in text


def test_failed_parts_are_forgotten_before_the_next_run(tool: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "gpu" / "records" / "paper"
    folder.mkdir(parents=True)
    for name, failed in (("whole", 0), ("broken", 2)):
        failures = {str(i): "why" for i in range(failed)}
        text = json.dumps({"arm": name, "figures": figures(failed=failed, failures=failures)})
        (folder / f"{name}-seed0.json").write_text(text)
    assert tool.failures(tmp_path, "paper") == ["broken, 0: why", "broken, 1: why"]
    assert tool.forget_failed(tmp_path, "paper") == 1
    assert [path.name for path in folder.iterdir()] == ["whole-seed0.json"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of `make gpu` runs from start to end on a CPU, and nothing of it fails or differs."""
    monkeypatch.chdir(tmp_path)
    text = reproduce("gpu", scale="laptop").read_text(encoding="utf-8")
    records = [json.loads(path.read_text()) for path in (tmp_path / "runs" / "gpu" / "records" / "laptop").iterdir()]
    assert len(records) == len(STUDIES["gpu"].recipes("laptop"))
    for record in records:
        assert record["figures"]["failures"] == {}, record["arm"]
        assert record["figures"]["wrong"] == 0, record["arm"]
        assert record["figures"]["measured"] > 0, record["arm"]
    assert "### What failed\n\nNothing." in text
    assert "Rehearsed on a CPU only" in text
