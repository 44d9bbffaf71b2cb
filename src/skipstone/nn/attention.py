"""Causal self-attention with grouped key/value heads; causality is by slot.

Shape letters: B rows, T tokens given, K query tokens, C keys, H heads, E head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipstone.core.cache import EMPTY, RaggedStore, SkipstoneCacheLayer
from skipstone.core.row_subset import RowSubset
from skipstone.core.selection import WholeRows
from skipstone.core.tokens import Tokens
from skipstone.nn.linear import OutputLinear
from skipstone.ops import reference as ops

Seen: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # keys, values, and a mask if slots must be compared

COPYING = 3  # memory accesses for a key that is copied before it is read
LEAST_COPY = 128  # keys of all rows; copying fewer takes negligible time


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes, biases and dropout of an attention layer.

    head_norm: builds the norm of each head's queries and keys (QK-norm); None: no norm.
    """

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    dropout: float = 0.0
    residual_dropout: float = 0.0
    head_norm: Callable[[int], nn.Module] | None = None


class AttentionConfig(Protocol):
    """A configuration that names the attention implementation, as transformers' configurations do."""

    _attn_implementation: str


class Attention(nn.Module):
    """Self-attention, softmax(q k / sqrt(E)) v, over keys of the same document whose slot is not later.

    config: used only for the name of the attention implementation (`config._attn_implementation`).
    """

    is_causal = True

    def __init__(self, shape: AttentionShape, config: AttentionConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, shape.head_dim
        self.num_key_value_groups = shape.num_heads // shape.num_key_value_heads
        self.scaling = shape.head_dim**-0.5
        self.dropout, self.residual_dropout = shape.dropout, shape.residual_dropout
        inner, grouped = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, inner, bias=shape.bias)
        self.k_proj = nn.Linear(shape.hidden_size, grouped, bias=shape.bias)
        self.v_proj = nn.Linear(shape.hidden_size, grouped, bias=shape.bias)
        self.o_proj = OutputLinear(inner, shape.hidden_size, bias=shape.output_bias)
        self.q_norm = shape.head_norm(shape.head_dim) if shape.head_norm else None
        self.k_norm = shape.head_norm(shape.head_dim) if shape.head_norm else None

    def forward(
        self,
        x_BTD: Tensor,
        tokens: Tokens,
        cache: SkipstoneCacheLayer | None = None,
        queries: Tokens | None = None,
    ) -> Tensor:
        """Return the update of the query tokens, [B, K, D] or unpadded; keys and values of all tokens are stored.

        queries: `tokens.query_tokens()`, if the caller has it already.
        """
        x = tokens.unpad(x_BTD)
        key, value = self._keys_and_values(x, tokens)
        if tokens.no_queries:
            self._store(key, value, tokens, cache)
            return x_BTD[:, :0]
        queries = queries or tokens.query_tokens()
        asking = x if tokens.queries.is_all else tokens.queries.gather_unpadded(x_BTD)
        query = self._heads(queries.pad(self.q_proj(asking)), self.q_norm, queries.rotary)
        if self._store(key, value, tokens, cache):
            y_BKHE = self._attend(query, *self._own(key, value, tokens, queries))
        else:
            assert cache is not None
            y_BKHE = self._attend_stored(query, tokens, queries, cache.kv)
        y_BKD = self.o_proj(queries.unpad(y_BKHE.flatten(2)))
        return ops.dropped(y_BKD, self.residual_dropout, self.training)

    def _keys_and_values(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, T, E] of all tokens; x may be unpadded."""
        key = self._heads(tokens.pad(self.k_proj(x)), self.k_norm, tokens.rotary)
        return key, self._heads(tokens.pad(self.v_proj(x)))

    def _heads(self, y: Tensor, norm: nn.Module | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Split into heads [B, H, T, E], normalised and rotated if asked for."""
        y_BTHE = y.unflatten(-1, (-1, self.head_dim))
        y_BHTE = (y_BTHE if norm is None else norm(y_BTHE)).transpose(1, 2)
        return y_BHTE if rotary is None else ops.rotate(y_BHTE, *rotary)

    def _store(self, key: Tensor, value: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> bool:
        """Append to the cache, if there is one; return whether this call's own keys are all there are."""
        if cache is None:
            return True
        was_empty = cache.kv.width == 0
        cache.append(key, value, tokens.slot_BT, tokens.real_BT, tokens.document_BT, tokens.rows)
        return was_empty

    def _own(self, key: Tensor, value: Tensor, tokens: Tokens, queries: Tokens) -> Seen:
        """Return this call's own keys and values, without a mask where a sorted row attends to itself."""
        if isinstance(tokens.queries, WholeRows):  # one token per row, which attends to itself
            return tokens.queries.gather(key), tokens.queries.gather(value), None
        sorted_rows = tokens.document_BT is None and (tokens.real_BT is None or tokens.aligned)
        if tokens.queries.is_all and sorted_rows:
            return key, value, None
        slot_BT = tokens.slot_BT
        if tokens.real_BT is not None:
            slot_BT = torch.where(tokens.real_BT, slot_BT, EMPTY)
        return key, value, slot_mask(slot_BT, tokens.document_BT, queries)

    def _attend_stored(self, query: Tensor, tokens: Tokens, queries: Tokens, kv: RaggedStore) -> Tensor:
        """Attend to all stored keys, including this call's.

        If only some rows have queries, either their stored keys are copied, or all rows attend and the results of the
        others are discarded, whichever touches less memory.
        """
        rows = queries.rows
        if rows is not None and not query.requires_grad and _all_rows_are_cheaper(queries, rows, kv):
            seen = self._stored(tokens, queries, kv, None)
            return rows.gather(self._attend(rows.scatter(query), *seen))
        return self._attend(query, *self._stored(tokens, queries, kv, rows))

    def _stored(self, tokens: Tokens, queries: Tokens, kv: RaggedStore, rows: RowSubset | None) -> Seen:
        """Return stored keys and values of these rows (None: all), without a mask if the newest token attends to all of
        them.
        """
        key, value = kv.view("key", rows).transpose(1, 2), kv.view("value", rows).transpose(1, 2)
        newest = tokens.length == 1 and tokens.document_BT is None
        if newest and kv.even(rows):  # padding, too, attends to all keys
            return key, value, None
        document_BC = None if tokens.document_BT is None else kv.view("document", rows)
        return key, value, slot_mask(kv.view("slot", rows), document_BC, queries)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Run the configured attention implementation; returns [B, K, H, E]."""
        implementation = self.config._attn_implementation
        if implementation != "sdpa":
            mask = _additive(_by_column(query) if mask is None and query.shape[2] > 1 else mask, query)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        y_BKHE, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return y_BKHE


def _all_rows_are_cheaper(queries: Tokens, rows: RowSubset, kv: RaggedStore) -> bool:
    """Return whether attending in all rows touches less memory than first copying the stored keys of `rows`."""
    if len(rows.at) == 1 or COPYING * len(rows.at) <= rows.total or rows.total * kv.width < LEAST_COPY:
        return False
    return queries.slot_BT.shape[0] == 1 and queries.real_BT is None and queries.document_BT is None


def slot_mask(key_slot_BC: Tensor, key_document_BC: Tensor | None, queries: Tokens) -> Tensor:
    """Return which keys each query may attend to, bool [B, 1, K, C].

    Padding among the queries attends to everything, so that its softmax stays finite.
    """
    slot_BK, real_BK = queries.slot_BT, queries.real_BT
    if real_BK is not None:
        slot_BK = torch.where(real_BK, slot_BK, EMPTY)
    mask = key_slot_BC[:, None, :] <= slot_BK[:, :, None]
    if key_document_BC is not None and queries.document_BT is not None:
        mask = mask & (key_document_BC[:, None, :] == queries.document_BT[:, :, None])
        mask = mask if real_BK is None else mask | ~real_BK[:, :, None]
    return mask[:, None]


def _by_column(query_BHTE: Tensor) -> Tensor:
    """Return the mask of SDPA's `is_causal`, bool [1, 1, T, T]: by column, because padding after a gathered row has
    earlier slots.
    """
    at_T = torch.arange(query_BHTE.shape[2], device=query_BHTE.device)
    return (at_T <= at_T[:, None])[None, None]


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Turn a bool mask into one that is added to logits."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, torch.finfo(like.dtype).min)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Compute attention by the plain formula with an additive mask, with the signature of transformers' attention
    interface.
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)  # type: ignore[arg-type]
    logits_BHKC = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits_BHKC = logits_BHKC + attention_mask
    weight_BHKC = nn.functional.dropout(
        logits_BHKC.softmax(-1, dtype=ops.wide_dtype(logits_BHKC)).to(query.dtype), dropout
    )
    return (weight_BHKC @ value).transpose(1, 2), weight_BHKC
