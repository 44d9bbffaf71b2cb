"""`DepthMechanism`: the base class of our depth mechanisms, with what they share.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from skipstone.core.counts import TokenCounts
from skipstone.core.depth import DepthModule
from skipstone.core.records import DepthRecord, Records
from skipstone.core.routing_module import Placement
from skipstone.core.strict import parsed
from skipstone.core.tokens import real_mask as real_mask
from skipstone.mechanisms.routers import LinearRouter
from skipstone.mechanisms.skip_path import LowRankSkip
from skipstone.ops import reference as ops


class DepthMechanism(DepthModule):
    """A depth mechanism: decides which tokens get a block's update and with what weight.

    Subclasses set `Config`, a frozen keyword-only dataclass that parses the options given to the constructor.
    """

    Config: ClassVar[type]

    def __init__(
        self, hidden_size: int, placement: Placement | None = None, config: object = None, **options: object
    ) -> None:
        """Parse `options` with `Config`, unless `config` holds them already."""
        super().__init__()
        self.config = parsed(self.Config, config, options)
        self.hidden_size, self.placement = hidden_size, placement or Placement()

    def fitted_parts(self) -> tuple[LinearRouter | None, LowRankSkip | None]:
        """Return the linear router and the skip path that `adapt.start: measured` fits; None for absent ones."""
        return None, None

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Return the tensors [B, T] that the mechanism carries from block to block, as they are before block 0."""
        return {}

    def empty_record(self, x_BTD: Tensor) -> DepthRecord:
        zero_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=ops.wide_dtype(x_BTD))
        return DepthRecord(zero_BT + float("nan"), zero_BT > 0, zero_BT, zero_BT > 0)

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return the token counts inside the mechanism, given those outside.

        kept: measured counts of the tokens that it keeps; None: as the configuration guarantees. By default, skipped
        tokens still serve as keys and values, and an oracle pass skips nothing.
        """
        if oracle or kept is None:
            return counts
        return TokenCounts(
            kv_tokens=counts.kv_tokens, query_tokens=counts.restricted_to(kept).query_tokens, rows=counts.rows
        )

    def oracle_mask(self, record: DepthRecord) -> Tensor | None:
        """Return the tokens that an oracle would keep by the record's scores, bool [B, T]; None if undefined."""
        return None

    def record(
        self,
        *,
        score_BT: Tensor,
        kept_BT: Tensor,
        weight_BT: Tensor,
        reached_BT: Tensor,
        loss_BT: Tensor | None = None,
        carry: Mapping[str, Tensor] | None = None,
    ) -> Records:
        """Return the mechanism's record under its name."""
        record = DepthRecord(score_BT, kept_BT, weight_BT, reached_BT, loss_BT, carry or {})
        return {self.placement.name or type(self).__name__: record}
