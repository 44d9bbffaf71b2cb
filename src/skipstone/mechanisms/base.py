"""`DepthMechanism`: the base class of the mechanisms that decide which tokens get a block's update.

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
    """The base class of depth mechanisms: modules that decide which tokens get a block's update, and its weight.

    Subclasses set `Config`, a frozen keyword-only dataclass of their options. The constructor accepts hidden_size (the
    width D of the model), placement (the block in which the mechanism is used; None outside of a model), and either a
    `config` or its fields as keyword arguments.
    """

    Config: ClassVar[type]

    def __init__(
        self, hidden_size: int, placement: Placement | None = None, config: object = None, **options: object
    ) -> None:
        """Store the width D, the placement (None means the only block of a model) and the options.

        config: an instance of `Config`; if None, `options`, the fields of `Config`, are parsed. Raises ValueError if
        both are given, an option is not allowed, or the width is no whole number of at least 1.
        """
        super().__init__()
        if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
            raise ValueError(f"hidden_size must be a whole number of at least 1, got {hidden_size!r}")
        self.config = parsed(self.Config, config, options)
        self.hidden_size, self.placement = hidden_size, placement or Placement()

    def fitted_parts(self) -> tuple[LinearRouter | None, LowRankSkip | None]:
        """Return the linear router and the low-rank skip path (the update of skipped tokens); None if absent.

        With `adapt.start: measured`, `skipstone adapt` fits these two to the dense model before it trains.
        """
        return None, None

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Return the initial values of the tensors [B, T] that the mechanism passes from block to block, by name.

        The dict is empty by default. x_BTD: the hidden states that enter block 0.
        """
        return {}

    def empty_record(self, x_BTD: Tensor) -> DepthRecord:
        zero_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=ops.wide_dtype(x_BTD))
        return DepthRecord(zero_BT + float("nan"), zero_BT > 0, zero_BT, zero_BT > 0)

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return how many tokens of a row the wrapped block works on, given how many reach the mechanism.

        Counts are means per row: `kv_tokens`, whose keys and values are computed, and `query_tokens`, whose update is.
        counts: the tokens that reach the mechanism. kept: those that it kept in a measured pass, as counts or as one
        number; None means that nothing was measured, so that the configuration decides. oracle: whether the pass is a
        training pass, whose decisions may look at the whole row. This default suits mechanisms that compute everything
        in training: it returns `counts` for a training pass or without `kept`; otherwise skipped tokens still count as
        keys and values.
        """
        if oracle or kept is None:
            return counts
        return TokenCounts(
            kv_tokens=counts.kv_tokens, query_tokens=counts.restricted_to(kept).query_tokens, rows=counts.rows
        )

    def oracle_mask(self, record: DepthRecord) -> Tensor | None:
        """Return which tokens the top-k decision of training would have kept in this pass, bool [B, T].

        It ranks the scores in `record`, the mechanism's record of the pass, over the whole row. Used to measure the
        precision and recall of decisions that were made without later tokens. None (the default) if the mechanism does
        not rank tokens.
        """
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
        """Return a dict with a `DepthRecord` of these tensors under the mechanism's name.

        Outside of a model, the key is the class name. All tensors are [B, T]. score_BT: fp32 router logits. kept_BT:
        bool, the tokens that get the update. weight_BT: fp32 factor on the update, 0 for skipped tokens. reached_BT:
        bool, tokens that are neither padding nor skipped by an outer mechanism. loss_BT: fp32 auxiliary loss of each
        token, or None. carry: new values of the tensors that are passed to the next block, by name; None means that
        there are none.
        """
        record = DepthRecord(score_BT, kept_BT, weight_BT, reached_BT, loss_BT, carry or {})
        return {self.placement.name or type(self).__name__: record}
