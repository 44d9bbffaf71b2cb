"""The interface of depth mechanisms, as blocks, decoder and cost model use it.

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
from skipstone.core.stream_gate import StreamGate
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens


class DepthModule(RoutingModule):
    """The base class of depth mechanisms: a module that wraps a block's update (shared code is in
    `mechanisms/base.py`).

    default_layers: the blocks that carry the mechanism if an entry of `mechanisms` does not say. sites: what it can
    wrap (option `on`), the default first: a "block", its "attention", its "mlp", or a "segment" of neighbouring blocks,
    whose entry makes one mechanism for all its layers. selects_rows: it leaves out whole rows by `Tokens.select_rows`,
    which the cost model has to know. budget_by: what
    `skipstone adapt` sets to meet a budget: the option `capacity`, the threshold of a soft gate (`score_threshold` with
    an option), or None for a mechanism without a budget.
    """

    default_layers: ClassVar[str] = ":"
    sites: ClassVar[tuple[str, ...]] = ("block", "attention", "mlp")
    selects_rows: ClassVar[bool] = False
    budget_by: ClassVar[Literal["capacity", "threshold"] | None] = None

    @property
    def capacity(self) -> float | None:
        """The guaranteed share of tokens that a pass keeps once any warm-up is over; None if nothing is guaranteed."""
        return None

    def set_capacity(self, capacity: float) -> None:
        """Set `capacity` to another share; only for mechanisms with `budget_by` "capacity"."""
        raise NotImplementedError

    @property
    def skips(self) -> bool:
        """Whether a causal pass without noise may skip tokens."""
        return True

    @property
    def reads_ids(self) -> bool:
        """Whether decisions depend on token ids, so that the decoder has to give them in `Tokens.state`."""
        return False

    @property
    def intended_share(self) -> float | None:
        """The share of tokens that a training pass is to keep now; None if it computes all or no share is intended."""
        return None

    @property
    def chooses_by_score(self) -> bool:
        """Whether learned scores decide, so that a router that decides nothing is worth a warning."""
        return True

    @property
    def learns_benefit(self) -> bool:
        """Whether scores are trained to predict the measured benefit of the block (`BENEFIT` in `Tokens.state`)."""
        return False

    @property
    def waits_in_training(self) -> bool:
        """Whether a training pass makes the host wait, because the number of tokens or rows follows from the data."""
        return self.selects_rows

    @property
    def host_syncs(self) -> int:
        """Number of times that the host waits for this mechanism in a decoding step of several rows."""
        return int(self.skips)

    def score_threshold(self) -> ScoreThreshold | None:
        """Return the threshold on recorded scores by which a causal pass decides; None if there is none."""
        return None

    def stream_gate(self) -> StreamGate | None:
        """Return how a causal pass decides about a token from the stream, so that a compiled step can do it.

        Compiled steps ask in each step. None: they call the mechanism as usual.
        """
        return None

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the update of `x_BTD` under this mechanism, [B, T, D], and the records of its decisions."""
        raise NotImplementedError

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Return the tensors [B, T] that the mechanism carries from block to block, as they are before block 0."""
        raise NotImplementedError

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return the token counts inside the mechanism, given those outside.

        kept: measured counts of the tokens that it keeps; None: as the configuration guarantees. oracle: for an oracle
        pass.
        """
        raise NotImplementedError


class DepthModules(nn.ModuleDict):
    """The depth mechanisms of a block by name: an `nn.ModuleDict` whose values are typed."""

    def __getitem__(self, name: str) -> DepthModule:
        return super().__getitem__(name)  # type: ignore[return-value]

    def values(self) -> ValuesView[DepthModule]:
        return super().values()  # type: ignore[return-value]

    def items(self) -> ItemsView[str, DepthModule]:
        return super().items()  # type: ignore[return-value]
