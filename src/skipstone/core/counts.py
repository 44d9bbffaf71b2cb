"""How many tokens of a row a block really works on: what mechanisms narrow and the cost model counts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens of one row (a mean over rows where they differ, hence float).

    kv_tokens: tokens that reach the sub-layer; keys and values are computed for all of them.
    query_tokens: tokens whose update is computed: queries, output projection, MLP.
    unpadded: both without what pads shorter rows, where projections and MLP leave that out (`core/unpad.py`).
    """

    kv_tokens: float
    query_tokens: float
    unpadded: TokenCounts | None = None

    def restricted_to(self, kept: TokenCounts | float) -> TokenCounts:
        """The counts of the kept tokens. A bare number is taken as independent of which tokens are queries."""
        if isinstance(kept, TokenCounts):
            return kept
        return TokenCounts(
            kv_tokens=kept, query_tokens=self.query_tokens * kept / self.kv_tokens if self.kv_tokens else 0.0
        )


Amount: TypeAlias = TokenCounts | float | Fraction  # a fraction where the mean over rows must be exact


def number(amount: Amount) -> float | Fraction:
    """A plain number; of token counts the query tokens."""
    return amount.query_tokens if isinstance(amount, TokenCounts) else amount
