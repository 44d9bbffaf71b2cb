"""A decoder block whose whole update, attention and MLP can each be wrapped in depth mechanisms.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.depth import DepthModule, DepthModules
from skipstone.core.records import Records, lift
from skipstone.core.routing_module import RoutingModule, fp32_names
from skipstone.core.seam import wrap
from skipstone.core.tokens import Tokens
from skipstone.core.width import FeedForward
from skipstone.nn.attention import Attention
from skipstone.ops.reference import added

CachedUpdate: TypeAlias = Callable[[Tensor, Tokens, SkipstoneCacheLayer | None], tuple[Tensor, Records]]

SEGMENT = "segment"  # a site around several blocks, which the decoder runs (`model/stack.py`)
SITES = (SEGMENT, "block", "attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The norms and scale with which a block's sub-layers (attention and MLP) read the residual stream and add to it.

    before_attention, before_mlp: norms of the sub-layers' inputs. after_attention, after_mlp: norms of the sub-layers'
    outputs. A norm that is None is left out. shared: whether the MLP's input is normalised by `before_attention` as
    well. parallel: whether the MLP reads the stream as it is before the attention is added. scale: factor on what each
    sub-layer adds.
    """

    before_attention: nn.Module | None = None
    before_mlp: nn.Module | None = None
    after_attention: nn.Module | None = None
    after_mlp: nn.Module | None = None
    shared: bool = False
    parallel: bool = False
    scale: float = 1.0


class Block(GradientCheckpointingLayer):
    """A decoder block of attention and MLP, in which depth mechanisms may decide which tokens are updated.

    attention, mlp: its sub-layers. residual: their norms and scale. mechanisms: its depth mechanisms by name. sites:
    what they wrap, as lists of their names, outermost first, under the keys "segment" (several neighbouring blocks),
    "block", "attention" and "mlp"; those around a segment are in `mechanisms` of the segment's first block only. span:
    number of blocks in the segment that begins here, 1 without one. around: the first block of the segment to which
    this block belongs; None if there is no segment or this is its first block. turned_by: which rotary angles its
    queries and keys get: "row", "window" (those of blocks with an attention window) or "none"; a block keeps them when
    blocks are removed, copied or exchanged.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: FeedForward,
        residual: Residual,
        mechanisms: Mapping[str, DepthModule],
        sites: Mapping[str, list[str]],
        span: int = 1,
        around: Block | None = None,
        turned_by: str = "row",
    ) -> None:
        super().__init__()
        self.span, self.turned_by = span, turned_by
        self._around: tuple[Block, ...] = (
            () if around is None else (around,)
        )  # in a tuple, so that it is not a child module
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = residual.before_attention, residual.before_mlp
        self.attention_output_layernorm, self.mlp_output_layernorm = residual.after_attention, residual.after_mlp
        self.shared_norm, self.parallel, self.residual_scale = residual.shared, residual.parallel, residual.scale
        self.mechanisms = DepthModules(mechanisms)
        self.sites = {site: list(sites.get(site, [])) for site in SITES}
        outside = {*self.sites[SEGMENT]}
        self._inside_names = [name for name in self.routing_modules() if name not in outside]

    def forward(self, x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None = None) -> tuple[Tensor, Records]:
        """Return the residual stream after this block, [B, T, D], and its mechanisms' decisions by name.

        x_BTD: the stream before the block. tokens: the tokens' slots (indices in the row), padding and documents, and
        how mechanisms decide. past_key_values: a cache with a `SkipstoneCacheLayer` for each block; None means no
        cache.
        """
        cache = None if past_key_values is None else past_key_values.layers[self.self_attn.layer_idx]
        if not self.sites["block"] and tokens.queries.is_all and tokens.unpadding is None:
            # (x + a) + m, in the order of the pretrained models: x + (a + m) rounds differently in bf16
            _, after_BTD, m_BTD, records = self._sublayers(x_BTD, tokens, cache)
            return added(after_BTD, m_BTD), self.complete(records, x_BTD)
        update = self._sum_of_sublayers if self.sites["attention"] or self.sites["mlp"] else self._fused
        delta_BTD, records = self._inside("block", update, x_BTD, tokens, cache)
        return added(x_BTD, delta_BTD), self.complete(records, x_BTD)

    def mechanism(self, name: str) -> DepthModule:
        """Return the depth mechanism called `name` in this block or around its segment of neighbouring blocks."""
        return self.mechanisms[name] if name in self.mechanisms else self._around[0].mechanisms[name]

    def segment_start(self) -> int | None:
        """Return the index of the first block of this block's segment, neighbouring blocks that share one decision.

        Returns None if there is no segment or this block is its first.
        """
        return self._around[0].self_attn.layer_idx if self._around else None

    def recorded(self) -> set[str]:
        """Return the names under which this block's decisions are returned: one per mechanism in or around it."""
        return {*self._inside_names, *self.sites[SEGMENT]}

    def routing_modules(self) -> dict[str, RoutingModule]:
        """Return all modules of this block that make decisions, by the names under which decisions are returned.

        The modules are its depth mechanisms, and those inside the MLP: an activation that mixes functions, a router of
        neuron groups, or a mixture of experts.
        """
        return {**self.mechanisms, **self.mlp.routing_modules()}

    def fp32_names(self) -> list[str]:
        """Return the names, within this block, of its mechanisms' tensors that stay fp32 in a model of any dtype."""
        named = [(name, module) for name, module in self.named_modules() if isinstance(module, RoutingModule)]
        return [name for prefix, module in named for name in fp32_names(prefix, module)]

    def complete(self, records: Records, x_BTD: Tensor) -> Records:
        """Return `records` (decisions by name) with an empty record for each mechanism that no token reached.

        Every call of the block thus returns records of the same names. x_BTD: the stream, from which empty records take
        [B, T] and the device.
        """
        if len(records) == len(self._inside_names):
            return records
        modules = self.routing_modules()
        missing = {name: modules[name].empty_record(x_BTD) for name in self._inside_names if name not in records}
        return {**records, **missing}

    def _inside(
        self, site: str, update: CachedUpdate, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Records]:
        """Return the result of `update` inside the mechanisms at one place of the block, and all records by name.

        site: the place, one of `SITES`. update: computes the block's, the attention's or the MLP's update. x_BTD: the
        stream before it. cache: the block's cache, or None.
        """
        names = self.sites[site]
        if not names:
            return update(x_BTD, tokens, cache)

        def bound(x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
            return update(x_BTD, tokens, cache)

        return wrap(bound, [self.mechanisms[name] for name in names])(x_BTD, tokens)

    def _fused(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> tuple[Tensor, Records]:
        """Return the sum of the attention's and the MLP's update, [B, T, D], and the records by name.

        The update is 0 for tokens that are not queries. It is for blocks without a mechanism around attention or MLP
        alone: query tokens are gathered once for both.
        """
        if tokens.no_queries:
            return self._remembered(x_BTD, tokens, cache), {}
        queries = tokens.query_tokens()
        a = self._attended(x_BTD, tokens, queries, cache)
        x = tokens.gather_queries(x_BTD)
        m, records = self._fed(x if self.parallel else added(x, a), queries, cache)
        return tokens.scatter_queries((a + m).to(x_BTD.dtype)), lift(records, tokens.queries, tokens.state)

    def _sum_of_sublayers(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Records]:
        """Return the sum of both updates, each inside the mechanisms of its own site."""
        a_BTD, _, m_BTD, records = self._sublayers(x_BTD, tokens, cache)
        return a_BTD + m_BTD, records

    def _sublayers(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Tensor, Tensor, Records]:
        """Return the attention's update, the stream after it, the MLP's update, and all records."""
        a_BTD, records = self._inside("attention", self._attention, x_BTD, tokens, cache)
        after_BTD = added(x_BTD, a_BTD)
        m_BTD, more = self._inside("mlp", self._mlp, x_BTD if self.parallel else after_BTD, tokens, cache)
        return a_BTD, after_BTD, m_BTD, {**records, **more}

    def _attention(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> tuple[Tensor, Records]:
        """Return the attention's update [B, T, D], 0 for tokens that are not queries."""
        if tokens.no_queries:
            return self._remembered(x_BTD, tokens, cache), {}
        return tokens.scatter_queries(self._attended(x_BTD, tokens, tokens.query_tokens(), cache)), {}

    def _mlp(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> tuple[Tensor, Records]:
        """Return the MLP's update [B, T, D], 0 for tokens that are not queries, and its records."""
        if tokens.no_queries:
            return torch.zeros_like(x_BTD), {}
        m, records = self._fed(tokens.gather_queries(x_BTD), tokens.query_tokens(), cache)
        return tokens.scatter_queries(m), lift(records, tokens.queries, tokens.state)

    def _remembered(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> Tensor:
        """Store keys and values of a call in which no token is a query, and return an update of zeros, [B, T, D]."""
        self.self_attn(_through(self.input_layernorm, x_BTD), tokens, cache)
        return torch.zeros_like(x_BTD)

    def _attended(self, x_BTD: Tensor, tokens: Tokens, queries: Tokens, cache: SkipstoneCacheLayer | None) -> Tensor:
        """Return the attention's update of the query tokens, [B, K, D], or [1, N, D] if they are concatenated.

        queries: the query tokens of `tokens`.
        """
        a = self.self_attn(_through(self.input_layernorm, x_BTD), tokens, cache, queries)
        return self._scaled(_through(self.attention_output_layernorm, a), queries)

    def _fed(self, x: Tensor, queries: Tokens, cache: SkipstoneCacheLayer | None) -> tuple[Tensor, Records]:
        """Return the MLP's update of the query tokens, shaped as x, and its records.

        x: the stream at the query tokens, [B, K, D], or [1, N, D] without padding. queries: these tokens.
        """
        read = self.input_layernorm if self.shared_norm else self.post_attention_layernorm
        m, records = self.mlp(_through(read, x), queries, cache)
        return self._scaled(_through(self.mlp_output_layernorm, m), queries), records

    def _scaled(self, y: Tensor, tokens: Tokens) -> Tensor:
        y = y if self.residual_scale == 1 else y * self.residual_scale
        return y if tokens.gain_BT is None else y * tokens.unpad(tokens.gain_BT)[..., None].to(y.dtype)


def _through(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
