"""The figures that are logged, against figures counted by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.records import ActivationRecord, DepthRecord
from skipstone.measure.record_meter import RecordMeter, moving
from skipstone.train.log_window import LogWindow
from train.tool import DENSE, POLYGLU, mod

PLACES = {**DENSE, "vocab_size": 31, "mechanisms": [{**mod("ema_threshold"), "layers": [1]}], "activation": POLYGLU}


def model() -> SkipstoneForCausalLM:
    return SkipstoneForCausalLM(SkipstoneConfig.from_plain(PLACES))


def test_capacity_and_gate_are_shares_of_the_tokens_asked() -> None:
    yes, no = True, False
    records = [
        DepthRecord(
            score_BT=torch.zeros(1, 4),
            kept_BT=torch.tensor([kept]),
            weight_BT=torch.tensor([weight]),
            reached_BT=torch.tensor([asked]),
        )
        for kept, weight, asked in (
            ([yes, no, no, no], [0.5, 0.0, 0.0, 9.0], [yes, yes, yes, no]),
            ([yes, no, no, no], [1.0, 0.0, 0.0, 0.0], [yes, no, no, no]),
        )
    ]
    meter = RecordMeter()
    for record in records:
        meter.add(model().routing_modules(), ({}, {"mixture_of_depths": record}))
    assert meter.read() == pytest.approx({"capacity/1/mixture_of_depths": 0.5, "gate/1/mixture_of_depths": 0.375})
    assert meter.read() == {}


def test_entropy_leaves_tokens_out_that_were_never_asked() -> None:
    net = model()
    mechanism = next(m for m in net.routing_modules() if m.placement.name == "polyglu")
    sharp, even = torch.tensor([200.0, 0.0, 0.0, 0.0]), torch.zeros(4)
    logits = torch.stack([sharp, even, even, torch.full((4,), float("nan"))])[None]
    record = ActivationRecord(logits, torch.tensor([[True, True, True, False]]))
    meter = RecordMeter()
    meter.add([mechanism], ({"polyglu": record}, {}))
    found = meter.read()
    assert found["entropy/0/polyglu"] == pytest.approx(2 / 3)
    assert found["dynamic_entropy/0/polyglu"] == pytest.approx(2 / 3 * math.log(4))
    assert found["static_entropy/0/polyglu"] == pytest.approx(math.log(4))
    assert found["diversity/0/polyglu"] == 0
    assert len(found) == 4


def test_what_the_callback_moves() -> None:
    net = model()
    for mechanism in net.routing_modules():
        mechanism.advance(0.5, torch.tensor([0.25]))
    assert moving(net.routing_modules()) == pytest.approx({"tau": 0.55, "threshold/1/mixture_of_depths": 0.25})


def test_a_window_comes_back_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    window = LogWindow(torch.device("cpu"))
    window.clear(7)
    for _ in range(3):
        window.add(torch.rand(()), torch.rand(()), 11)
    window.start()
    with window.paused():
        window.save(tmp_path)
    other = LogWindow(torch.device("cpu"))
    other.load(tmp_path)
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
