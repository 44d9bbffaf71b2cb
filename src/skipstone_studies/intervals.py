"""Confidence intervals of paired differences between compared recipes, and the smallest difference to be detected.

Differences are taken between two runs with the same seed, which share data and initial weights; their mean over seeds
has Student's t interval. If the differences are also known for each block of the validation text, the interval includes
the variation over text. One seed has no interval. All intervals of this package are computed here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

CONFIDENCE = 0.9
POWERS = (0.8, 0.9)
Verdict = Literal["yes", "no", "inconclusive", "no headroom"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The mean of paired differences with its confidence interval.

    mean: the mean difference. errors: pairs of an independent part of its standard error (from seeds, from text) and
    this part's degrees of freedom. confidence: level of the interval, such as 0.9. The half width is the root of the
    sum of squares of the parts' half widths (Student's t), which is exact if one part dominates, and slightly too wide
    if several are similar.
    """

    mean: float
    errors: tuple[tuple[float, int], ...]
    confidence: float = CONFIDENCE

    @property
    def _half(self) -> float:
        return math.hypot(*(t_quantile((1 + self.confidence) / 2, degrees) * e for e, degrees in self.errors))

    @property
    def low(self) -> float:
        """The lower end of the confidence interval."""
        return self.mean - self._half

    @property
    def high(self) -> float:
        """The upper end of the confidence interval."""
        return self.mean + self._half

    def below(self, limit: float = 0.0) -> Verdict:
        """Return the verdict on the claim that the true difference is below `limit`.

        "yes" if the whole interval is below it, "no" if the whole interval is above it, else "inconclusive".
        """
        return "yes" if self.high < limit else "no" if self.low > limit else "inconclusive"

    def above(self, limit: float = 0.0) -> Verdict:
        """Return the verdict on the claim that the true difference is above `limit`.

        "yes" if the whole interval is above it, "no" if the whole interval is below it, else "inconclusive".
        """
        return "yes" if self.low > limit else "no" if self.high < limit else "inconclusive"

    def detectable(self, power: float = POWERS[0]) -> float:
        """Return the smallest true difference for which such an interval would exclude 0 with probability `power`."""
        return math.hypot(*(detectable_in_errors(power, degrees, self.confidence) * e for e, degrees in self.errors))

    def shown(self, form: str = "+.3f") -> str:
        """Return the interval as text such as `-0.025 [-0.040, -0.010]`.

        form: format specification of its numbers.
        """
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def with_power(self, form: str = "+.3f") -> str:
        """Return the interval as text and, if it contains 0, what was detectable: `..., detectable 0.021 / 0.025`.

        These two are the true differences that would be found with 80 and 90 % probability. form: format specification
        of the numbers.
        """
        if self.below() != "inconclusive":
            return self.shown(form)
        seen = (format(self.detectable(power), form.removeprefix("+")) for power in POWERS)
        return f"{self.shown(form)}, detectable {' / '.join(seen)}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim about one arm (compared recipe) of a study, with its verdict.

    arm: name of the arm. text: the claim in words, which state the rule for the verdict. found: our measurement as
    text. verdict: "yes", "no" or "inconclusive" by the rule; "no headroom" if a deeper model has no lower loss, so that
    routing, which skips depth, is not judged. estimate: the measurement as a number, or None. ends: the lower and upper
    end of its confidence interval; None for one seed. limit: the number that the rule compares the estimate with.
    """

    arm: str
    text: str
    found: str
    verdict: Verdict
    estimate: float | None = None
    ends: tuple[float, float] | None = None
    limit: float = 0.0


def paired(differences: Sequence[float], blocks: Sequence[Sequence[float]] = ()) -> Interval | None:
    """Return the mean of paired differences with its confidence interval (Student's t); None for fewer than two seeds.

    differences: one per seed. blocks: for each seed, the differences on the blocks of the validation text, which are
    the same for all seeds; the interval then also includes the variation over text. () leaves that out.
    """
    seeds = len(differences)
    if seeds < 2:
        return None
    errors = [(statistics.stdev(differences) / math.sqrt(seeds), seeds - 1)]
    by_block = [statistics.fmean(of_block) for of_block in zip(*blocks, strict=True)]
    if len(by_block) > 1:
        errors.append((statistics.stdev(by_block) / math.sqrt(len(by_block)), len(by_block) - 1))
    return Interval(mean=statistics.fmean(differences), errors=tuple(errors))


def t_cdf(t: float, degrees: int) -> float:
    """Return the distribution function of Student's t at `t`, for an integer number of degrees of freedom."""
    angle = math.atan2(t, math.sqrt(degrees))
    square, odd = math.cos(angle) ** 2, degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0 if degrees == 1 else term
    for i in range(2 + odd, degrees, 2):
        term *= square * (i - 1) / i
        total += term
    body = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return 0.5 + body / 2


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """Return the t at which the distribution function of Student's t has the value `probability`.

    probability: between 0.5 and 1. degrees: degrees of freedom.
    """
    return _bisect(lambda t: t_cdf(t, degrees) - probability, 1e4)


@cache
def detectable_in_errors(power: float, degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the smallest true mean, in standard errors, that a two-sided t test would find with probability `power`.

    The standard error is estimated with `degrees` degrees of freedom, so the statistic follows the noncentral t
    distribution, which is integrated over the ratio of estimated to true error. power: from 0 to 1. confidence: 1 minus
    the significance level of the test.
    """
    limit = t_quantile((1 + confidence) / 2, degrees)
    ratio = np.linspace(1e-4, 6.0, 1000)  # estimated error / true error
    log_density = (degrees - 1) * np.log(ratio) - degrees * ratio**2 / 2
    density = np.exp(log_density - log_density.max())
    density /= density.sum()

    def found(mean: float) -> float:
        upper = [0.5 * math.erfc((limit * r - mean) / math.sqrt(2)) for r in ratio]
        return float(np.dot(density, upper)) - power

    return _bisect(found, 100.0)


def _bisect(rising: Callable[[float], float], high: float) -> float:
    """Return where a rising function crosses 0 between 0 and `high`, by bisection."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
