"""Causal self-attention with grouped key/value heads, causal by slot.

Shape letters: B rows, T tokens given, K tokens that ask, C keys, H heads, E head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipstone.core.cache import EMPTY, SkipstoneCacheLayer
from skipstone.core.row_subset import RowSubset
from skipstone.core.tokens import Tokens
from skipstone.nn.linear import OutputLinear
from skipstone.ops import reference as ops

COPYING = 3  # times that memory is touched for a key that is copied before it is read
LEAST_COPY = 128  # keys of all rows, below which a copy costs next to nothing


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes and biases. `head_norm`: builds the norm of a head's queries and keys (QK-norm), or None."""

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    dropout: float = 0.0
    residual_dropout: float = 0.0
    head_norm: Callable[[int], nn.Module] | None = None


class Attention(nn.Module):
    """softmax(q k / sqrt(E)) v over the keys whose slot is not later, in the same document.

    `config` only names the attention implementation (`config._attn_implementation`).
    """

    is_causal = True

    def __init__(self, shape: AttentionShape, config: Any, layer_idx: int) -> None:
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
        self, x_BTD: Tensor, tokens: Tokens, past_key_values: Cache | None = None, asking: Tokens | None = None
    ) -> Tensor:
        """Update of the query tokens, [B, K, D] or unpadded: all T unless `tokens.queries` names some of them.

        asking: `tokens.query_tokens()`, where the caller has it.
        """
        given = tokens.unpad(x_BTD)
        if tokens.no_queries:
            key, value = self._keys(given, tokens)
            if past_key_values is not None:
                self._append(key, value, tokens, past_key_values, None)
            return x_BTD[:, :0]
        asking = asking or tokens.query_tokens()
        asking_x = given if tokens.queries is None else tokens.gather_queries(x_BTD)
        query = self._heads(asking.pad(self.q_proj(asking_x)), self.q_norm, asking.rotary)
        key, value = self._keys(given, tokens)
        among = None if query.requires_grad else self._among(asking, past_key_values)
        rows = asking.rows if among is None else None
        key, value, mask = self._seen(key, value, tokens, asking, past_key_values, rows)
        query = query if among is None else among.scatter(query)
        y_BKHE = self._attend(query, key, value, mask)
        y_BKHE = y_BKHE if among is None else among.gather(y_BKHE)
        y_BKD = self.o_proj(asking.unpad(y_BKHE.flatten(2)))
        return ops.dropped(y_BKD, self.residual_dropout, self.training)

    def _keys(self, given: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, E] of all tokens that are given, unpadded or not."""
        key = self._heads(tokens.pad(self.k_proj(given)), self.k_norm, tokens.rotary)
        return key, self._heads(tokens.pad(self.v_proj(given)))

    def _append(
        self, key: Tensor, value: Tensor, tokens: Tokens, past_key_values: Cache, rows: RowSubset | None
    ) -> tuple[Tensor, Tensor]:
        """Into the cache; all that is there afterwards, of these rows (None: of all)."""
        return past_key_values.update(  # type: ignore[no-any-return]
            key,
            value,
            self.layer_idx,
            slot_BT=tokens.slot_BT,
            real_BT=tokens.real_BT,
            document_BT=tokens.document_BT,
            rows=tokens.rows,
            asking=rows,
        )

    def _heads(self, y: Tensor, norm: nn.Module | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        y_BTHE = y.unflatten(-1, (-1, self.head_dim))
        y_BHTE = (y_BTHE if norm is None else norm(y_BTHE)).transpose(1, 2)
        return y_BHTE if rotary is None else ops.rotate(y_BHTE, *rotary)

    def _seen(
        self,
        key: Tensor,
        value: Tensor,
        tokens: Tokens,
        asking: Tokens,
        past_key_values: Cache | None,
        rows: RowSubset | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask that the queries see; without a cache, or with an empty one, this call's own.

        rows: whose stored ones; None: all. The mask is None where slots need not be compared: a sorted row on itself,
        or one newest token on all.
        """
        if past_key_values is None:
            return self._own(key, value, tokens, asking)
        layer = past_key_values.layers[self.layer_idx]
        assert isinstance(layer, SkipstoneCacheLayer)
        first = layer.kv.width == 0
        all_keys, all_values = self._append(key, value, tokens, past_key_values, rows)
        if first:
            return self._own(key, value, tokens, asking)
        newest = tokens.length == 1 and tokens.document_BT is None
        if newest and layer.kv.even(rows):  # padding, too, sees all that is there
            return all_keys, all_values, None
        document = layer.kv.view("document", rows) if tokens.document_BT is not None else None
        return all_keys, all_values, slot_mask(layer.kv.view("slot", rows), document, asking)

    def _among(self, asking: Tokens, past_key_values: Cache | None) -> RowSubset | None:
        """The rows that ask, where all rows had better attend: else the stored keys of those that ask are copied."""
        rows = asking.rows
        if rows is None or past_key_values is None or len(rows.at) == 1 or COPYING * len(rows.at) <= rows.total:
            return None
        alike = asking.slot_BT.shape[0] == 1 and asking.real_BT is None and asking.document_BT is None
        width = past_key_values.layers[self.layer_idx].kv.width  # type: ignore[attr-defined]
        return rows if alike and width > 0 and rows.total * width >= LEAST_COPY else None

    def _own(self, key: Tensor, value: Tensor, tokens: Tokens, asking: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """This call's own keys and values, and the mask where slots must be compared."""
        part = tokens.queries
        if part is not None and part.rows is not None:  # one token a row, which sees itself
            return part.rows.gather(key), part.rows.gather(value), None
        if part is None and tokens.document_BT is None and (tokens.real_BT is None or tokens.aligned):
            return key, value, None
        slot_BT = tokens.slot_BT
        if tokens.real_BT is not None:
            slot_BT = torch.where(tokens.real_BT, slot_BT, EMPTY)
        return key, value, slot_mask(slot_BT, tokens.document_BT, asking)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        implementation = self.config._attn_implementation
        if implementation != "sdpa":
            mask = _additive(_by_column(query) if mask is None and query.shape[2] > 1 else mask, query)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        y_BKHE, _ = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling)
        return y_BKHE


def slot_mask(key_slot_BC: Tensor, key_document_BC: Tensor | None, asking: Tokens) -> Tensor:
    """bool [B, 1, K, C]: who may see whom. Padding that asks sees everything, which keeps its softmax finite."""
    slot_BK, real_BK = asking.slot_BT, asking.real_BT
    if real_BK is not None:
        slot_BK = torch.where(real_BK, slot_BK, EMPTY)
    mask = key_slot_BC[:, None, :] <= slot_BK[:, :, None]
    if key_document_BC is not None and asking.document_BT is not None:
        mask = mask & (key_document_BC[:, None, :] == asking.document_BT[:, :, None])
        mask = mask if real_BK is None else mask | ~real_BK[:, :, None]
    return mask[:, None]


def _by_column(query_BHTE: Tensor) -> Tensor:
    """What SDPA's `is_causal` means: bool [1, 1, T, T]. Not by slot: padding behind a gathered row has earlier ones."""
    at_T = torch.arange(query_BHTE.shape[2], device=query_BHTE.device)
    return (at_T <= at_T[:, None])[None, None]


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
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
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """The plain formula with an additive mask, under the signature of transformers' attention interface."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)  # type: ignore[arg-type]
    logits_BHKC = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        logits_BHKC = logits_BHKC + attention_mask
    weight_BHKC = nn.functional.dropout(
        logits_BHKC.softmax(-1, dtype=ops.wide_dtype(logits_BHKC)).to(query.dtype), dropout
    )
    return (weight_BHKC @ value).transpose(1, 2), weight_BHKC
