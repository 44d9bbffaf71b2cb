"""The seam on the depth side as types: what a block, the decoder and the cost model ask of a depth mechanism.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView

from torch import Tensor, nn

from skipstone.core.counts import TokenCounts
from skipstone.core.records import Records
from skipstone.core.routing_module import RoutingModule
from skipstone.core.seam import Update
from skipstone.core.tokens import Tokens


class DepthModule(RoutingModule):
    """A module around an update; `mechanisms/base.py` has what all of ours share."""

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
