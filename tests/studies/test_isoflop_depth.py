"""An isoFLOP grid gives a routed arm no verdict unless its dense sizes show that depth pays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from skipstone_studies.isoflop.curves import gain_of_depth, refusal
from skipstone_studies.isoflop.result import SameLoss
from skipstone_studies.isoflop.spec import GridSize


def point(width: int, blocks: int, loss: float) -> Any:
    return SimpleNamespace(cell=SimpleNamespace(size=GridSize(width, blocks)), loss=loss)


def grid(points: list[Any]) -> Any:
    known = {"dense": {"mechanisms": []}, "mod": {"mechanisms": [{"name": "mixture_of_depths"}]}, "relu": {}}
    spec = SimpleNamespace(base="dense", known=known)
    return SimpleNamespace(grid=SimpleNamespace(spec=spec), curves={("dense", 1e13): points})


def test_the_gain_of_depth_compares_models_of_one_width() -> None:
    assert gain_of_depth([point(64, 4, 2.0), point(128, 8, 1.5)]) is None
    assert gain_of_depth([point(64, 4, 2.0), point(64, 8, 1.9), point(128, 8, 1.0)]) == pytest.approx(0.1)
    assert gain_of_depth([point(64, 2, 1.8), point(64, 4, 2.0), point(64, 8, 1.9)]) == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ([point(64, 8, 1.9)], "headroom not known"),
        ([point(64, 4, 1.91), point(64, 8, 1.9)], "no headroom"),
        ([point(64, 4, 1.93), point(64, 8, 1.9)], ""),
    ],
)
def test_routed_arms_get_no_verdict_without_headroom(points: list[Any], why: str) -> None:
    assert refusal(grid(points), "mod", 1e13) == why
    assert refusal(grid(points), "relu", 1e13) == ""


def test_a_refusal_stands_in_place_of_the_verdict() -> None:
    values: dict[str, Any] = {"arm": "mod", "share": None, "at_most": False, "parameters": None, "ratio": None}
    clear = SameLoss(**values, gap=-0.1, gap_low=-0.2, gap_high=-0.05)
    assert clear.verdict == "better"
    assert SameLoss(**{**vars(clear), "refused": "no headroom"}).verdict == "no headroom"
