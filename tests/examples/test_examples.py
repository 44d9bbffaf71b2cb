"""Every file in examples/ runs unchanged and prints what it should."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_route_your_block(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["route_your_block.py", "2"])
    runpy.run_path(str(EXAMPLES / "route_your_block.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "every token    loss" in printed
    assert "routed, 25 %   loss" in printed
    shown = printed.splitlines()[-1]
    assert len(shown) - shown.count("·") == int(len(shown) * 0.25)


@pytest.mark.filterwarnings("ignore::UserWarning")  # four steps: thresholds that have hardly moved
def test_watch_who_skips(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["watch_who_skips.py", "4"])
    runpy.run_path(str(EXAMPLES / "watch_who_skips.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "computed by block 1" in printed
    assert "computed by block 3" in printed
    assert "64% of the dense model's" in printed


@pytest.mark.filterwarnings("ignore::UserWarning")  # two steps: thresholds that have hardly moved
def test_route_any_decoder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["route_any_decoder.py", "2"])
    runpy.run_path(str(EXAMPLES / "route_any_decoder.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "tokens times blocks that were computed" in printed
    assert "the same without a cache: True" in printed


@pytest.mark.slow
def test_adapt_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["adapt_checkpoint.py"])
    runpy.run_path(str(EXAMPLES / "adapt_checkpoint.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    source, adapted = (next(line for line in lines if line.startswith(name)) for name in ("source", "adapted"))
    flops = [int(line.split(" nats a token, ")[1].split(" FLOPs")[0].replace(",", "")) for line in (source, adapted)]
    assert flops[1] <= 0.84 * flops[0]  # the budget, 5 % missed at the most
    assert lines[-1].endswith("SkipstoneForCausalLM")
