"""Early exit: a token that exits skips all later blocks (after adaptive computation time, arXiv 1603.08983).

    s_i <- s_i * sigmoid(w . x_i + b)       survival, 1 before block 0
    h   <- h + s * Attn(..),  h <- h + s * FFN(..)

Survival never increases, so that in hard execution (tokens with s <= threshold skip) an exit is final without further
state. Keys and values of exited tokens are still computed, from their last hidden state, for the remaining tokens.
Unlike confidence-based exits, the score is trained with the model, and no output head runs at every block.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipstone.core.records import DepthRecord, Records
from skipstone.core.seam import Update
from skipstone.core.stream_gate import EVERY, Line, StreamGate
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.base import DepthMechanism, Placement, real_mask
from skipstone.mechanisms.gating import apply_gate, is_hard
from skipstone.mechanisms.option_threshold import OptionThreshold
from skipstone.mechanisms.routers import LinearRouter, scorer_of
from skipstone.ops import reference as ops

NEUTRAL_SCORE = 12.0  # survival of 1 - 6e-6 per block, with a gradient that does not vanish
EPSILON = 1e-12


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig:
    """The options of early exit, in which every block multiplies a token's survival by sigmoid(w . x + b).

    start_bias: initial b (3: each block multiplies survival by .95). depth_weight: coefficient of the mean survival in
    the loss, at least 0. execution: what evaluation and generation do: "hard" skips exited tokens, "soft" only scales
    updates by survival. threshold: the survival, in (0, 1), at or below which a token exits. Raises ValueError for
    values out of range.
    """

    start_bias: float = 3.0
    depth_weight: float = 0.001
    execution: Literal["hard", "soft"] = "hard"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")
        if self.depth_weight < 0:
            raise ValueError(f"depth_weight must not be negative, got {self.depth_weight}")


class SurvivalThreshold(OptionThreshold):
    """Reads and sets the threshold of early exit, as a logit of survival: a token exits at or below it.

    mechanism: an `EarlyExit`. Its option `threshold`, a survival in (0, 1), is the threshold of all blocks of its entry
    in `mechanisms`.
    """

    def __init__(self, mechanism: EarlyExit) -> None:
        super().__init__(mechanism, keeps_above=True)
        self._state = mechanism.state_name

    def scores(self, record: DepthRecord) -> Tensor:
        """Return the logit of each token's survival, fp64 [B, T], which early exit compares with its threshold.

        Survival is the product of sigmoid(w . x + b) over the blocks up to this one. record: what the `EarlyExit` of
        this block decided in a call. NaN for all tokens if no token reached the block in that call.
        """
        return torch.logit(record.carry.get(self._state, record.score_BT).double(), eps=EPSILON)


class EarlyExit(DepthMechanism):
    """Early exit as a depth mechanism: updates are scaled by a token's survival, and tokens of low survival skip.

    Survival is 1 before block 0, and each block multiplies it by sigmoid(w . x + b), so it never rises and an exit is
    final. Exited tokens still provide keys and values, from their last hidden state. Training computes all tokens.
    hidden_size: width of the model. placement: the block in which it is used; None outside of a model. Options are the
    fields of `EarlyExitConfig`, as keyword arguments or as `config`.
    """

    Config = EarlyExitConfig
    default_layers = "1:"
    budget_by = "threshold"
    has_auxiliary_loss = True

    def __init__(self, hidden_size: int, placement: Placement | None = None, **options: object) -> None:
        super().__init__(hidden_size, placement, **options)
        self.router = LinearRouter(hidden_size, self.config.start_bias)

    @property
    def skips(self) -> bool:
        return self.config.execution == "hard"

    def score_threshold(self) -> ScoreThreshold | None:
        return SurvivalThreshold(self) if self.skips else None

    @property
    def state_name(self) -> str:
        """The name under which `Tokens.state` passes tokens' survival (a product of gates) from block to block."""
        return self.placement.name or "early_exit"

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        return {self.state_name: x_BTD.new_ones(x_BTD.shape[:2], dtype=ops.wide_dtype(x_BTD))}

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the block's update scaled by each token's survival, [B, T, D], and the decisions by mechanism name.

        update: computes the wrapped block's update, as update(x, tokens) -> (update, records). x_BTD: the hidden states
        that enter the block. tokens: the tokens of this call. Survival scales the updates of attention and MLP
        separately. With `execution: hard`, tokens whose survival is at or below the threshold get no update in
        generation and evaluation.
        """
        score_BT, before_BT = self.router(x_BTD), tokens.state.get(self.state_name)
        survival_BT = score_BT.sigmoid() if before_BT is None else score_BT.sigmoid() * before_BT
        reached_BT = real_mask(tokens, score_BT)
        kept_BT = None
        if is_hard(self.config.execution, tokens):
            kept_BT = survival_BT > self.config.threshold if tokens.forced_BT is None else tokens.forced_BT
            kept_BT = reached_BT & kept_BT
        delta_BTD, inner = apply_gate(update, x_BTD, tokens, survival_BT, kept_BT)
        shown_BT = reached_BT if kept_BT is None else kept_BT
        records = self.record(
            score_BT=score_BT,
            kept_BT=shown_BT,
            weight_BT=torch.where(shown_BT, survival_BT, 0.0),
            reached_BT=reached_BT,
            loss_BT=torch.where(reached_BT, survival_BT, 0.0) * (self.config.depth_weight / self.placement.count),
            carry={self.state_name: survival_BT},
        )
        return delta_BTD, {**records, **inner}

    def stream_gate(self) -> StreamGate | None:
        if (scorer := scorer_of(self.router)) is None:
            return None
        return StreamGate(
            scorer=scorer,
            line=Line(self.config.threshold) if self.config.execution == "hard" else EVERY,
            compares="opening",
            weight="opening",
            acts_on="sublayers",
            others="keys",
            state=self.state_name,
            loss=self.config.depth_weight / self.placement.count,
        )

    def set_identity(self) -> None:
        self.router.constant(NEUTRAL_SCORE)

    def flops(self, tokens: float, routing: str) -> float:
        return self.router.flops(tokens)
