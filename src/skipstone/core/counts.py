"""`TokenCounts`: how many tokens of a row a block works on, which the cost model turns into FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """The mean numbers of tokens per row that one block or sub-layer works on; the cost model computes FLOPs from them.

    kv_tokens: tokens that reach the sub-layer; keys and values are computed for all of them. query_tokens: tokens whose
    update is computed (queries, output projection, MLP). unpadded: the same two numbers for projections and MLP if
    these leave out the padding of shorter rows (`core/unpad.py`); None means that they compute the padding too. rows:
    the share of the batch's rows that are computed at all; all other numbers are means over these rows only.
    """

    kv_tokens: float
    query_tokens: float
    unpadded: TokenCounts | None = None
    rows: float | Fraction = 1

    def restricted_to(self, kept: TokenCounts | float) -> TokenCounts:
        """Return the counts of the tokens that a mechanism keeps, out of the tokens that this object counts.

        kept: the counts, which are returned as they are, or the number of kept tokens per row; the same share of these
        are query tokens (tokens whose update is computed) as of the tokens of this object.
        """
        if isinstance(kept, TokenCounts):
            return kept
        asked = self.query_tokens * kept / self.kv_tokens if self.kv_tokens else 0.0
        return TokenCounts(kv_tokens=kept, query_tokens=asked, rows=self.rows)

    @property
    def given(self) -> float:
        """The mean number of tokens that reach the sub-layer, over all rows; rows that are not computed count as 0."""
        return self.kv_tokens if self.rows == 1 else float(self.kv_tokens * self.rows)


Amount: TypeAlias = TokenCounts | float | Fraction  # Fraction: an exact mean over rows


def number(amount: Amount) -> float | Fraction:
    """Return the number of tokens per row that an amount stands for.

    amount: a number, returned as it is, or `TokenCounts`, of which `query_tokens` (tokens whose update is computed) is
    returned, as a mean over all rows of the batch.
    """
    if not isinstance(amount, TokenCounts):
        return amount
    return amount.query_tokens if amount.rows == 1 else amount.query_tokens * amount.rows
