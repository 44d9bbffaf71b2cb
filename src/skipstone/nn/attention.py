"""Causal self-attention with grouped key/value heads.

A query sees the keys in its own and earlier slots of its document. A slot is a token's index in its row, padding and
skipped tokens counted.

Shape letters: B rows, T tokens given, K query tokens, C keys, H heads, E head size, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.ragged_store import EMPTY, RaggedStore
from skipstone.core.row_subset import RowSubset
from skipstone.core.selection import WholeRows
from skipstone.core.strict import unknown
from skipstone.core.tokens import Tokens
from skipstone.nn import windows
from skipstone.nn.linear import OutputLinear
from skipstone.nn.norm import HeadNorm
from skipstone.nn.windows import closes, pairs, slot_mask
from skipstone.ops import decode_step
from skipstone.ops import reference as ops

Seen: TypeAlias = tuple[Tensor, Tensor, Tensor | None]  # keys, values, and a mask if slots must be compared

CAPPING = {"eager"}  # names of the implementations that cap scores; others may be added
HALVES = {"float": False, "float16": True}  # by `cache_format`
COPYING = 3  # memory accesses for a key that is copied before it is read
LEAST_COPY = 128  # keys of all rows; copying fewer takes negligible time


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The sizes, biases, dropout and score settings of an attention layer.

    hidden_size: width of the residual stream. num_heads, num_key_value_heads: numbers of query heads and of key/value
    heads; the second divides the first. head_dim: features per head. bias: whether the query, key and value projections
    have biases; output_bias: whether the output projection has. dropout: dropout probability for attention weights;
    residual_dropout: dropout probability for the layer's output. norm: builds the norm of queries and keys (QK-norm)
    from its width; None means no norm. norm_over: what it normalises: "head" (each head, one shared weight),
    "each_head" (each head, with a weight of its own) or "all_heads" (all heads together). scale: factor on q k; None
    means 1/sqrt(head_dim). soft_cap: c, if scores become c tanh(score / c); None means no cap. window: number of slots
    (indices in the row, skipped tokens counted) that a query sees, its own included; None means all of them.
    """

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    output_bias: bool = False
    dropout: float = 0.0
    residual_dropout: float = 0.0
    norm: Callable[[int], nn.Module] | None = None
    norm_over: str = "head"
    scale: float | None = None
    soft_cap: float | None = None
    window: int | None = None


class AttentionConfig(Protocol):
    """A configuration that names the attention implementation in `_attn_implementation`, as transformers' do.

    cache_format: "float16" if caches are to hold keys and values in fp16, else "float".
    """

    _attn_implementation: str
    cache_format: str


class Attention(nn.Module):
    """Causal self-attention, softmax(q k / sqrt(E)) v for heads of E features, with grouped key/value heads.

    A query sees keys of its own document in its own and earlier slots (a slot is a token's index in its row, padding
    and skipped tokens counted); with `shape.window`, only in the last `shape.window` of these. shape: sizes and
    settings. config: read only for the name of the attention implementation (`config._attn_implementation`) and the
    format of the cache (`config.cache_format`). layer_idx: index of the block.
    """

    is_causal = True

    def __init__(self, shape: AttentionShape, config: AttentionConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, shape.head_dim
        self.num_key_value_groups = shape.num_heads // shape.num_key_value_heads
        self.scaling = shape.head_dim**-0.5 if shape.scale is None else shape.scale
        self.soft_cap, self.window, self.norm_over_all_heads = (
            shape.soft_cap,
            shape.window,
            shape.norm_over == "all_heads",
        )
        self.dropout, self.residual_dropout = shape.dropout, shape.residual_dropout
        inner, grouped = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, inner, bias=shape.bias)
        self.k_proj = nn.Linear(shape.hidden_size, grouped, bias=shape.bias)
        self.v_proj = nn.Linear(shape.hidden_size, grouped, bias=shape.bias)
        self.o_proj = OutputLinear(inner, shape.hidden_size, bias=shape.output_bias)
        self.q_norm, self.k_norm = (_qk_norm(shape, heads) for heads in (shape.num_heads, shape.num_key_value_heads))

    def forward(
        self,
        x_BTD: Tensor,
        tokens: Tokens,
        cache: SkipstoneCacheLayer | None = None,
        queries: Tokens | None = None,
    ) -> Tensor:
        """Return the attention's output for the query tokens, [B, K, D], or [1, N, D] if padding is removed.

        x_BTD: normalised residual stream of all T tokens. tokens: their slots (indices in the row), padding, documents
        and rotary angles, which K of them are queries (get an update), and whether padding is removed, so that the N
        query tokens of all rows follow each other. cache: stores keys and values of all T tokens, and supplies those of
        earlier calls; with None, only this call's keys are attended to. queries: the K query tokens, if the caller has
        selected them from `tokens` already; None means that they are selected here.
        """
        if cache is not None and tokens.mode.single_token and self._steps(x_BTD, tokens, cache.kv):
            return self.o_proj(self._newest(x_BTD, tokens, cache.kv))
        x = tokens.unpad(x_BTD)
        key, value = self._keys_and_values(x, tokens)
        if cache is not None:  # this call attends to what later ones will find
            key, value = (cache.as_stored(each, self.halves) for each in (key, value))
        if tokens.no_queries:
            self._store(key, value, tokens, cache)
            return x_BTD[:, :0]
        queries = queries or tokens.query_tokens()
        asking = x if tokens.queries.is_all else tokens.queries.gather_unpadded(x_BTD)
        query = self._heads(queries.pad(self.q_proj(asking)), self.q_norm, queries.rotary)
        if self._store(key, value, tokens, cache):
            y_BKHE = self._attend_own(query, key, value, tokens, queries)
        else:
            assert cache is not None
            y_BKHE = self._attend_stored(query, tokens, queries, cache.kv)
        y_BKD = self.o_proj(queries.unpad(y_BKHE.flatten(2)))
        return ops.dropped(y_BKD, self.residual_dropout, self.training)

    @property
    def halves(self) -> bool:
        """Whether caches are to hold keys and values in fp16 if they are wider than 16 bits.

        True for `config.cache_format` "float16", False for "float"; any other value raises ValueError.
        """
        if (kind := self.config.cache_format) not in HALVES:
            raise ValueError(unknown("cache_format", kind, HALVES))
        return HALVES[kind]

    def _steps(self, x_BTD: Tensor, tokens: Tokens, kv: RaggedStore) -> bool:
        """Return whether the compiled operation for a decoding step can compute this call of one token.

        kv: the layer's stored keys and values.
        """
        plain = tokens.queries.is_all and tokens.rows is None and tokens.real_BT is None and tokens.document_BT is None
        if not plain or type(kv) is not RaggedStore or kv.width == 0:
            return False
        if self.window is not None or self.soft_cap is not None or self.norm_over_all_heads:
            return False
        if self.training or self.config._attn_implementation != "sdpa" or "document" in kv.entries:
            return False
        if tokens.rotary is not None and tokens.rotary[0].shape[-1] != self.head_dim:  # a part of each head is rotated
            return False
        return decode_step.takes(x_BTD) and decode_step.extends(kv.entries["key"])

    def _newest(self, x_11D: Tensor, tokens: Tokens, kv: RaggedStore) -> Tensor:
        """Store the key and value of the call's only token, and return the attention output for it, [1, 1, H E].

        x_11D: its normalised residual stream. kv: the layer's stored keys and values.
        """
        query, key, value = self.q_proj(x_11D), self.k_proj(x_11D), self.v_proj(x_11D)
        query = query if self.q_norm is None else self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(2)
        key = key if self.k_norm is None else self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(2)
        column = kv.new_columns()
        return decode_step.attend_newest(
            query, key, value, tokens.rotary, kv.entries, tokens.slot_BT, column, self.scaling
        )

    def _keys_and_values(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of all tokens, [B, H, T, E] each, keys rotated.

        x: normalised residual stream, [B, T, D], or [1, N, D] without padding if `tokens.unpadding` is set.
        """
        key = self._heads(tokens.pad(self.k_proj(x)), self.k_norm, tokens.rotary)
        return key, self._heads(tokens.pad(self.v_proj(x)))

    def _heads(self, y: Tensor, norm: nn.Module | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if norm is not None and self.norm_over_all_heads:
            y, norm = norm(y), None
        y_BTHE = y.unflatten(-1, (-1, self.head_dim))
        y_BHTE = (y_BTHE if norm is None else norm(y_BTHE)).transpose(1, 2)
        return y_BHTE if rotary is None else ops.rotate(y_BHTE, *rotary)

    def _store(self, key: Tensor, value: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> bool:
        """Append keys and values, [B, H, T, E], to the cache, if there is one.

        Return whether this call's keys are all that there are: without a cache, or if it was empty.
        """
        if cache is None:
            return True
        was_empty, cache.window = cache.kv.width == 0, self.window
        cache.append(key, value, tokens.slot_BT, tokens.real_BT, tokens.document_BT, tokens.rows)
        return was_empty

    def _attend_own(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, queries: Tokens) -> Tensor:
        """Return the attention output [B, K, H, E] over this call's keys alone.

        With a window, it is computed in chunks (`windows.in_bands`) if that needs fewer scores. query: [B, H, K, E].
        key, value: [B, H, T, E]. queries: the K query tokens among `tokens`.
        """
        B, T = query.shape[0], tokens.length
        in_bands = tokens.queries.is_all and closes(self.window, tokens) and pairs(T, self.window) < T * T
        if not in_bands:
            return self._attend(query, *self._own(key, value, tokens, queries))
        assert self.window is not None
        q, k, v, mask = windows.in_bands(query, key, value, tokens, self.window)
        return windows.out_of_bands(self._attend(q, k, v, mask), B, T)

    def _own(self, key: Tensor, value: Tensor, tokens: Tokens, queries: Tokens) -> Seen:
        """Return the keys and values of this call, and the attention mask, bool [B, 1, K, T], True where allowed.

        The mask is None if plain causal attention (SDPA's `is_causal`) is right: rows begin with their first real
        token, are one document each, and all of their tokens are queries; or each row has one token only.
        """
        if isinstance(tokens.queries, WholeRows):  # one token a row, which sees itself
            return tokens.queries.gather(key), tokens.queries.gather(value), None
        sorted_rows = tokens.document_BT is None and (tokens.real_BT is None or tokens.aligned)
        if tokens.queries.is_all and sorted_rows and not closes(self.window, tokens):
            return key, value, None
        slot_BT = tokens.slot_BT
        if tokens.real_BT is not None:
            slot_BT = torch.where(tokens.real_BT, slot_BT, EMPTY)
        return key, value, slot_mask(slot_BT, tokens.document_BT, queries, self._closed(tokens))

    def _closed(self, tokens: Tokens) -> int | None:
        """Return the window if it hides any key of the rows, else None."""
        return self.window if closes(self.window, tokens) else None

    def _attend_stored(self, query: Tensor, tokens: Tokens, queries: Tokens, kv: RaggedStore) -> Tensor:
        """Return the attention output [B, K, H, E] over all stored keys, this call's included.

        query: [B, H, K, E]. queries: the K query tokens. kv: the layer's stored keys and values. If only some rows have
        queries, either their stored keys are copied, or all rows attend and the results of the others are discarded,
        whichever touches less memory.
        """
        rows = queries.rows
        if rows is not None and not query.requires_grad and _all_rows_are_cheaper(queries, rows, kv):
            seen = self._stored(tokens, queries, kv, None)
            return rows.gather(self._attend(rows.scatter(query), *seen))
        return self._attend(query, *self._stored(tokens, queries, kv, rows))

    def _stored(self, tokens: Tokens, queries: Tokens, kv: RaggedStore, rows: RowSubset | None) -> Seen:
        """Return the stored keys and values of some rows, [B, H, C, E] each, and the attention mask, bool [B, 1, K, C].

        The mask is None if the call has one token per row and it attends to every stored key. rows: None means all
        rows.
        """
        window = self._closed(tokens)
        newest = None if window is None else window - 1 + tokens.length  # no more columns hold what a window reaches
        key, value = (kv.view(name, rows, newest).transpose(1, 2) for name in ("key", "value"))
        if window is None and tokens.length == 1 and tokens.document_BT is None and kv.even(rows):
            return key, value, None  # padding, too, sees all that is there
        document_BC = None if tokens.document_BT is None else kv.view("document", rows, newest)
        return key, value, slot_mask(kv.view("slot", rows, newest), document_BC, queries, window)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        implementation = self.config._attn_implementation
        if self.soft_cap is not None and implementation not in CAPPING:
            implementation = "eager"
        if implementation != "sdpa":
            mask = _additive(_by_column(query) if mask is None and query.shape[2] > 1 else mask, query)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        given = {"dropout": self.dropout if self.training else 0.0, "scaling": self.scaling}
        key, value = key.to(query.dtype), value.to(query.dtype)  # of a cache in fp16
        if self.soft_cap is not None:
            given["softcap"] = self.soft_cap
        y_BKHE, _ = attend(self, query, key, value, mask, **given)
        return y_BKHE


def _qk_norm(shape: AttentionShape, heads: int) -> nn.Module | None:
    """Return the norm of queries (or keys), None without QK-norm. heads: the number of query (or key) heads."""
    if shape.norm is None:
        return None
    if shape.norm_over == "each_head":
        return HeadNorm(shape.norm(shape.head_dim), heads)
    return shape.norm(heads * shape.head_dim if shape.norm_over == "all_heads" else shape.head_dim)


def _all_rows_are_cheaper(queries: Tokens, rows: RowSubset, kv: RaggedStore) -> bool:
    """Return whether attending in all rows touches less memory than first copying the stored keys of `rows`.

    queries: the query tokens of these rows. kv: the stored keys and values of all rows.
    """
    if len(rows.at) == 1 or COPYING * len(rows.at) <= rows.total or rows.total * kv.width < LEAST_COPY:
        return False
    return queries.slot_BT.shape[0] == 1 and queries.real_BT is None and queries.document_BT is None


def _by_column(query_BHTE: Tensor) -> Tensor:
    """Return the mask that SDPA's `is_causal` stands for, bool [1, 1, T, T]: column i may see columns up to i.

    It compares columns and not slots, because padding at the end of a gathered row has lower slots than the tokens
    before.
    """
    at_T = torch.arange(query_BHTE.shape[2], device=query_BHTE.device)
    return (at_T <= at_T[:, None])[None, None]


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """Return a mask to be added to scores: 0 where the bool `mask` is True, the lowest finite number elsewhere.

    The result is None if `mask` is None. like: a tensor that gives dtype and device.
    """
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
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """Compute attention by the plain formula, with the signature of transformers' attention interface.

    module: supplies `num_key_value_groups`, the number of query heads per key/value head. query: [B, H, K, E] (rows,
    heads, queries, features). key, value: [B, H / groups, C, E]. attention_mask: added to the scores, [B or 1, 1, K,
    C]; None means that all keys are visible. scaling: factor on the scores. dropout: dropout probability for the
    attention weights. softcap: c, if scores become c tanh(score / c); None means no cap. kwargs: ignored. Returns the
    output [B, K, H, E] and the weights [B, H, K, C].
    """
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)  # type: ignore[arg-type]
    logits_BHKC = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        logits_BHKC = (logits_BHKC / softcap).tanh() * softcap
    if attention_mask is not None:
        logits_BHKC = logits_BHKC + attention_mask
    weight_BHKC = nn.functional.dropout(
        logits_BHKC.softmax(-1, dtype=ops.wide_dtype(logits_BHKC)).to(query.dtype), dropout
    )
    return (weight_BHKC @ value).transpose(1, 2), weight_BHKC
