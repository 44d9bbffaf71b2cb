"""Speculative decoding without loss (arXiv 2211.17192): the number of tokens to draft, and their acceptance.

A draft proposes a single token with certainty, so the rule for sampling is simple: the token is accepted with the
probability p that the model gives it; otherwise a token is drawn from the model's distribution without it. The result
is a draw from the model's distribution.

Shape letters: B rows, K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTHS = (0, 1, 2, 3, 4, 6, 8)
FIRST = 4  # guesses at first
WEIGHT = 0.2  # of a new measurement in a running mean
PATIENCE = 32  # tokens without drafts until they are tried again
MARGIN = 1.02  # drafts must be expected to be so many times as fast


class Length:
    """The number of tokens to draft, chosen from measured times and from the share that is accepted.

    fixed: a constant number; None: chosen.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed = fixed
        self.stands = 0.6  # running share of the guesses that stand
        self.check: dict[int, float] = {}  # seconds of checking, by the number of guesses
        self.guess: float | None = None  # seconds of one guess
        self.waiting = 0

    def next(self, most: int) -> int:
        """Return the number of tokens to draft, at most `most`."""
        if self.fixed is not None:
            return min(self.fixed, most)
        if 0 not in self.check:  # what a plain step takes has to be known
            return 0
        if self.guess is None:
            return min(FIRST, most)
        best = max(LENGTHS, key=self._speed)
        if best and self._speed(best) < MARGIN * self._speed(0):
            best = 0
        self.waiting = 0 if best else self.waiting + 1
        if self.waiting > PATIENCE:
            best, self.waiting = FIRST, 0
        return min(best, most)

    def _speed(self, count: int) -> float:
        """Return the expected tokens per second with so many drafted tokens."""
        tokens = sum(self.stands**i for i in range(count + 1))
        return tokens / (self._checking(count) + count * (self.guess or 0.0))

    def _checking(self, count: int) -> float:
        """Return the seconds of checking `count` tokens, measured or interpolated linearly."""
        if count in self.check:
            return self.check[count]
        known = sorted(self.check)
        low = max((k for k in known if k < count), default=known[0])
        high = min((k for k in known if k > count), default=known[-1])
        if low == high:
            return self.check[low]
        share = (count - low) / (high - low)
        return self.check[low] * (1 - share) + self.check[high] * share

    def learn(self, guesses: int, stood: int, guessing: float, checking: float) -> None:
        """Record a pass: the numbers of tokens drafted and accepted, and the seconds of drafting and checking."""
        self.check[guesses] = _mean(self.check.get(guesses), checking)
        if guesses:
            self.guess = _mean(self.guess, guessing / guesses)
            tried = min(stood + 1, guesses)
            self.stands = (1 - WEIGHT) * self.stands + WEIGHT * stood / tried


def _mean(before: float | None, new: float) -> float:
    return new if before is None else (1 - WEIGHT) * before + WEIGHT * new


def stand_or_redraw(probability_BV: Tensor, guess_B: Tensor, generator: torch.Generator) -> Tensor:
    """Return a draw from each row's distribution, int64 [B], which is the drafted token whenever that is accepted."""
    at_B1 = guess_B[:, None]
    given_B = probability_BV.gather(1, at_B1)[:, 0]
    drawn_B = torch.rand(given_B.shape, generator=generator, device=given_B.device, dtype=given_B.dtype)
    rest_BV = probability_BV.scatter(1, at_B1, 0.0)
    empty_B1 = rest_BV.sum(1, keepdim=True) <= 0  # the guess was certain
    other_B = torch.multinomial(torch.where(empty_B1, probability_BV, rest_BV), 1, generator=generator)[:, 0]
    return torch.where(drawn_B < given_B, guess_B, other_B)
