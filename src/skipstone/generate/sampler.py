"""`Sampler`: draws the next tokens from logits.

Shape letters: B rows, V vocabulary, K most probable tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.generate.prompt import check_count
from skipstone.generate.speculation import stand_or_redraw

COLDEST = 1e-30  # lower temperatures would be 0 in fp32, by which nothing can be divided


class Sampler:
    """Draws one token of each row when called with the logits [B, V]; the result is int64 [B].

    A call may also have guessed tokens, int64 [B]: a guess is then returned with its own probability, and otherwise
    another token, so that the result has the same distribution. temperature: 0 chooses the most probable token; above
    0, tokens are drawn from softmax(logits / temperature). top_k: draw among this many of the most probable tokens;
    None means all of them. seed: seed of the draws; None means a random seed. device: the logits' device. Raises
    ValueError for values out of range, and when called with a row of logits that holds NaN or +inf, or nothing but
    -inf.
    """

    def __init__(self, temperature: float, top_k: int | None, seed: int | None, device: torch.device) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
        if top_k is not None:
            check_count("top_k", top_k)
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed must be a number of 64 bits, from {-(2**63)} to {2**64 - 1}, got {seed}")
        self.temperature, self.top_k = temperature, top_k
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits_BV: Tensor, guess_B: Tensor | None = None) -> Tensor:
        """Return one token for each row, int64 [B], drawn from its logits.

        logits_BV: the logits. guess_B: int64, a drafted token for each row; it is returned exactly as often as it would
        be drawn without a draft. None means no draft. Raises ValueError for a row that holds NaN or +inf, or nothing
        but -inf, as from damaged or diverged weights.
        """
        if self.temperature == 0:
            best_B1 = logits_BV.argmax(-1, keepdim=True)
            _check(logits_BV.gather(1, best_B1))
            return best_B1[:, 0]
        best_BK, index_BK = self._candidates(logits_BV.float())
        probability_BK = best_BK.softmax(-1)
        if guess_B is not None:
            if index_BK is not None:
                zero_BV = torch.zeros(logits_BV.shape, device=logits_BV.device)
                probability_BK = zero_BV.scatter(1, index_BK, probability_BK)
            return stand_or_redraw(probability_BK, guess_B, self.generator)
        drawn_B1 = torch.multinomial(probability_BK, 1, generator=self.generator)
        return (drawn_B1 if index_BK is None else index_BK.gather(1, drawn_B1))[:, 0]

    def _candidates(self, logits_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the top_k largest logits divided by the temperature, and their tokens, [B, K] each.

        Without top_k, these are the logits of the whole vocabulary, [B, V], and None. logits_BV: the logits.
        """
        largest_B1 = logits_BV.amax(-1, keepdim=True)
        _check(largest_B1)
        logits_BV = logits_BV - largest_B1  # no overflow when nearly greedy
        logits_BV = logits_BV / max(self.temperature, COLDEST)
        if self.top_k is None or self.top_k >= logits_BV.shape[-1]:
            return logits_BV, None
        best_BK, index_BK = logits_BV.topk(self.top_k)
        return best_BK, index_BK


def _check(largest_B1: Tensor) -> None:
    """Raise ValueError unless the largest logit of each row is finite; NaN counts as larger than any number.

    Smaller ones may be -inf, which only excludes a token.
    """
    if not bool(largest_B1.isfinite().all()):
        raise ValueError("the model's logits are not finite (NaN or infinite), so no token can be chosen")
