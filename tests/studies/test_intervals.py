"""Intervals contain the true difference as often as they should, and so are detectable differences detected."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from skipstone_studies.claims import ArmComparison, comparisons, judge
from skipstone_studies.headroom import LEAST, REFUSED, headroom
from skipstone_studies.intervals import CONFIDENCE, Interval, detectable_in_errors, paired, t_cdf, t_quantile

STUDIES, BLOCKS = 1500, 12
TRUE = 0.3


@pytest.mark.parametrize(
    ("degrees", "ninety", "ninety_five"),
    [(1, 6.3138, 12.7062), (2, 2.9200, 4.3027), (5, 2.0150, 2.5706), (30, 1.6973, 2.0423)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, ninety: float, ninety_five: float) -> None:
    assert t_quantile(0.95, degrees) == pytest.approx(ninety, abs=1e-4)
    assert t_quantile(0.975, degrees) == pytest.approx(ninety_five, abs=1e-4)
    assert t_cdf(0.0, degrees) == 0.5
    assert t_cdf(-ninety, degrees) == pytest.approx(0.05, abs=1e-5)


def simulated(seeds: int, seed_noise: float, text_noise: float, true: float = TRUE) -> list[Interval]:
    """Intervals of studies drawn anew: noise of each seed, of each block of text, and of each seed on each block."""
    generator = np.random.default_rng(seeds)
    found = []
    for _ in range(STUDIES):
        of_seed = generator.normal(true, seed_noise, (seeds, 1))
        of_block = generator.normal(0.0, text_noise * (BLOCKS / seeds) ** 0.5, (1, BLOCKS))
        difference_SW = of_seed + of_block + generator.normal(0.0, 0.3, (seeds, BLOCKS))
        blocks = difference_SW.tolist() if text_noise else ()
        interval = paired(difference_SW.mean(1).tolist(), blocks)
        assert interval is not None
        found.append(interval)
    return found


@pytest.mark.parametrize("seeds", [pytest.param(2, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize(("seed_noise", "text_noise"), [(1.0, 0.0), (3.0, 1.0), (1.0, 1.0), (1.0, 3.0), (0.0, 1.0)])
def test_nominal_ninety_per_cent_intervals_hold_the_truth(seeds: int, seed_noise: float, text_noise: float) -> None:
    found = simulated(seeds, seed_noise, text_noise)
    covered = statistics.fmean(interval.low <= TRUE <= interval.high for interval in found)
    assert CONFIDENCE == 0.9
    assert 0.88 <= covered <= 0.98


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("power", [0.8, 0.9])
def test_a_detectable_difference_is_detected_as_often_as_it_says(seeds: int, power: float) -> None:
    true = detectable_in_errors(power, seeds - 1) / seeds**0.5  # where a run's noise is 1
    generator = np.random.default_rng(seeds)
    found = [paired(generator.normal(true, 1.0, seeds).tolist()) for _ in range(STUDIES)]
    assert statistics.fmean(i is not None and i.above() == "yes" for i in found) == pytest.approx(power, abs=0.03)


def test_one_seed_has_no_interval_however_many_blocks_there_are() -> None:
    assert paired([]) is None
    assert paired([0.1], [[0.1] * 50]) is None


def test_an_interval_by_hand() -> None:
    interval = paired([0.1, 0.2, 0.3])
    assert interval is not None
    half = 2.919986 * 0.1 / 3**0.5
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))
    assert interval.shown() == "+0.200 [+0.031, +0.369]"
    assert interval.with_power() == interval.shown()
    assert [interval.below(limit) for limit in (0.0, 0.1, 0.4)] == ["no", "inconclusive", "yes"]
    assert [interval.above(limit) for limit in (0.0, 0.1, 0.4)] == ["yes", "inconclusive", "no"]
    wide = paired([-0.1, 0.2, 0.3])
    assert wide is not None
    assert wide.with_power() == f"{wide.shown()}, detectable {wide.detectable(0.8):.3f} / {wide.detectable(0.9):.3f}"
    assert wide.detectable(0.9) > wide.detectable(0.8) > wide.high - wide.mean


def test_verdicts_are_those_of_the_interval_and_never_of_all_seeds_agreeing() -> None:
    """Three seeds that are all below 0 are no more than that."""
    (claim,) = judge("a", "below", [-0.001, -0.02, -0.3], most=0.0)
    assert claim.verdict == "inconclusive"
    assert "detectable" in claim.found
    (claim,) = judge("a", "below", [-0.01, -0.011, -0.012], most=0.0)
    assert claim.verdict == "yes"
    (claim,) = judge("a", "at least", [0.01, 0.011, 0.012], least=0.05)
    assert (claim.verdict, "detectable" in claim.found) == ("no", False)
    (claim,) = judge("a", "below", [-0.01], most=0.0, form="+.2f", told="told: ")
    assert (claim.verdict, claim.found) == ("inconclusive", "told: -0.01, one seed")
    assert list(judge("a", "below", [], most=0.0)) == []


def losses(**arms: list[float]) -> dict[str, dict[int, dict[str, float]]]:
    return {arm: {seed: {"loss": value} for seed, value in enumerate(values)} for arm, values in arms.items()}


def test_arms_are_compared_seed_by_seed() -> None:
    """Seeds differ by far more than arms do."""
    figures = losses(dense=[1.0, 2.0, 3.0], good=[0.9, 1.91, 2.89], alike=[1.1, 1.9, 3.0], alone=[0.5])
    page = comparisons(figures, [ArmComparison(key="loss", title="loss", against="dense", format="+.3f")])
    assert "| good | 3 | better | -0.100 [-0.117, -0.083] |" in page
    assert "| alike | 3 | not told apart | +0.000 [-0.169, +0.169], detectable 0.230 / " in page
    assert "alone" not in page
    refused = comparisons(figures, [ArmComparison(key="loss", title="loss", against="dense")], refused=True)
    assert "| good | 3 | no headroom |" in refused
    assert "better" not in refused
    worse = ArmComparison(key="loss", title="accuracy", against="dense", format="+.3f", better="high", arms=["good"])
    assert "| good | 3 | worse |" in comparisons(figures, [worse])
    assert comparisons(losses(dense=[1.0], good=[0.9]), [worse]) == ""


@pytest.mark.parametrize(("gain", "there"), [(LEAST + 0.001, True), (LEAST - 0.001, False), (-0.1, False)])
def test_no_verdict_on_routing_where_depth_does_not_pay(gain: float, there: bool) -> None:
    """The best of the rivals counts, not the shallowest."""
    figures = losses(dense=[1.0, 1.1], half=[1.0 + gain, 1.1 + gain], quarter=[1.5, 1.6])
    found = headroom(figures, "dense", ["half", "quarter", "absent"], "loss")
    assert found is not None
    assert (found.rival, found.there) == ("half", there)
    assert (REFUSED in found.sentence()) is not there
    assert headroom(figures, "dense", [], "loss") is None
    assert headroom(figures, "absent", ["half"], "loss") is None
