"""The sums for the next log line, and their restoration from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipstone.train.log_window import LogWindow


def test_a_window_comes_back_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    window = LogWindow(torch.device("cpu"))
    window.clear(7)
    for _ in range(3):
        window.add(torch.rand(()), torch.rand(()), 11)
    window.start()
    with window.paused():
        window.save(tmp_path, window.sums, 5)
    other = LogWindow(torch.device("cpu"))
    assert other.load(tmp_path) == 5, "lines of metrics.jsonl"
    assert torch.equal(other.sums, window.sums)
    assert (other.began, other.tokens, other.total_tokens) == (7, 33, 33)
    assert other.seconds == window.seconds > 0
    other.clear(9)
    assert (other.began, other.tokens, other.total_tokens, other.seconds) == (9, 0, 33, 0)
    assert not other.sums.any()
    with pytest.raises(ValueError, match="was not written by skipstone train"):
        other.load(tmp_path / "nowhere")


def test_paused_time_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 20.0, 21.5, 30.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    window = LogWindow(torch.device("cpu"))
    window.start()
    for _ in range(2):
        with window.paused():
            pass
    assert window.seconds == window.total_seconds == 3.5
