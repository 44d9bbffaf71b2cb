"""Token counts of a block: how many tokens of a row it works on. Mechanisms reduce them, the cost model uses them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """The numbers of tokens of one row that a block works on (float: means over rows where these differ).

    kv_tokens: tokens that reach the sub-layer; keys and values are computed for all of them. query_tokens: tokens whose
    update is computed (queries, output projection, MLP). unpadded: the same two without the padding of shorter rows,
    where projections and MLP leave it out (`core/unpad.py`). rows: the share of the rows that are computed at all; the
    other numbers are those of one such row.
    """

    kv_tokens: float
    query_tokens: float
    unpadded: TokenCounts | None = None
    rows: float | Fraction = 1

    def restricted_to(self, kept: TokenCounts | float) -> TokenCounts:
        """Return the counts of the kept tokens. A plain number is assumed to be independent of which tokens are
        queries.
        """
        if isinstance(kept, TokenCounts):
            return kept
        asked = self.query_tokens * kept / self.kv_tokens if self.kv_tokens else 0.0
        return TokenCounts(kv_tokens=kept, query_tokens=asked, rows=self.rows)

    @property
    def given(self) -> float:
        """The tokens of a row that reach the sub-layer, in the mean over all rows."""
        return self.kv_tokens if self.rows == 1 else float(self.kv_tokens * self.rows)


Amount: TypeAlias = TokenCounts | float | Fraction  # Fraction: an exact mean over rows


def number(amount: Amount) -> float | Fraction:
    """Return an amount as a plain number: for token counts, the query tokens."""
    if not isinstance(amount, TokenCounts):
        return amount
    return amount.query_tokens if amount.rows == 1 else amount.query_tokens * amount.rows
