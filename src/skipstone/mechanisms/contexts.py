"""Contexts that the routers of PolyGLU and of neuron groups read: means of projected tokens over the row or the past.

The router's first layer is linear, so projecting and then averaging equals averaging and then projecting. The cache
then keeps R sums per token (32 by default) instead of the whole width, and cropping and reordering it stay exact. Only
tokens that reach the router are counted: means leave out padding and tokens that an outer mechanism skips.

All means are fp32 [B, T, R]; `sequence_mean` is [B, 1, R] if each row is one document. The last entry of a sum is its
number of tokens (with decay, their sum of weights).

Shape letters: B rows, T tokens, R projected width, S = R + 1 entries of a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.tokens import Tokens


@dataclass(frozen=True)
class Memory:
    """The values, such as running sums, that a mechanism stored in the KV cache in earlier calls; empty without one.

    tokens: the tokens of the current call. cache: the cache of this layer, or None. name: the name under which the
    mechanism stores its entries there. An entry has one vector for each token, so that cropping the cache stays exact.
    """

    tokens: Tokens
    cache: SkipstoneCacheLayer | None
    name: str

    def last(self, entry: str) -> Tensor | None:
        """Return the stored values of each row's newest cached token, [B, 1, S]; None if nothing is stored.

        entry: the name of the values, such as "sum". S: their number per token.
        """
        value = None if self.cache is None else self.cache.store(self.name).last(entry, self.tokens.rows)
        return None if value is None else value[:, None]

    def here(self) -> Tensor | float:
        """Return whether each token belongs to the document of its row's newest cached token, fp32 [B, T, 1]: 1 or 0.

        The tokens are those of this call. Returns the number 1.0 if rows are not divided into documents or nothing is
        cached.
        """
        last_B1 = self.last("document")
        if self.tokens.document_BT is None or last_B1 is None:
            return 1.0
        return (self.tokens.document_BT == last_B1)[..., None].float()

    def keep(self, **entries_BTS: Tensor) -> None:
        """Append values of this call's tokens to the cache; without a cache, do nothing.

        entries_BTS: tensors [B, T, S] by name, with S values per token. If rows are divided into documents, the index
        of each token's document is stored too, under the name "document".
        """
        if self.cache is None:
            return
        document_BT, store = self.tokens.document_BT, self.cache.store(self.name)
        if document_BT is not None:
            entries_BTS["document"] = document_BT.expand(next(iter(entries_BTS.values())).shape[:2])
        store.append(self.tokens.slot_BT, self.tokens.real_BT, self.tokens.rows, **entries_BTS)


def sequence_mean(z_BTR: Tensor, tokens: Tokens) -> Tensor:
    """Return the mean of z over each token's whole document, later tokens included, fp32 [B, T, R].

    This is the context of the PolyGLU paper (arXiv 2603.13347). z_BTR: fp32, R features of each token. tokens: the
    tokens of this call, with their documents; padding is left out. If each row is one document, the result is [B, 1,
    R].
    """
    real_BT1 = _real(z_BTR, tokens)
    if tokens.document_BT is None:
        return (z_BTR * real_BT1).sum(1, keepdim=True) / real_BT1.sum(1, keepdim=True).clamp(min=1)
    same_BTT = tokens.document_BT[:, :, None] == tokens.document_BT[:, None, :]
    weight_BTT = same_BTT * real_BT1.transpose(1, 2)
    return weight_BTT @ z_BTR / weight_BTT.sum(-1, keepdim=True).clamp(min=1)


def running_mean(z_BTR: Tensor, tokens: Tokens, memory: Memory) -> Tensor:
    """Return the mean of z over the tokens of the same document up to and including each token, fp32 [B, T, R].

    z_BTR: fp32, R features of each token. tokens: the tokens of this call, with their documents; padding is left out.
    memory: the sums stored by earlier calls, to which this call's sums are appended.
    """
    total_BTS = _running_sum(z_BTR, tokens, memory, memory.last("sum"))
    memory.keep(sum=total_BTS)
    return _mean(total_BTS)


def exponential_mean(z_BTR: Tensor, tokens: Tokens, memory: Memory, decay: float) -> Tensor:
    """Return the exponentially weighted mean of z up to and including each token of a document, fp32 [B, T, R].

    z_BTR: fp32, R features of each token. tokens: the tokens of this call, with their documents; padding is left out.
    memory: the sums stored by earlier calls, to which this call's sums are appended. decay: a number in (0, 1); a token
    n places back, not counting padding, has weight decay^n. The weighted sum is divided by the sum of the weights.
    """
    total_BTS = _decayed_sum(z_BTR, tokens, memory, decay, memory.last("sum"))
    memory.keep(sum=total_BTS)
    return _mean(total_BTS)


def chunk_mean(z_BTR: Tensor, tokens: Tokens, memory: Memory, size: int) -> Tensor:
    """Return for each token the mean of z over all chunks before its own, fp32 [B, T, R]; 0 in the first chunk.

    A document is divided into chunks of `size` tokens, padding not counted. z_BTR: fp32, R features of each token.
    tokens: the tokens of this call, with their documents. memory: the sums stored by earlier calls, to which this
    call's sums are appended.
    """
    last_B1S, done_B1S = memory.last("sum"), memory.last("done")
    total_BTS = _running_sum(z_BTR, tokens, memory, last_B1S)
    chunk_BT = _chunk(total_BTS, size)
    begins_BT = _begins(chunk_BT, total_BTS) | _begins(tokens.document_BT, total_BTS)
    before_B1S = torch.zeros_like(total_BTS[:, :1])
    if last_B1S is not None and done_B1S is not None:  # the last call's chunk continues, or is complete
        goes_on_B1 = chunk_BT[:, :1] == _chunk(last_B1S, size)
        before_B1S = torch.where(goes_on_B1[..., None], done_B1S, last_B1S)
    done_BTS = _before(total_BTS, begins_BT, before_B1S) * (chunk_BT > 0)[..., None]
    memory.keep(sum=total_BTS, done=done_BTS)
    return _mean(done_BTS)


def chunk_start(z_BTR: Tensor, tokens: Tokens, memory: Memory, size: int, decay: float) -> Tensor:
    """Return for each token the exponential mean of z as of the first token of its chunk, fp32 [B, T, R].

    All tokens of a chunk thus share one context, which is known when the chunk begins. A document is divided into
    chunks of `size` tokens, padding not counted; padding before the first token of a row is a chunk of its own. z_BTR:
    fp32, R features of each token. tokens: the tokens of this call, with their documents. memory: the state stored by
    earlier calls, to which this call's state is appended. decay: a number in (0, 1); in the mean, the token n places
    back, not counting padding, has weight decay^n.
    """
    state, R = memory.last("state"), z_BTR.shape[-1]
    last_B1S, last_B11, last_B1R = (None, None, None) if state is None else state.split((R + 1, 1, R), -1)
    if last_B1S is not None and z_BTR.shape[1] == 1 and tokens.document_BT is None:
        total_BTS, count_BT1, start_BTR = _next(z_BTR, tokens, (last_B1S, last_B11, last_B1R), size, decay)
    else:
        total_BTS = _decayed_sum(z_BTR, tokens, memory, decay, last_B1S)
        count_BT1 = _running_sum(z_BTR[..., :0], tokens, memory, last_B11)
        chunk_BT = torch.where(count_BT1[..., 0] > 0, _chunk(count_BT1, size), -1.0)
        begins_BT = _begins(chunk_BT, total_BTS) | _begins(tokens.document_BT, total_BTS)
        first_B1R = _mean(total_BTS[:, :1])
        if last_B11 is not None and last_B1R is not None:
            goes_on_B11 = (chunk_BT[:, :1, None] == _chunk(last_B11, size)[..., None]) & (last_B11 > 0)
            first_B1R = torch.where(goes_on_B11 & _first(memory.here()), last_B1R, first_B1R)
        mean_BTR = torch.cat((first_B1R, _mean(total_BTS[:, 1:])), dim=1)
        start_BTR = mean_BTR.gather(1, _start(begins_BT)[..., None].expand_as(mean_BTR))
    memory.keep(state=torch.cat((total_BTS, count_BT1, start_BTR), dim=-1))
    return start_BTR


def _next(
    z_B1R: Tensor, tokens: Tokens, last: tuple[Any, ...], size: int, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `chunk_start` computes, for one token per row without documents; a fast path for decoding.

    That is: the decayed sum [B, 1, S], the number of tokens so far [B, 1, 1], and the context of the chunk [B, 1, R].
    last: the same three of the previous token. size and decay are as in `chunk_start`.
    """
    last_B1S, last_B11, last_B1R = last
    x_B1S = _counted(z_B1R, tokens)
    weight = decay if tokens.real_BT is None else torch.where(tokens.real_BT[..., None], decay, 1.0)
    total_B1S, count_B11 = x_B1S + last_B1S * weight, last_B11 + x_B1S[..., -1:]
    begins_B11 = count_B11.remainder(size) == 1 % size
    return total_B1S, count_B11, torch.where(begins_B11, _mean(total_B1S), last_B1R)


def _running_sum(z_BTR: Tensor, tokens: Tokens, memory: Memory, last_B1S: Tensor | None) -> Tensor:
    """Return the sum of z (and, last, the count) over each token's document up to the token itself, [B, T, S].

    last_B1S: the sum at the newest cached token, with which the call goes on; None if nothing is cached.
    """
    total_BTS = _counted(z_BTR, tokens).cumsum(1)
    if tokens.document_BT is not None:
        begins_BT = _begins(tokens.document_BT, total_BTS)
        total_BTS = total_BTS - _before(total_BTS, begins_BT, torch.zeros_like(total_BTS[:, :1]))
    return total_BTS if last_B1S is None else total_BTS + last_B1S * memory.here()


def _decayed_sum(z_BTR: Tensor, tokens: Tokens, memory: Memory, decay: float, last_B1S: Tensor | None) -> Tensor:
    """Return `_running_sum` with weights: a token n tokens back has the weight decay^n, padding not counted."""
    x_BTS, real_BT1 = _counted(z_BTR, tokens), _real(z_BTR, tokens)
    total_BTS = linear_scan(
        x_BTS, torch.where(real_BT1 > 0, decay, 1.0) * ~_begins(tokens.document_BT, x_BTS)[..., None]
    )
    if last_B1S is not None:
        total_BTS = total_BTS + last_B1S * decay ** real_BT1.cumsum(1) * memory.here()
    return total_BTS


def linear_scan(x_BTS: Tensor, keep_BT1: Tensor) -> Tensor:
    """Return the running totals total_t = keep_t * total_(t-1) + x_t over the second axis, [B, T, S].

    The total before the first position is 0. x_BTS: the terms x_t. keep_BT1: the share of the earlier total that each
    position keeps, [B, T, 1]. It takes log2 T steps and no division.
    """
    step = 1
    while step < x_BTS.shape[1]:
        x_BTS = torch.cat((x_BTS[:, :step], x_BTS[:, step:] + keep_BT1[:, step:] * x_BTS[:, :-step]), dim=1)
        keep_BT1 = torch.cat((keep_BT1[:, :step], keep_BT1[:, step:] * keep_BT1[:, :-step]), dim=1)
        step *= 2
    return x_BTS


def _mean(total_BTS: Tensor) -> Tensor:
    """Return the mean [..., R] of a sum [..., S] whose last entry is its count or sum of weights; 0 if that is 0.

    The last entry is never between 0 and 1, because the newest token has weight 1.
    """
    return total_BTS[..., :-1] / total_BTS[..., -1:].clamp(min=1)


def _first(here: Tensor | float) -> Tensor | bool:
    """Return whether the call's first token continues the document of its row's newest cached token, bool [B, 1, 1].

    here: what `Memory.here` returned; the number 1.0 gives True.
    """
    return True if isinstance(here, float) else here[:, :1] > 0


def _real(z_BTR: Tensor, tokens: Tokens) -> Tensor:
    """Return 1 for real tokens and 0 for padding, in the dtype of z, [B or 1, T, 1]."""
    if tokens.real_BT is None:
        return z_BTR.new_ones(1, z_BTR.shape[1], 1)
    return tokens.real_BT[..., None].to(z_BTR.dtype)


def _counted(z_BTR: Tensor, tokens: Tokens) -> Tensor:
    """Return z with a last feature of 1 appended, by which tokens are counted, and 0 for padding, [B, T, S]."""
    if tokens.real_BT is None:
        return F.pad(z_BTR, (0, 1), value=1.0)
    real_BT1 = _real(z_BTR, tokens)
    return torch.cat((z_BTR * real_BT1, real_BT1.expand(z_BTR.shape[0], -1, -1)), dim=-1)


def _chunk(total_BTS: Tensor, size: int) -> Tensor:
    """Return the index of each token's chunk in its document, a whole number as fp32 [B, T].

    total_BTS: sums whose last entry is the number of the document's tokens so far. size: tokens per chunk.
    """
    return ((total_BTS[..., -1] - 1) / size).floor().clamp(min=0)


def _begins(key_BT: Tensor | None, like_BTS: Tensor) -> Tensor:
    """Return where the key differs from the previous token's, bool [B, T]; False for the first token of the call."""
    new_BT = torch.zeros(like_BTS.shape[:2], dtype=torch.bool, device=like_BTS.device)
    if key_BT is not None:
        new_BT[:, 1:] = key_BT[:, 1:] != key_BT[:, :-1]
    return new_BT


def _before(total_BTS: Tensor, begins_BT: Tensor, first_B1S: Tensor) -> Tensor:
    """Return for each token the total just before its group (chunk or document) began, [B, T, S].

    begins_BT: bool, the first tokens of groups. first_B1S: the result for tokens whose group began before this call.
    """
    shifted_BTS = torch.cat((first_B1S, total_BTS[:, :-1]), dim=1)
    return shifted_BTS.gather(1, _start(begins_BT)[..., None].expand_as(total_BTS))


def _start(begins_BT: Tensor) -> Tensor:
    """Return the index in the call of the first token of each token's group (chunk or document), int64 [B, T].

    begins_BT: bool, the first tokens of groups.
    """
    at_T = torch.arange(begins_BT.shape[1], device=begins_BT.device)
    return torch.where(begins_BT, at_T, 0).cummax(1).values
