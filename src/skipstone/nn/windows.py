"""Attention with a sliding window of slots: its mask, its cost, and a banded form for rows longer than the window.

A slot is a token's index in its row. A window of W counts slots, not stored entries: a query in slot s sees the keys in
slots s - W + 1 to s. The slots of a row ascend and differ, so these keys lie in at most W adjacent columns, even if
tokens between them skipped the block.

Shape letters: B rows, T tokens, K queries, C keys, H heads, E head size, N chunks of W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.ragged_store import EMPTY
from skipstone.core.tokens import Tokens


def slot_mask(
    key_slot_BC: Tensor, key_document_BC: Tensor | None, queries: Tokens, window: int | None = None
) -> Tensor:
    """Return the causal attention mask by slots (indices in the row), bool [B, 1, K, C]; True lets a query see a key.

    key_slot_BC: int64, slots of C keys. key_document_BC: int64, their documents; None means one per row. queries: the K
    query tokens. window: number of slots that a query sees, its own included; None means all of them. A query sees keys
    of its own document in its own and earlier slots. Queries that are padding see every key, so that their softmax
    stays finite.
    """
    slot_BK, real_BK = queries.slot_BT, queries.real_BT
    if real_BK is not None:
        slot_BK = torch.where(real_BK, slot_BK, EMPTY)
    mask = key_slot_BC[:, None, :] <= slot_BK[:, :, None]
    narrowed = False
    if window is not None:
        mask, narrowed = mask & (key_slot_BC[:, None, :] > slot_BK[:, :, None] - window), True
    if key_document_BC is not None and queries.document_BT is not None:
        mask, narrowed = mask & (key_document_BC[:, None, :] == queries.document_BT[:, :, None]), True
    if narrowed and real_BK is not None:
        mask = mask | ~real_BK[:, :, None]
    return mask[:, None]


def closes(window: int | None, tokens: Tokens) -> bool:
    """Return whether an attention window may hide any key of these rows from any query.

    window: number of slots (indices in the row) that a query sees; None means all of them. tokens: the tokens of the
    call. True also if the host does not know the distances between slots (`tokens.reach` is None).
    """
    return window is not None and (tokens.reach is None or tokens.reach > window)


def pairs(length: float, window: int | None) -> float:
    """Return the number of attention scores per head that are computed for a row attending to itself.

    It is the smaller of two numbers: that of all pairs of a query and a key, masked ones included, and that of chunks
    of `window` queries with 2 `window` keys each. length: tokens of the row. window: number of slots (indices in the
    row) that a query sees; None means all of them.
    """
    whole = length * length
    return whole if window is None else min(whole, -(-length // window) * 2 * window * window)


def in_bands(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, window: int) -> tuple[Tensor, ...]:
    """Split rows into chunks of `window` queries, each with the keys of its own and of the previous chunk.

    query: [B, H, T, E], all tokens; key, value: the same with key/value heads. tokens: their slots (indices in the
    row), padding and documents. window: W. Returns queries [B N, H, W, E], keys and values [B N, H, 2 W, E], for N
    chunks of a row, and the mask, bool [B N, 1, W, 2 W]. The last chunk is filled up with padding, whose queries see
    every key.
    """
    B, T = query.shape[0], query.shape[2]
    chunks = -(-T // window)
    short = chunks * window - T
    slot_BT = F.pad(tokens.slot_BT, (0, short), value=EMPTY)
    real_BT = None if tokens.real_BT is None else F.pad(tokens.real_BT, (0, short))
    key_slot_BT = slot_BT if real_BT is None else torch.where(real_BT, slot_BT, EMPTY)
    near = _beside(F.pad(key_slot_BT, (window, 0), value=EMPTY), chunks, window)
    own = key_slot_BT.unflatten(1, (chunks, window))
    mask = (near[:, :, None, :] <= own[..., None]) & (near[:, :, None, :] > own[..., None] - window)
    if tokens.document_BT is not None:
        document_BT = F.pad(tokens.document_BT, (window, short))
        near = _beside(document_BT, chunks, window)
        same = near[:, :, None, :] == document_BT[:, window:].unflatten(1, (chunks, window))[..., None]
        mask = mask & same
    mask = mask | (own == EMPTY)[..., None]
    mask = mask.expand(B, -1, -1, -1).reshape(B * chunks, 1, window, 2 * window)
    query = F.pad(query, (0, 0, 0, short)).unflatten(2, (chunks, window)).transpose(1, 2).flatten(0, 1)
    key, value = (_banded(x, chunks, window, short) for x in (key, value))
    return query, key, value, mask


def out_of_bands(y_NWHE: Tensor, rows: int, length: int) -> Tensor:
    """Return the output of attention in bands (`in_bands`) as rows [B, T, H, E].

    y_NWHE: output for B N chunks of W queries, [B N, W, H, E]. rows: B. length: T, the tokens of a row.
    """
    return y_NWHE.unflatten(0, (rows, -1)).flatten(1, 2)[:, :length]


def _banded(x_BHTE: Tensor, chunks: int, window: int, short: int) -> Tensor:
    x_BHTE = F.pad(x_BHTE, (0, 0, window, short))
    halves = x_BHTE.unflatten(2, (chunks + 1, window))
    return torch.cat((halves[:, :, :-1], halves[:, :, 1:]), dim=3).transpose(1, 2).flatten(0, 1)


def _beside(x_BT: Tensor, chunks: int, window: int) -> Tensor:
    """Return [B, N, 2 W], each of N chunks preceded by the chunk before it, from x_BT [B, (N + 1) W].

    chunks: N. window: W. The first chunk of x_BT has no predecessor and yields no chunk of its own.
    """
    halves = x_BT.unflatten(1, (chunks + 1, window))
    return torch.cat((halves[:, :-1], halves[:, 1:]), dim=2)
