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
    """The base class of depth mechanisms: modules that decide which tokens get a block's update and how strongly.

    `mechanisms/base.py` holds the code that our own mechanisms share. default_layers: the slice of blocks that carry
    the mechanism if the configuration does not say (":" is all of them). sites: what the mechanism can wrap, the
    default first: a whole "block", its "attention", its "mlp", or a "segment" of neighbouring blocks that share one
    decision. selects_rows: whether it leaves out whole rows (`Tokens.select_rows`), which the cost model has to know.
    budget_by: what `skipstone adapt` changes to meet a FLOP budget: the option `capacity`, or the threshold of a soft
    gate (`score_threshold`); None means that the mechanism has no budget.
    """

    default_layers: ClassVar[str] = ":"
    sites: ClassVar[tuple[str, ...]] = ("block", "attention", "mlp")
    selects_rows: ClassVar[bool] = False
    budget_by: ClassVar[Literal["capacity", "threshold"] | None] = None

    @property
    def capacity(self) -> float | None:
        """The share of a document's tokens that the mechanism is set to keep, after any warm-up; None if it has none.

        Decisions by a threshold keep this share on average only.
        """
        return None

    def set_capacity(self, capacity: float) -> None:
        """Set `capacity`, the share of a document's tokens to keep, in (0, 1].

        Mechanisms whose `budget_by` is not "capacity" raise NotImplementedError.
        """
        raise NotImplementedError

    @property
    def skips(self) -> bool:
        """Whether an evaluation pass (causal decisions, with no look at later tokens and no noise) may skip tokens."""
        return True

    @property
    def reads_ids(self) -> bool:
        """Whether decisions depend on token ids, which the decoder then provides as `Tokens.state["input_ids"]`."""
        return False

    @property
    def intended_share(self) -> float | None:
        """The share of the tokens reaching the mechanism that a training pass should currently keep.

        None if such a pass computes all of them or has no such target.
        """
        return None

    @property
    def chooses_by_score(self) -> bool:
        """Whether learned router scores decide which tokens are kept.

        Only then can a router fail to tell tokens apart, which a trainer warns of.
        """
        return True

    @property
    def learns_benefit(self) -> bool:
        """Whether the router learns to predict by how much the block's update lowers the loss of a token.

        The trainer measures this and provides it as `Tokens.state["benefit/LAYER"]`.
        """
        return False

    @property
    def waits_in_training(self) -> bool:
        """Whether a training pass makes the CPU wait for the GPU, to learn the number of kept tokens or rows."""
        return self.selects_rows

    @property
    def host_syncs(self) -> int:
        """How often the CPU waits for the GPU because of this mechanism in one decoding step of several rows."""
        return int(self.skips)

    def score_threshold(self) -> ScoreThreshold | None:
        """Return the router-score threshold by which tokens are kept in generation; None if no threshold decides."""
        return None

    def stream_gate(self) -> StreamGate | None:
        """Return a description of the causal decision as a function of the residual stream, for compiled code.

        A decoding step that runs all blocks in one numba call then decides by itself instead of calling the mechanism;
        the description is asked for in each step. Return None if the decision cannot be described so; the mechanism is
        then called.
        """
        return None

    def kept_by_ids(self, tokens: Tokens) -> Tensor:
        """Return the tokens that the mechanism keeps in a causal pass, bool [B, T], where ids alone decide.

        Only mechanisms whose `stream_gate` says so (`StreamGate.known`) have this; others raise NotImplementedError.
        tokens: the tokens of this call, with their ids in `Tokens.state`.
        """
        raise NotImplementedError

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the update of `x_BTD` under this mechanism, [B, T, D], and the records of all decisions made, by name.

        update: a function (x, tokens) -> (delta, records) that computes the update without the mechanism, for the
        tokens that it is given. x_BTD: the residual stream. tokens: everything else about its tokens (positions,
        padding, state of mechanisms, how to decide).
        """
        raise NotImplementedError

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Return the tensors [B, T] that the mechanism carries from block to block, by name, with their initial values.

        x_BTD: the embedded tokens, from which shape, dtype and device are taken.
        """
        raise NotImplementedError

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return how many tokens per row the wrapped block works on, given how many reach the mechanism.

        counts: the tokens that reach the mechanism. kept: the tokens that it kept in a measured pass, as counts or as a
        mean number per row; None means the number that its configuration sets, or all tokens if it sets none. oracle:
        True for a pass that decides as in training, where it may look at whole rows, and `kept` may not be used; False
        for causal decisions, as in generation.
        """
        raise NotImplementedError


class DepthModules(nn.ModuleDict):
    """The depth mechanisms of a block by name: an `nn.ModuleDict` whose values are typed as `DepthModule`."""

    def __getitem__(self, name: str) -> DepthModule:
        return super().__getitem__(name)  # type: ignore[return-value]

    def values(self) -> ValuesView[DepthModule]:
        return super().values()  # type: ignore[return-value]

    def items(self) -> ItemsView[str, DepthModule]:
        return super().items()  # type: ignore[return-value]
