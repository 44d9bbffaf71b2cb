"""Whether one arm is better than another: confidence intervals of paired differences, and what a study could have seen.

The only intervals of this package. A difference is taken between two runs of one seed, which share data and first
weights; its mean over seeds has Student's t interval. Where the difference is known for each block of the validation
text, too, the interval counts both that other seeds and that other text would have given another difference. One seed
tells nothing about other seeds, so it has no interval.
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
    """The mean of paired differences, and its confidence interval.

    errors: independent parts of the standard error of the mean, each with the degrees of freedom that it is known to.
    The half width is the root of the sum of squares of the parts' own half widths: exact where one part dominates,
    a little too wide where several are alike.
    """

    mean: float
    errors: tuple[tuple[float, int], ...]
    confidence: float = CONFIDENCE

    @property
    def _half(self) -> float:
        return math.hypot(*(t_quantile((1 + self.confidence) / 2, degrees) * e for e, degrees in self.errors))

    @property
    def low(self) -> float:
        return self.mean - self._half

    @property
    def high(self) -> float:
        return self.mean + self._half

    def below(self, limit: float = 0.0) -> Verdict:
        """Whether the true difference is below `limit`, as far as the interval tells."""
        return "yes" if self.high < limit else "no" if self.low > limit else "inconclusive"

    def above(self, limit: float = 0.0) -> Verdict:
        """Whether the true difference is above `limit`, as far as the interval tells."""
        return "yes" if self.low > limit else "no" if self.high < limit else "inconclusive"

    def detectable(self, power: float = POWERS[0]) -> float:
        """The smallest true difference whose interval would exclude 0 with probability `power`, at these errors."""
        return math.hypot(*(detectable_in_errors(power, degrees, self.confidence) * e for e, degrees in self.errors))

    def shown(self, form: str = "+.3f") -> str:
        """`-0.025 [-0.040, -0.010]`."""
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def with_power(self, form: str = "+.3f") -> str:
        """As `shown`; where the interval holds 0, with what was detectable: `..., detectable 0.021 / 0.025`."""
        if self.below() != "inconclusive":
            return self.shown(form)
        seen = (format(self.detectable(power), form.removeprefix("+")) for power in POWERS)
        return f"{self.shown(form)}, detectable {' / '.join(seen)}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim about one arm. found: what we measured of it. verdict: by the rule that `text` states."""

    arm: str
    text: str
    found: str
    verdict: Verdict


def paired(differences: Sequence[float], blocks: Sequence[Sequence[float]] = ()) -> Interval | None:
    """The interval of a mean difference; None for fewer than two seeds.

    differences: one a seed. blocks: for each seed, the difference on each block of the validation text, the same blocks
    for all seeds; the error of the mean then has a part of the seeds and a part of the text.
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
    """Student's t distribution function, for whole degrees of freedom: the finite series in the angle of t."""
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
    """Where `t_cdf` is `probability`, which lies in (.5, 1)."""
    return _bisect(lambda t: t_cdf(t, degrees) - probability, 1e4)


@cache
def detectable_in_errors(power: float, degrees: int, confidence: float = CONFIDENCE) -> float:
    """A true mean, in standard errors, that a two-sided t test at 1 - confidence finds with probability `power`.

    The error is estimated with `degrees` degrees of freedom, so the test statistic follows the noncentral t
    distribution; it is integrated over the estimated error by its true size.
    """
    limit = t_quantile((1 + confidence) / 2, degrees)
    ratio = np.linspace(1e-4, 6.0, 1000)  # of the estimated error by the true one
    log_density = (degrees - 1) * np.log(ratio) - degrees * ratio**2 / 2
    density = np.exp(log_density - log_density.max())
    density /= density.sum()

    def found(mean: float) -> float:
        upper = [0.5 * math.erfc((limit * r - mean) / math.sqrt(2)) for r in ratio]
        return float(np.dot(density, upper)) - power

    return _bisect(found, 100.0)


def _bisect(rising: Callable[[float], float], high: float) -> float:
    """Where a rising function crosses 0 between 0 and `high`."""
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
