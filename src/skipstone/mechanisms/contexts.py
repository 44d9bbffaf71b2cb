"""What PolyGLU's gate looks at: a mean of projected tokens, over the whole row or over the tokens so far.

The gate's first layer is linear, so projecting and then averaging equals averaging and then projecting; the cache then
keeps 32 sums a token instead of the whole width, and crop and reorder stay exact.
Shape letters: B rows, T tokens, R projected width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.tokens import Tokens


def sequence_mean(z_BTR: Tensor, tokens: Tokens) -> Tensor:
    """The paper's context, one mean a document: every token sees the future. [B, 1, R] where a row is one document."""
    real_BT1 = _real(z_BTR, tokens)
    if tokens.document_BT is None:
        return (z_BTR * real_BT1).sum(1, keepdim=True) / real_BT1.sum(1, keepdim=True).clamp(min=1)
    same_BTT = tokens.document_BT[:, :, None] == tokens.document_BT[:, None, :]
    weight_BTT = same_BTT * real_BT1.transpose(1, 2)
    return weight_BTT @ z_BTR / weight_BTT.sum(-1, keepdim=True).clamp(min=1)


def running_mean(z_BTR: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None, name: str) -> Tensor:
    """Mean over the tokens of the same document up to and including this one, [B, T, R] fp32, exact with a cache."""
    real_BT1 = _real(z_BTR, tokens)
    total_BTS = torch.cat((z_BTR * real_BT1, real_BT1.expand(z_BTR.shape[0], -1, -1)), dim=-1).cumsum(1)
    if tokens.document_BT is not None:
        total_BTS = total_BTS - _before_document(total_BTS, tokens.document_BT)
    if cache is not None:
        total_BTS = _continue(total_BTS, tokens, cache, name)
    return total_BTS[..., :-1] / total_BTS[..., -1:].clamp(min=1)


def _real(z_BTR: Tensor, tokens: Tokens) -> Tensor:
    if tokens.real_BT is None:
        return z_BTR.new_ones(1, z_BTR.shape[1], 1)
    return tokens.real_BT[..., None].to(z_BTR.dtype)


def _before_document(total_BTS: Tensor, document_BT: Tensor) -> Tensor:
    """The running sum just before the token's document began, in this call."""
    document_BT = document_BT.expand(total_BTS.shape[:2])
    new_BT = torch.ones_like(document_BT, dtype=torch.bool)
    new_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    at_T = torch.arange(document_BT.shape[1], device=document_BT.device)
    start_BT = torch.where(new_BT, at_T, 0).cummax(1).values
    shifted_BTS = torch.cat((torch.zeros_like(total_BTS[:, :1]), total_BTS[:, :-1]), dim=1)
    return shifted_BTS.gather(1, start_BT[..., None].expand_as(total_BTS))


def _continue(total_BTS: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer, name: str) -> Tensor:
    """Add what earlier calls summed, and remember the sums of this one."""
    store = cache.store(name)
    last_BS = store.last("sum", tokens.rows)
    if last_BS is not None:
        base_B1S = last_BS[:, None]
        if tokens.document_BT is not None:
            last_document = store.last("document", tokens.rows)
            assert last_document is not None
            base_B1S = base_B1S * (tokens.document_BT == last_document[:, None])[..., None]
        total_BTS = total_BTS + base_B1S
    entries = {"sum": total_BTS}
    if tokens.document_BT is not None:
        entries["document"] = tokens.document_BT.expand(total_BTS.shape[:2])
    store.append(tokens.slot_BT, tokens.real_BT, tokens.rows, **entries)
    return total_BTS
