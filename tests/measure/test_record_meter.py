"""Logged figures agree with figures counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.records import ActivationRecord, DepthRecord
from skipstone.measure.record_meter import RecordMeter, moving
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
