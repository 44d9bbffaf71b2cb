"""Speculative decoding without loss (arXiv 2211.17192): the number of tokens to draft, and their acceptance.

A draft proposes a single token with certainty, so the rule for sampling is simple: the token is accepted with the
probability p that the model gives it; otherwise a token is drawn from the model's distribution without it. The result
is a draw from the model's distribution.

Shape letters: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS = (1, 2, 3, 5, 7)  # 8 tokens, one of which is no guess, are as many as few-bit kernels multiply at once
MARGIN = 1.02  # drafts must be expected to be so many times as fast
# What drafts may lose, in plain steps: this much at first, and this share of every token since. So a text of some
# length is never slower than .98 of decoding without drafts, however badly they guess.
AT_FIRST, SHARE = 0.5, 0.01
AT_FIRST_TRUSTED = 1.0  # at first, if guesses are expected to be right more often than not: for 100 tokens and more
CREDIT = 4.0  # of what drafts have gained, the most that they may lose again before they have to stop
SLOPE, LEAST_S = 0.15, 2e-4  # of a step, and at least seconds, that a guess adds to its check, until that is measured
RECENT = 5  # measurements of which the least counts: a process may lose its processor, so times are too long if wrong
# A single measurement that is so many times as long as expected does not count, or it would end all drafting.
TRUSTED, UNLIKELY = 2, 1.5
FREE = 0.0025  # of a step: watching for an occasion to draft that costs less goes on all the time
MOST_REST = 64  # plain steps in which nothing is done for drafts
KNOWN = 2  # plain steps that are measured before anything is drafted
KEPT = 0.9  # of the evidence for a share of guesses, after another pass
HOPED = 0.5  # share of guesses that stand, as far as there is no evidence; also what a text may change to


class Evidence(NamedTuple):
    """How many guesses of one kind were right; older passes count exponentially less.

    stood: number of right guesses. tried: number of guesses up to and including the first wrong one of each pass.
    """

    stood: float = 0.0
    tried: float = 0.0

    def share(self, hoped: float = HOPED) -> float:
        """Return the estimated probability that a guess is right. hoped: what it is without any evidence."""
        return (hoped + self.stood) / (1 + self.tried)


class Length:
    """Chooses the number of tokens to draft from measured times and from the share of guesses that were right.

    fixed: a constant number; None means that it is chosen. cost: time of one guess, divided by the time of a decoding
    step; used until it is measured. seconds: the least time in seconds that a guess takes, even by a tiny model. least:
    the least time in seconds that checking a guess takes. hoped: the share of guesses that are expected to be right, as
    far as there is no evidence. Unless `fixed` is set, time lost by drafts is bounded, so that decoding takes at most
    about 2 % longer than without drafts.
    """

    def __init__(
        self,
        fixed: int | None = None,
        cost: float = 0.0,
        seconds: float = 0.0,
        least: float = LEAST_S,
        hoped: float = HOPED,
    ) -> None:
        self.fixed, self.cost, self.seconds, self.least, self.hoped = fixed, cost, seconds, least, hoped
        self.watch: deque[float] = deque(maxlen=RECENT)  # seconds of a step that looks for guesses and finds none
        self.check: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))  # seconds, by number of guesses
        self.guess: deque[float] = deque(maxlen=RECENT)  # seconds of one guess
        self.stands: dict[int, Evidence] = defaultdict(Evidence)
        self.allowed = AT_FIRST_TRUSTED if hoped > HOPED else AT_FIRST  # plain steps that may still be lost

    def next(self, most: int, kind: int = 0) -> int:
        """Return the number of tokens to draft next, from 0 to `most`.

        kind: number of the kind of guess; the share of guesses of this kind that were right counts. Drafts that are not
        expected to save time are tried now and then, to notice when the text becomes more predictable, but only as long
        as decoding takes at most about 2 % longer than without drafts.
        """
        if self.fixed is not None:
            return min(self.fixed, most)
        if len(self.check[0]) < KNOWN or most < 1:
            return 0
        possible = [n for n in LENGTHS if n <= most and self._steps(n) - 1 <= self.allowed]
        if not possible:
            return 0
        share = self.stands[kind].share(self.hoped)
        best = max(possible, key=lambda n: self._speed(n, share))
        if self._speed(best, share) >= MARGIN:
            return best
        return max(possible, key=lambda n: self._speed(n, max(share, HOPED)))

    def rest(self) -> int:
        """Return how many plain steps (without a draft) to take before the next attempt to draft, at most 64.

        The result is 0 if an attempt costs next to nothing, as beside a large model, or if all attempts so far and one
        more make decoding at most about 2 % slower than without drafts; also if `fixed` is set or no times are known.
        """
        if self.fixed is not None or len(self.check[0]) < KNOWN or self._watching() <= FREE:
            return 0
        least = max(min(self._steps(n) for n in LENGTHS[:2]) - 1, 0.0) + self._watching()
        return min(max(math.ceil((least - self.allowed) / SHARE), 0), MOST_REST)

    def _watching(self) -> float:
        """Return the extra time of a step that looks for guesses and finds none, in times of a plain step."""
        return max(min(self.watch) / min(self.check[0]) - 1, 0.0) if self.watch else 0.0

    def _speed(self, count: int, share: float) -> float:
        """Return the expected number of tokens from a pass with `count` drafted tokens, per time of a plain step.

        share: the probability that a guess is right.
        """
        return sum(share**i for i in range(count + 1)) / self._steps(count)

    def _steps(self, count: int) -> float:
        """Return the time of drafting and checking `count` tokens, in times of a plain step."""
        plain = min(self.check[0])
        expected = max(self.cost * plain, self.seconds)
        return (self._checking(count) + count * _least(self.guess, expected)) / plain

    def _checking(self, count: int) -> float:
        """Return the seconds that a pass with `count` drafted tokens takes.

        The figure is measured, or interpolated linearly between measured numbers of tokens, or extrapolated beyond the
        largest.
        """
        plain = min(self.check[0])
        each = max(SLOPE * plain, self.least)
        known = {n: _least(times, plain + n * each) for n, times in self.check.items() if times} | {0: plain}
        if count in known:
            return known[count]
        low = max(n for n in known if n < count)
        high = min((n for n in known if n > count), default=None)
        if high is not None:
            share = (count - low) / (high - low)
            return known[low] * (1 - share) + known[high] * share
        slope = (known[low] - plain) / low if low else each
        return known[low] + max(slope, 0.0) * (count - low)

    def learn(self, guesses: int, stood: int, guessing: float, checking: float, kind: int = 0) -> None:
        """Record the times and the result of a pass that checked guesses, or of one without any (a plain step).

        guesses: number of guesses. stood: how many of them were right before the first wrong one. guessing: seconds of
        drafting; 0 for a plain step, in which nothing was done for drafts. checking: seconds of the pass and of what is
        done with its result. kind: number of the kind of guess; each kind has its own share of right ones.
        """
        self.check[guesses].append(checking)
        if guesses == 0 and guessing:
            self.watch.append(guessing + checking)
        if guesses:
            self.guess.append(guessing / guesses)
            before, tried = self.stands[kind], min(stood + 1, guesses)
            self.stands[kind] = Evidence(KEPT * before.stood + stood, KEPT * before.tried + tried)
        if self.check[0]:
            watched = self._watching() if guessing else 0.0
            gained = stood + 1 - self._steps(guesses) - self._begun(guesses, guessing) if guesses else -watched
            self.allowed = min(self.allowed + SHARE * (stood + 1) + gained, CREDIT)

    def _begun(self, guesses: int, guessing: float) -> float:
        """Return by how much drafting took longer than usual, in times of a plain step, such as to read what is new.

        guesses: number of guesses, at least 1. guessing: seconds that they took. At most `AT_FIRST` is returned: if the
        system suspended the process, drafting is not to blame.
        """
        return min((guessing - guesses * min(self.guess)) / min(self.check[0]), AT_FIRST)


def _least(measured: deque[float], expected: float) -> float:
    """Return the least of the measured seconds, or those expected if few were measured and that is unlikely long."""
    if not measured or (len(measured) < TRUSTED and min(measured) > UNLIKELY * expected):
        return expected
    return min(measured)


def stand_or_redraw(probability_BV: Tensor, guess_B: Tensor, generator: torch.Generator) -> Tensor:
    """Accept or replace one drafted token of each row so that the result follows the model's own distribution.

    A guess of probability p is returned with probability p; otherwise a token is drawn from the distribution without
    the guess (speculative sampling, arXiv 2211.17192). probability_BV: the model's distribution, [B, V]. guess_B: int64
    [B], the drafted tokens. generator: source of the random numbers. Returns int64 [B].
    """
    at_B1 = guess_B[:, None]
    given_B = probability_BV.gather(1, at_B1)[:, 0]
    drawn_B = torch.rand(given_B.shape, generator=generator, device=given_B.device, dtype=given_B.dtype)
    rest_BV = probability_BV.scatter(1, at_B1, 0.0)
    empty_B1 = rest_BV.sum(1, keepdim=True) <= 0  # the guess was certain
    other_B = torch.multinomial(torch.where(empty_B1, probability_BV, rest_BV), 1, generator=generator)[:, 0]
    return torch.where(drawn_B < given_B, guess_B, other_B)
