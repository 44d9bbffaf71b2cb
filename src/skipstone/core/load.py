"""How many tokens of a row a block really works on: what mechanisms narrow and the cost model counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Load:
    """Tokens of one row (a mean over rows where they differ, hence float).

    given: tokens that reach the sub-layer; keys and values are computed for all of them.
    asked: tokens whose update is computed: queries, output projection, MLP.
    packed: both without what pads shorter rows, where projections and MLP leave that out (`core/packing.py`).
    """

    given: float
    asked: float
    packed: Load | None = None

    def of(self, kept: Load | float) -> Load:
        """The kept ones of these tokens. A bare number is taken as independent of who asks."""
        if isinstance(kept, Load):
            return kept
        return Load(given=kept, asked=self.asked * kept / self.given if self.given else 0.0)
