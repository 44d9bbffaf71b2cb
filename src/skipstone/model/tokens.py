"""Build `Tokens` from the arguments of a Hugging Face call: slots (indices in the row), positions, documents, padding.

Shape letters: B rows, T tokens of this call, S tokens seen before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.selection import EVERYONE
from skipstone.core.tokens import IDS, IDS_BEFORE, PassMode, Tokens


@dataclass(frozen=True, kw_only=True)
class Call:
    """The caller's arguments about the tokens of one forward pass.

    shape: (B, T), rows and tokens. device: where new tensors are created. seen: S, the number of tokens per row in the
    cache; a tensor [] for a static cache, which counts on the device. attention_mask: [B, S + T] or [B, T], 0 for
    padding, or None. position_ids, document_ids: int64 [B, T] (positions also [1, T]), or None.
    """

    shape: torch.Size  # B, T
    device: torch.device
    seen: int | Tensor  # S; a tensor [] if a cache of fixed size counts on the device
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("attention_mask", "position_ids", "document_ids"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor of shape [rows, tokens], got {type(value).__name__}")

    @property
    def begun(self) -> bool:
        """Whether the cache has tokens of earlier calls.

        Always True for a static cache: its count is on the device, and reading it would make the CPU wait.
        """
        return isinstance(self.seen, Tensor) or self.seen > 0


def tokens_of(call: Call, mode: PassMode) -> Tokens:
    """Return the `Tokens` of a call: slots, positions, documents and padding, derived from its arguments.

    call: the arguments. mode: how the pass decides and executes. Slots are indices in the row, with padding and cached
    tokens counted. Without position_ids, positions count the tokens of each document without padding; without
    document_ids, positions that restart in a call without mask and cache mark new documents. Raises ValueError for
    arguments whose shape does not fit the tokens.
    """
    B, T = call.shape
    if call.document_ids is not None and call.document_ids.shape != call.shape:
        raise ValueError(f"document_ids must have shape {list(call.shape)}, got {list(call.document_ids.shape)}")
    slot_BT = (torch.arange(T, device=call.device) + call.seen)[None]
    real_BT = _real(call)
    position_BT = call.position_ids if call.position_ids is not None else _positions(call, slot_BT, real_BT)
    if position_BT.dim() != 2 or position_BT.shape[1] != T or position_BT.shape[0] not in (1, B):
        raise ValueError(f"position_ids must have shape [{B}, {T}], got {list(position_BT.shape)}")
    return Tokens(
        slot_BT=slot_BT,
        position_BT=position_BT,
        document_BT=_documents(call, position_BT),
        real_BT=real_BT,
        reach=None if isinstance(call.seen, Tensor) else call.seen + T,
        queries=EVERYONE,  # said although it is the default: a compiler cannot follow a default that is an object
        mode=mode,
    )


def _real(call: Call) -> Tensor | None:
    """Return the mask of real tokens of this call, bool [B, T]; None if none is known to be padding.

    Raises ValueError for a mask of another shape, or with other values than 0 and 1.
    """
    mask = call.attention_mask
    if mask is None:
        return None
    B, T = call.shape
    if mask.dim() != 2 or mask.shape[0] != B or not (mask.shape[1] == T or _reaches_back(mask, call)):
        raise ValueError(
            f"attention_mask must have shape [{B}, {int(call.seen) + T}] (1 for tokens, 0 for padding), "
            f"got {list(mask.shape)}; masks with more axes are not supported, give document_ids for packed rows"
        )
    if mask.device.type == "meta":  # which has no values
        return None
    real_BT = mask[:, -T:].bool()
    if isinstance(call.seen, Tensor) or torch.compiler.is_compiling() or not _cheap(mask):
        return real_BT
    look = int(2 * ((mask != 0) & (mask != 1)).any() + real_BT.all())  # two checks with one host sync
    if look >= 2:
        low, high = (float(x) for x in mask.aminmax())
        raise ValueError(
            f"attention_mask must hold 1 for tokens and 0 for padding, got {low if low < 0 else high:g}; "
            "tell packed documents apart by document_ids or position_ids"
        )
    return None if look else real_BT  # None, the common case, enables the fast paths


def _reaches_back(mask: Tensor, call: Call) -> bool:
    """Return whether the attention mask covers cached tokens as well as those of this call.

    Compiled calls with a static cache cannot compare lengths; they take any mask wider than T to do so.
    """
    if isinstance(call.seen, Tensor) and torch.compiler.is_compiling():
        return mask.shape[1] > call.shape[1]
    return mask.shape[1] == int(call.seen) + call.shape[1]


def _cheap(x: Tensor) -> bool:
    """Return whether reading a value of x is allowed: without a host sync, or with one if gradients are off."""
    return x.device.type == "cpu" or (x.device.type != "meta" and not torch.is_grad_enabled())


def _positions(call: Call, slot_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Return the positions of the tokens, int64 [B, T]: their number among the real tokens of their document, from 0.

    Padding and packing therefore change nothing. slot_BT: indices in the row, returned if nothing is padding. real_BT:
    bool, False for padding, or None.
    """
    if call.document_ids is not None:
        if call.begun:
            raise ValueError("document_ids need position_ids beside them once a cache holds earlier tokens")
        return within_documents(call.document_ids, real_BT)
    mask, T = call.attention_mask, call.shape[1]
    if mask is None or not _reaches_back(mask, call) or (real_BT is None and not call.begun):
        return slot_BT
    return (mask.bool().long().cumsum(1) - 1).clamp(min=0)[:, -T:]


def within_documents(document_BT: Tensor, real_BT: Tensor | None) -> Tensor:
    """Return the index of each token in its document, padding not counted, int64 [B, T].

    document_BT: document ids; a document is a run of equal ids. real_BT: bool, False for padding; None means no
    padding.
    """
    one_BT = torch.ones_like(document_BT) if real_BT is None else real_BT.long()
    before_BT = one_BT.cumsum(1) - one_BT
    new_BT = torch.ones_like(document_BT, dtype=torch.bool)
    new_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return before_BT - torch.where(new_BT, before_BT, 0).cummax(1).values


def _documents(call: Call, position_BT: Tensor) -> Tensor | None:
    """Return the document id of each token, [B, T], as given or inferred; None if every row is one document.

    By transformers' convention for packed rows, a document begins where the given positions do not go on by 1.
    """
    if call.document_ids is not None:
        return call.document_ids
    if call.position_ids is None or call.attention_mask is not None or call.begun or torch.compiler.is_compiling():
        return None
    jump_BT = position_BT[:, 1:] != position_BT[:, :-1] + 1
    if _cheap(position_BT) and not bool(jump_BT.any()):
        return None
    return torch.nn.functional.pad(jump_BT.long().cumsum(1), (1, 0))


def with_ids(tokens: Tokens, input_ids: Tensor | None, cache: SkipstoneCacheLayer | None) -> Tokens:
    """Return the tokens with their ids and the ids before them in `state`, for mechanisms that decide by token ids.

    The entries of `state` are "input_ids" and "input_ids_before", int64 [B, T]; the id before a document's first token
    is -1. tokens: the tokens of this call. input_ids: int64 [B, T]; if None (a call with inputs_embeds), the tokens are
    returned unchanged. cache: the first block's cache, in which the last id of each row is stored for the next call;
    None without a cache.
    """
    if input_ids is None:
        return tokens
    before_BT = _before(input_ids, tokens)
    document_BT = tokens.document_BT
    if cache is not None:
        store = cache.store(IDS)
        last_B = store.last("id")
        if last_B is not None:
            earlier_BT = (last_B - 1)[:, None].expand_as(input_ids)
            if document_BT is not None:
                found_B = store.last("document")
                assert found_B is not None
                earlier_BT = torch.where(found_B[:, None] == document_BT, earlier_BT, -1)
            one_BT = (torch.ones_like(input_ids) if tokens.real_BT is None else tokens.real_BT.long()).expand_as(
                input_ids
            )
            leads_BT = one_BT.cumsum(1) - one_BT == 0  # the first real token follows what the cache holds
            before_BT = torch.where(leads_BT, earlier_BT, before_BT)
        entries = {"id": input_ids + 1}  # from 1, because 0 is what an empty row returns
        if document_BT is not None:
            entries["document"] = document_BT.expand_as(input_ids)
        store.append(tokens.slot_BT, tokens.real_BT, None, **entries)
    return tokens.replace(state={**tokens.state, IDS: input_ids, IDS_BEFORE: before_BT})


def _before(id_BT: Tensor, tokens: Tokens) -> Tensor:
    """Return the id of the real token before each one, within this call and its document; -1 where there is none."""
    if tokens.real_BT is None:
        before_BT = torch.nn.functional.pad(id_BT[:, :-1], (1, 0), value=-1)
    else:
        at_T = torch.arange(id_BT.shape[1], device=id_BT.device)
        latest_BT = torch.where(tokens.real_BT, at_T, -1).expand_as(id_BT).cummax(1).values
        earlier_BT = torch.nn.functional.pad(latest_BT[:, :-1], (1, 0), value=-1)
        before_BT = torch.where(earlier_BT < 0, -1, id_BT.gather(1, earlier_BT.clamp(min=0)))
    if tokens.document_BT is None:
        return before_BT
    document_BT = tokens.document_BT.expand_as(id_BT)
    new_BT = torch.nn.functional.pad(document_BT[:, 1:] != document_BT[:, :-1], (1, 0), value=False)
    return torch.where(new_BT, -1, before_BT)
