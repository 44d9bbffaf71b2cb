"""The seam on the depth side as types: what a block, the decoder and the cost model ask of a depth mechanism.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from typing import ClassVar, Literal

from torch import Tensor, nn

from skipstone.core.counts import TokenCounts
from skipstone.core.records import Records
from skipstone.core.routing_module import RoutingModule
from skipstone.core.seam import Update
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens


class DepthModule(RoutingModule):
    """A module around an update; `mechanisms/base.py` has what all of ours share.

    default_layers: the blocks that carry the mechanism where an entry of `mechanisms` does not say. budget_by: what
    `skipstone adapt` sets to meet a budget: the option `capacity`, the threshold on a soft gate (`score_threshold` with
    an option), or None for a mechanism that keeps no budget.
    """

    default_layers: ClassVar[str] = ":"
    budget_by: ClassVar[Literal["capacity", "threshold"] | None] = None

    @property
    def capacity(self) -> float | None:
        """The share of tokens that a pass keeps by promise, after any warm-up; None where nothing is promised."""
        return None

    def set_capacity(self, capacity: float) -> None:
        """Promise another share; only for mechanisms with `budget_by` "capacity"."""
        raise NotImplementedError

    @property
    def skips(self) -> bool:
        """Whether a causal pass without noise may leave tokens out."""
        return True

    @property
    def host_syncs(self) -> int:
        """How often the host waits for the mechanism in a decoding step of several rows."""
        return int(self.skips)

    def score_threshold(self) -> ScoreThreshold | None:
        """Return the threshold on recorded scores by which a causal pass decides, or None without one."""
        return None

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """What `update` adds to the stream under this mechanism, [B, T, D], and what was decided."""
        raise NotImplementedError

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Tensors [B, T] that cross blocks, as they are before block 0."""
        raise NotImplementedError

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """The counts inside, by what was measured (`kept`: those that it keeps), else as the configuration promises."""
        raise NotImplementedError


class DepthModules(nn.ModuleDict):
    """The depth mechanisms of a block by name, as such also for a type checker."""

    def __getitem__(self, name: str) -> DepthModule:
        return super().__getitem__(name)  # type: ignore[return-value]

    def values(self) -> ValuesView[DepthModule]:
        return super().values()  # type: ignore[return-value]

    def items(self) -> ItemsView[str, DepthModule]:
        return super().items()  # type: ignore[return-value]
