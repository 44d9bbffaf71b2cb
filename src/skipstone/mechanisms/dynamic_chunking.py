"""Dynamic chunking (H-Net, Hwang et al. 2025, arXiv 2507.07955): learned boundaries, and a segment that runs at them.

    p_i = (1 - cos(W_q x_i, W_k x_(i-1))) / 2        1 for the first token of a document
    token i is kept if p_i > 1/2                     it begins a chunk
    z   = Stack(x_kept) - x_kept                     the blocks of the segment, on kept tokens alone
    h_k = p_k z_k + (1 - p_k) h_(k-1)                over kept tokens: smoothing, from 0
    x_i <- x_i + h_k(i)                              k(i): the last kept token up to i, so that others hold its update

    loss = weight * N / (N - 1) * ((N - 1) F G + (1 - F)(1 - G))       of a row: F: share kept, G: mean p, N = 1 / share

The router learns through the smoothing, through a factor equal to 1 on the held update with the gradient of p_i (kept)
or 1 - p_i (others), and through the ratio loss. It compares neighbouring tokens, so it needs the token before in the
cache, and the held update; both are stored for every token, so that a cache can be cropped. Differences from H-Net:
what is smoothed and held is the update of a stack of ordinary blocks on the model's own width, added to the stream
without a projection, so that a model whose tokens are all kept with p = 1 is the dense one. DLCM (arXiv 2512.24617) and
ConceptMoE (arXiv 2601.21420) are related.

Shape letters: B rows, T tokens, K kept tokens of a row, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.counts import TokenCounts
from skipstone.core.records import Records, lift
from skipstone.core.seam import Update
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.base import DepthMechanism, Placement, real_mask
from skipstone.mechanisms.contexts import Memory, linear_scan
from skipstone.ops import reference as ops
from skipstone.ops import score_linear

FLOAT_BYTES, SLOT_BYTES = 4, 8


@dataclass(frozen=True, kw_only=True)
class DynamicChunkingConfig:
    """The options of dynamic chunking, in which a router learns where chunks of tokens begin.

    share: the share of a document's tokens that H-Net's ratio loss, an auxiliary loss, pulls the router to keep, in (0,
    1); its inverse N is the intended mean chunk length in tokens. ratio_weight: the coefficient of the ratio loss, at
    least 0. Raises ValueError for values out of range.
    """

    share: float = 0.2
    ratio_weight: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must be above 0 and below 1, got {self.share}")
        if not self.ratio_weight >= 0:
            raise ValueError(f"ratio_weight must not be negative, got {self.ratio_weight}")


class DynamicChunking(DepthMechanism):
    """Dynamic chunking (H-Net, arXiv 2507.07955): some neighbouring blocks run only on tokens that begin a chunk.

    Token i begins a chunk if p_i = (1 - cos(W_q x_i, W_k x_(i-1))) / 2 exceeds 1/2. The update z that these blocks (a
    segment) compute for it is smoothed over chunks, h = p z + (1 - p) h_before, and every token receives the h of its
    chunk's first token. hidden_size: width of the model. placement: the segment's first block; None outside of a model.
    Options are the fields of `DynamicChunkingConfig`, as keyword arguments or as `config`. threshold: fp32 [],
    initially 0; a token begins a chunk if 2 p - 1 exceeds it.
    """

    Config = DynamicChunkingConfig
    default_layers = "1:-1"
    sites = ("segment",)
    has_auxiliary_loss = True
    threshold: Tensor

    def __init__(self, hidden_size: int, placement: Placement | None = None, **options: object) -> None:
        super().__init__(hidden_size, placement, **options)
        self.query_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.key_weight = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.register_buffer("threshold", torch.zeros(()))
        self.keeps_all = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both projections to the identity, and to 0 the threshold that 2 p - 1 must exceed for a chunk to begin.

        p: the probability that a chunk begins. The first comparisons are between neighbouring hidden states themselves.
        """
        init.eye_(self.query_weight)
        init.eye_(self.key_weight)
        init.zeros_(self.threshold)

    @property
    def capacity(self) -> float:
        """The share of the tokens that the auxiliary loss aims to keep; 1 after `set_identity`, which keeps all."""
        return 1.0 if self.keeps_all else float(self.config.share)

    @property
    def skips(self) -> bool:
        return not self.keeps_all

    @property
    def waits_in_training(self) -> bool:
        return self.skips

    def score_threshold(self) -> ScoreThreshold | None:
        return ChunkThreshold(self) if self.skips else None

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return for each token the smoothed update of its document's last kept token, [B, T, D], and the records.

        update: computes the wrapped blocks' update, as update(x, tokens) -> (update, records), for the kept tokens
        alone. x_BTD: the hidden states that enter the blocks. tokens: the tokens of this call. The records hold the
        decisions by mechanism name; a recorded score is 2 p - 1, where p is the probability that a chunk begins.
        """
        memory = Memory(tokens, tokens.memory, self.placement.name or type(self).__name__)
        key_BTD = score_linear(x_BTD, self.key_weight)
        before_BTD, has_BT = _before(key_BTD, tokens, memory)
        cosine_BT = F.cosine_similarity(score_linear(x_BTD, self.query_weight), before_BTD, dim=-1)
        score_BT = torch.where(has_BT, -cosine_BT, 1.0)
        reached_BT = real_mask(tokens, score_BT)
        kept_BT = reached_BT & self._keeps(score_BT, tokens)
        p_BT = (1 + score_BT) / 2
        used_BT = torch.ones_like(score_BT) if self.keeps_all else p_BT
        part = tokens.select_kept(kept_BT)
        z_BTD, inner = torch.zeros_like(x_BTD), Records()
        if not part.is_empty:
            z_BKD, inner = update(part.gather(x_BTD), tokens.select(part))
            z_BTD, inner = part.scatter(z_BKD), lift(inner, part, tokens.state)
        held_BTD = self._held(ops.wide(z_BTD), used_BT, kept_BT, tokens, memory)
        memory.keep(key=key_BTD, held=held_BTD, seen=torch.ones_like(key_BTD[..., :1]))
        chosen_BT = torch.where(kept_BT, used_BT, 1 - used_BT)
        held_BTD = held_BTD * (1 + chosen_BT - chosen_BT.detach())[..., None]
        records = self.record(
            score_BT=score_BT,
            kept_BT=kept_BT,
            weight_BT=torch.where(kept_BT, used_BT, 0.0),
            reached_BT=reached_BT,
            loss_BT=self._ratio_loss(p_BT, kept_BT, reached_BT, tokens),
        )
        delta_BTD = torch.where(reached_BT[..., None], held_BTD, 0.0).to(x_BTD.dtype)
        if tokens.gain_BT is not None:
            delta_BTD = delta_BTD * tokens.gain_BT[..., None].to(delta_BTD.dtype)
        return delta_BTD, {**records, **inner}

    def _keeps(self, score_BT: Tensor, tokens: Tokens) -> Tensor:
        if tokens.forced_BT is not None:
            return tokens.forced_BT
        return torch.ones_like(score_BT, dtype=torch.bool) if self.keeps_all else score_BT > self.threshold

    def _held(self, z_BTD: Tensor, p_BT: Tensor, kept_BT: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
        """Return for each token the smoothed update of the last kept token of its document, [B, T, D]; 0 without one.

        z_BTD: updates of the kept tokens. p_BT: probability that a chunk begins. kept_BT: bool. memory: gives the state
        of earlier calls.
        """
        earlier_B1D, here = memory.last("held"), memory.here()
        start_BTD = torch.zeros_like(z_BTD[:, :1]) if earlier_B1D is None else earlier_B1D * here
        if z_BTD.shape[1] == 1:
            new_B1D = p_BT[..., None] * z_BTD + (1 - p_BT)[..., None] * start_BTD
            return torch.where(kept_BT[..., None], new_B1D, start_BTD)
        start_BTD = start_BTD.expand_as(z_BTD)
        width = max(int(kept_BT.sum(1).max()), 1)
        index_BK = ops.compact(kept_BT, width)
        decay_BK = 1 - p_BT.gather(1, index_BK)
        u_BKD = ops.gather_rows(z_BTD, index_BK) * (1 - decay_BK)[..., None]
        at_BT = kept_BT.long().cumsum(1) - 1
        holds_BT, at_BT = at_BT >= 0, at_BT.clamp(min=0)
        if tokens.document_BT is not None:
            document_BT = tokens.document_BT.expand_as(kept_BT)
            document_BK = document_BT.gather(1, index_BK)
            same_BK = F.pad(document_BK[:, 1:] == document_BK[:, :-1], (1, 0), value=True)
            decay_BK = decay_BK * same_BK
            holds_BT = holds_BT & (document_BK.gather(1, at_BT) == document_BT)
        # tokens before the first kept one hold the state from before the call, unless another document began
        before_BT = kept_BT.long().cumsum(1) == 0
        first_BKD = ops.gather_rows(start_BTD, index_BK[:, :1]) * decay_BK[:, :1, None]
        u_BKD = torch.cat((u_BKD[:, :1] + first_BKD, u_BKD[:, 1:]), 1)
        smoothed_BTD = ops.gather_rows(linear_scan(u_BKD, decay_BK[..., None]), at_BT)
        return torch.where(before_BT[..., None], start_BTD, torch.where(holds_BT[..., None], smoothed_BTD, 0.0))

    def _ratio_loss(self, p_BT: Tensor, kept_BT: Tensor, reached_BT: Tensor, tokens: Tokens) -> Tensor | None:
        """Return the ratio loss of each token's row, fp32 [B, T], 0 for tokens that did not reach the mechanism.

        It includes its coefficient. None in passes that do not train the router: causal ones, and those whose decisions
        the caller imposes.
        """
        if tokens.mode.routing != "oracle" or tokens.forced_BT is not None:
            return None
        count_B1, length = reached_BT.sum(1, keepdim=True).clamp(min=1), 1 / self.config.share
        share_B1 = kept_BT.sum(1, keepdim=True) / count_B1
        mean_B1 = torch.where(reached_BT, p_BT, 0.0).sum(1, keepdim=True) / count_B1
        ratio_B1 = ((length - 1) * share_B1 * mean_B1 + (1 - share_B1) * (1 - mean_B1)) * length / (length - 1)
        return torch.where(reached_BT, ratio_B1 * self.config.ratio_weight, 0.0)

    def set_identity(self) -> None:
        """Let every token begin a chunk (p = 1), so that the model computes what it would without the mechanism."""
        self.keeps_all = True

    def end_dense_start(self) -> bool:
        """Let the router decide again, after `set_identity` kept every token; return True (something was undone)."""
        self.keeps_all = False
        return True

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return how many tokens of a row the wrapped blocks work on: `kept`; if None, the configured share.

        Counts are means per row. counts: the tokens that reach the mechanism. kept: those that it kept in a measured
        pass, as counts or as one number. `oracle` changes nothing, because training skips tokens by the same rule as
        generation.
        """
        return counts.restricted_to(self.capacity * counts.kv_tokens if kept is None else kept)

    def flops(self, tokens: float, routing: str) -> float:
        return 2 * tokens * (self.query_weight.numel() + self.key_weight.numel())

    def cache_bytes(self, tokens: float) -> float:
        return tokens * (FLOAT_BYTES * (2 * self.hidden_size + 1) + SLOT_BYTES)


def _before(key_BTD: Tensor, tokens: Tokens, memory: Memory) -> tuple[Tensor, Tensor]:
    """Return the key of the real token before each one, [B, T, D], and whether its document has one, bool [B, T].

    memory: gives the key of the newest token of earlier calls.
    """
    B, T = key_BTD.shape[:2]
    if tokens.real_BT is None:
        at_BT = torch.arange(-1, T - 1, device=key_BTD.device).expand(B, T)
    else:
        latest_BT = torch.where(tokens.real_BT, torch.arange(T, device=key_BTD.device), -1).expand(B, T)
        at_BT = F.pad(latest_BT.cummax(1).values[:, :-1], (1, 0), value=-1)
    leads_BT, at_BT = at_BT < 0, at_BT.clamp(min=0)
    before_BTD, has_BT = ops.gather_rows(key_BTD, at_BT), ~leads_BT
    if tokens.document_BT is not None:
        document_BT = tokens.document_BT.expand(B, T)
        has_BT = has_BT & (document_BT.gather(1, at_BT) == document_BT)
    last_B1D, seen_B11 = memory.last("key"), memory.last("seen")
    if last_B1D is None or seen_B11 is None:
        return before_BTD, has_BT
    known_BT = (seen_B11 * memory.here()).expand(B, T, 1).squeeze(-1) > 0
    return torch.where(leads_BT[..., None], last_B1D, before_BTD), torch.where(leads_BT, known_BT, has_BT)


class ChunkThreshold(ScoreThreshold):
    """Reads and sets the threshold of dynamic chunking on scores 2 p - 1, above which a token begins a chunk.

    The threshold is a buffer that is saved with the model, initially 0. p: the probability that a chunk begins.
    mechanism: the mechanism whose threshold this is.
    """

    def __init__(self, mechanism: DynamicChunking) -> None:
        self._mechanism = mechanism

    def get(self) -> float:
        return float(self._mechanism.threshold)

    def set(self, threshold: float) -> None:
        self._mechanism.threshold.fill_(threshold)
