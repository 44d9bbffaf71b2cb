"""Layer dropout: in training, whole blocks are left out at random, one draw for each row (stochastic depth).

    x <- x + Delta(x) / (1 - p)     with probability 1 - p          in training, for all tokens of a row
    x <- x                          with probability p
    x <- x + Delta(x)                                               otherwise

    p = rate * l / (L - 1) * (1 - progress)       block l of L, progress of the training from 0 to 1

Huang et al. 2016 (arXiv 1603.09382) drop layers with a probability that rises over depth; LayerDrop (arXiv 1909.11556)
does so in transformers. Dividing by the probability of being kept and letting the rate fall to 0 over the training
follow Elhoushi et al. 2026 (arXiv 2609.05275), where a mask for each sequence and whole blocks (one mask for attention
and MLP) do best. With a rate that rises over depth and falls over the training, a quarter of `rate` is saved in the
mean. Rows that are left out cost nothing: the others are gathered as a smaller batch.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from skipstone.core.counts import TokenCounts
from skipstone.core.noise import row_noise
from skipstone.core.records import Records, lift
from skipstone.core.seam import Update
from skipstone.core.stream_gate import EVERY, Scorer, StreamGate
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.base import DepthMechanism, Placement, real_mask
from skipstone.mechanisms.schedules import Progress
from skipstone.ops import reference as ops


@dataclass(frozen=True, kw_only=True)
class LayerDropoutConfig:
    """The options of layer dropout, which leaves out blocks for random rows of the batch in training.

    rate: the largest probability of leaving out a block for a row, in [0, 1). over_depth: "rising" linearly from 0 in
    block 0 to `rate` in the model's last block, or "constant". over_training: whether a block's probability is
    "falling" linearly to 0 over the training, or "constant". scaled: whether the updates of kept rows are divided by
    the probability of keeping a row. Raises ValueError for a rate out of range.
    """

    rate: float = 0.2
    over_depth: Literal["rising", "constant"] = "rising"
    over_training: Literal["falling", "constant"] = "falling"
    scaled: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {self.rate}")


class LayerDropout(DepthMechanism):
    """Layer dropout (stochastic depth, arXiv 1603.09382): training leaves a block out for random rows of a batch.

    Rows that are left out cost nothing, because the others are gathered into a smaller batch. In evaluation and
    generation, this mechanism does nothing. hidden_size: width of the model. placement: the block in which it is used;
    None outside of a model. Options are the fields of `LayerDropoutConfig`, as keyword arguments or as `config`.
    """

    Config = LayerDropoutConfig
    skips = False  # in a causal pass
    selects_rows = True

    def __init__(self, hidden_size: int, placement: Placement | None = None, **options: object) -> None:
        super().__init__(hidden_size, placement, **options)
        config: LayerDropoutConfig = self.config
        depth = self.placement.layer / max(self.placement.num_layers - 1, 1) if config.over_depth == "rising" else 1.0
        self.largest = config.rate * depth
        self.progress = Progress(1.0) if config.over_training == "falling" else None

    @property
    def rate(self) -> float:
        """The current probability with which a row of the batch skips this block in training."""
        return self.largest if self.progress is None else self.largest * (1 - self.progress.share)

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the update [B, T, D], 0 for rows that are left out, and the decisions by mechanism name.

        Where rows are drawn and the option `scaled` is on, the updates of the other rows are divided by the probability
        of keeping a row. update: computes the wrapped block's update, as update(x, tokens) -> (update, records). x_BTD:
        the hidden states that enter the block. tokens: the tokens of this call. Rows are left out only in training
        passes with noise, or where the caller imposes it (`tokens.forced_BT`). Recorded scores are 0, as there is no
        router.
        """
        score_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=ops.wide_dtype(x_BTD))
        kept_BT = reached_BT = real_mask(tokens, score_BT)
        scale, draws = 1.0, tokens.mode.noise and tokens.mode.routing == "oracle"
        if tokens.forced_BT is not None:
            kept_BT = tokens.forced_BT & reached_BT
        elif draws and (rate := self.rate):
            kept_B = row_noise(tokens, self.placement.noise_key, len(x_BTD)) >= rate
            kept_BT = kept_B[:, None] & reached_BT
            scale = 1 / (1 - rate) if self.config.scaled else 1.0
        records = self.record(
            score_BT=score_BT, kept_BT=kept_BT, weight_BT=torch.where(kept_BT, scale, 0.0), reached_BT=reached_BT
        )
        if kept_BT is reached_BT:
            delta_BTD, inner = update(x_BTD, tokens)
            return delta_BTD, {**records, **inner}
        part = tokens.select_rows(kept_BT)
        if part.is_empty:
            return x_BTD * 0, records
        delta_BKD, inner = update(part.gather(x_BTD), tokens.select(part))
        return part.scatter(delta_BKD * scale), {**records, **lift(inner, part, tokens.state)}

    def stream_gate(self) -> StreamGate:
        return StreamGate(Scorer(), EVERY)  # it draws in training alone

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        if self.progress is not None:
            self.progress.advance(progress)

    def set_identity(self) -> None:
        """Set the probability with which a row of the batch skips the block in training to 0."""
        self.largest = 0.0

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return how many tokens of a row the block works on, given how many reach the mechanism (`counts`).

        Counts are means per row. kept: the tokens that it kept in a measured pass, as counts or as one number, which is
        used if given; None means that nothing was measured. oracle: whether this is a training pass; without a
        measurement, the share of rows is then reduced by the mean dropout rate over the training. Other passes keep
        all.
        """
        if kept is not None:
            return counts.restricted_to(kept)
        if not oracle:
            return counts
        mean = self.largest / (1 if self.progress is None else 2)
        inside = replace(counts, rows=counts.rows * (1 - mean))
        return (
            inside if counts.unpadded is None else replace(inside, unpadded=replace(counts.unpadded, rows=inside.rows))
        )

    def flops(self, tokens: float, routing: str) -> float:
        return 0
