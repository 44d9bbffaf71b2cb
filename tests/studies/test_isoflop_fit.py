"""Fits find the optimum of a known parabola, and report when there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipstone_studies.isoflop import result
from skipstone_studies.isoflop.curves import DOWNWARD, FEW, HIGH, INSIDE, LOW, Curve, fit, make_curve
from skipstone_studies.isoflop.result import Noise, same_loss

SIZES = (1e5, 3e5, 9e5, 2.7e6)


def parabola(xs: Sequence[float], best: float, loss: float, curvature: float) -> list[float]:
    return [loss + curvature * math.log(x / best) ** 2 for x in xs]


@given(st.floats(1.2e5, 2.5e6), st.floats(0.5, 5.0), st.floats(0.01, 1.0))
def test_the_optimum_is_recovered(best: float, loss: float, curvature: float) -> None:
    found = fit(SIZES, parabola(SIZES, best, loss, curvature))
    assert found.optimum.where == INSIDE
    assert found.optimum.x == pytest.approx(best, rel=1e-5)
    assert found.optimum.loss == pytest.approx(loss, abs=1e-8)
    assert max(map(abs, found.residuals)) < 1e-8
    assert found(best) == pytest.approx(loss, abs=1e-8)


@pytest.mark.parametrize(("best", "where", "x"), [(2e4, LOW, SIZES[0]), (1e7, HIGH, SIZES[-1])])
def test_an_optimum_beyond_the_grid_is_its_edge(best: float, where: str, x: float) -> None:
    losses = parabola(SIZES, best, 2.0, 0.1)
    found = fit(SIZES, losses).optimum
    assert (found.where, found.x) == (where, x)
    assert found.loss == losses[SIZES.index(x)]


def test_a_parabola_that_opens_downward_has_no_optimum() -> None:
    losses = parabola(SIZES, 4e5, 2.0, -0.1)
    found = fit(SIZES, losses)
    assert found.optimum.where == DOWNWARD
    assert found.optimum.loss == min(losses)
    assert not found.usable
    assert found.first_below(5.0) is None


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_sizes_make_no_parabola(count: int) -> None:
    found = fit(SIZES[:count], [2.0, 1.5][:count])
    assert found.optimum.where == FEW
    assert (found.optimum.x, found.optimum.loss) == ((SIZES[0], 2.0), (SIZES[1], 1.5))[count - 1]


@given(st.floats(1.5e5, 2.5e6), st.floats(0.0, 0.2))
def test_where_a_level_is_first_reached(best: float, above: float) -> None:
    found = fit(SIZES, parabola(SIZES, best, 2.0, 0.1))
    x = found.first_below(2.0 + above + 1e-9)
    assert x is not None
    assert SIZES[0] <= x <= best * 1.001
    assert found(x) <= 2.0 + above + 1e-6
    if x > SIZES[0]:
        assert found(x) == pytest.approx(2.0 + above, abs=1e-6)
    assert found.first_below(1.99) is None


def arm(name: str, best: float, loss: float, cheaper: float = 1.0) -> Curve:
    """FLOPs of a forward pass are twice the parameters, times `cheaper`."""
    flops = [2 * x * cheaper for x in SIZES]
    return make_curve(name, SIZES, flops, parabola(SIZES, best, loss, 0.05), [1] * len(SIZES))


def test_the_share_of_flops_for_the_same_loss() -> None:
    dense, mod = arm("dense", 6e5, 2.0), arm("mod", 8e5, 1.99, cheaper=0.5)
    (found,) = same_loss({"dense": dense, "mod": mod}, "dense", None)
    x = 8e5 * math.exp(-math.sqrt(0.01 / 0.05))
    assert found.share == pytest.approx(x * 0.5 / 6e5, rel=1e-6)
    assert found.parameters == pytest.approx(x, rel=1e-6)
    assert found.gap == pytest.approx(-0.01)
    assert (found.at_most, found.low, found.reached) == (False, None, None)


def test_a_loss_that_is_never_reached_and_one_that_the_smallest_reaches() -> None:
    dense = arm("dense", 6e5, 2.0)
    worse, better = same_loss(
        {"dense": dense, "worse": arm("worse", 6e5, 2.1), "better": arm("better", 6e5, 1.5)}, "dense", None
    )
    assert (worse.share, worse.parameters) == (None, None)
    assert worse.gap == pytest.approx(0.1)
    assert better.at_most
    assert better.share == pytest.approx(SIZES[0] / 6e5)


def test_nothing_is_compared_without_a_dense_arm() -> None:
    assert same_loss({"mod": arm("mod", 6e5, 2.0)}, "dense", None) == []


def test_the_spread_grows_with_the_noise_and_holds_the_value() -> None:
    curves = {"dense": arm("dense", 6e5, 2.0), "mod": arm("mod", 8e5, 1.97, cheaper=0.5)}
    narrow, wide = (
        same_loss(curves, "dense", Noise(deviation=deviation, source="seeds", degrees=6))[0]
        for deviation in (1e-4, 3e-3)
    )
    for found in (narrow, wide):
        assert found.low is not None
        assert found.share is not None
        assert found.high is not None
        assert found.low <= found.share <= found.high
        assert found.gap_low is not None
        assert found.gap_low < found.gap < (found.gap_high or math.inf)
    assert (wide.high or 0) - (wide.low or 0) > 5 * ((narrow.high or 0) - (narrow.low or 0))
    assert narrow.reached == 1.0


def test_sizes_between_points_cost_what_lies_between() -> None:
    curve = make_curve("dense", SIZES, [10.0, 40.0, 90.0, 300.0], [3, 2, 1, 2], [1] * 4)
    assert curve.forward(3e5) == pytest.approx(40.0)
    assert curve.forward(math.sqrt(1e5 * 3e5)) == pytest.approx(20.0)
    assert np.isclose(curve.forward(2.7e6), 300.0)


def test_nominal_ninety_per_cent_intervals_of_the_gap_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise whose size is known to two degrees of freedom only, for which a normal bootstrap is too narrow."""
    monkeypatch.setattr(result, "DRAWS", 60)
    generator, true, covered, studies = np.random.default_rng(0), 0.03, 0, 100
    for _ in range(studies):
        drawn = generator.normal(0.0, 0.02, (2, len(SIZES)))
        losses = [parabola(SIZES, 6e5, 2.0 + arm * true, 0.05) for arm in (0, 1)]
        curves = {
            name: make_curve(name, SIZES, SIZES, (found + noise).tolist(), [1] * 4)
            for name, found, noise in zip(("base", "arm"), losses, drawn, strict=True)
        }
        deviation = 0.02 * (generator.chisquare(2) / 2) ** 0.5
        (found,) = same_loss(curves, "base", Noise(deviation=deviation, source="seeds", degrees=2))
        assert found.gap_low is not None
        assert found.gap_high is not None
        covered += found.gap_low <= true <= found.gap_high
        inside = found.gap_low <= 0 <= found.gap_high
        assert (found.verdict == "not told apart") == inside
        assert found.detectable[0] < found.detectable[1]
    assert covered / studies >= 0.88
