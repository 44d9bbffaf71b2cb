"""Attention with a sliding window of slots: its mask, its cost, and a banded form for rows longer than the window.

A window of W counts slots, not stored entries: a query in slot s sees the keys in slots s - W + 1 to s. The slots of a
row ascend and differ, so these keys lie in at most W adjacent columns, even if tokens between them skipped the block.

Shape letters: B rows, T tokens, K queries, C keys, H heads, E head size, N chunks of W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.cache import EMPTY
from skipstone.core.tokens import Tokens


def slot_mask(
    key_slot_BC: Tensor, key_document_BC: Tensor | None, queries: Tokens, window: int | None = None
) -> Tensor:
    """Return the attention mask of slots, bool [B, 1, K, C], True where a query sees a key.

    A query sees keys of its own document in its own and earlier slots, with a window the last `window` slots. Queries
    that are padding see everything, so that their softmax stays finite.
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
    """Return whether a window excludes any key of these rows; True also where slots are not known on the host."""
    return window is not None and (tokens.reach is None or tokens.reach > window)


def pairs(length: float, window: int | None) -> float:
    """Return the number of scores of a row that attends to itself: all pairs, or those in bands if they are fewer."""
    whole = length * length
    return whole if window is None else min(whole, -(-length // window) * 2 * window * window)


def in_bands(query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, window: int) -> tuple[Tensor, ...]:
    """Arrange rows in chunks of W queries, each with the keys of its own and of the previous chunk.

    Returns queries [B N, H, W, E], keys and values [B N, H, 2 W, E], and the mask. Every token is a query. The last
    chunk is filled up with padding, which sees itself.
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
    """Return the result of attention in bands, [B N, W, H, E], as rows [B, T, H, E]."""
    return y_NWHE.unflatten(0, (rows, -1)).flatten(1, 2)[:, :length]


def _banded(x_BHTE: Tensor, chunks: int, window: int, short: int) -> Tensor:
    x_BHTE = F.pad(x_BHTE, (0, 0, window, short))
    halves = x_BHTE.unflatten(2, (chunks + 1, window))
    return torch.cat((halves[:, :, :-1], halves[:, :, 1:]), dim=3).transpose(1, 2).flatten(0, 1)


def _beside(x_BT: Tensor, chunks: int, window: int) -> Tensor:
    """Return each chunk after its predecessor: [B, N, 2 W] from [B, (N + 1) W]."""
    halves = x_BT.unflatten(1, (chunks + 1, window))
    return torch.cat((halves[:, :-1], halves[:, 1:]), dim=2)
