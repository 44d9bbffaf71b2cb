"""Guesses at the next tokens by a draft head (`model/draft_head.py`), which reads the model's last hidden states.

Shape letters: B rows, T tokens so far, S states that are kept, D width, K proposed tokens.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from skipstone.generate.drafts import Draft
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.draft_head import DraftHead, ReadyHead
from skipstone.model.draft_head_file import load_draft_head, stamp

WINDOW = 16  # tokens that the head reads when it begins, and after a while without guesses
MOST = 512  # tokens that it remembers
FEW = 8  # tokens of a call that does not restore int8 weights

_loaded: WeakKeyDictionary[SkipstoneForCausalLM, tuple[object, ReadyHead]] = WeakKeyDictionary()


class HeadDraft(Draft):
    """A source of guesses at the next tokens: a trained draft head, one block that reads the model's hidden states.

    model: the model that is to be sped up. ready: the draft head, prepared for this model. The cache of the head's
    block holds entries of true hidden states only; the entries of guesses are removed after each proposal.
    """

    reads_states = True

    def __init__(self, model: SkipstoneForCausalLM, ready: ReadyHead) -> None:
        self.model, self.ready, self.cache = model, ready, ready.head.new_cache()
        self.cost, self.seconds = ready.size / max(model.num_parameters(), 1), ready.seconds
        self.state_BSD: Tensor | None = None  # of the last tokens that the model has seen
        self.mask_BS: Tensor | None = None
        self.unread = 0  # of these, those that the head has not read

    def see(self, hidden_BTD: Tensor, mask_BT: Tensor | None) -> None:
        new = hidden_BTD if self.state_BSD is None else torch.cat((self.state_BSD, hidden_BTD), 1)
        self.unread = min(self.unread + hidden_BTD.shape[1], WINDOW + 1)
        self.state_BSD = new[:, -WINDOW:]
        if mask_BT is None and self.mask_BS is not None:
            mask_BT = torch.cat((self.mask_BS, self.mask_BS.new_ones(hidden_BTD.shape[:2])), 1)
        self.mask_BS = None if mask_BT is None or bool(mask_BT[:, -WINDOW:].all()) else mask_BT[:, -WINDOW:]

    def kind(self, ids_BT: Tensor) -> int | None:
        return None if self.state_BSD is None else 0

    def rest(self) -> None:
        self.state_BSD, self.mask_BS, self.unread = None, None, WINDOW + 1  # begins anew with the states that follow

    def propose(self, ids_BT: Tensor, cache: Cache, position_B1: Tensor | None, count: int) -> Tensor:
        hidden_B1D, found = self._read(ids_BT), list[Tensor]()
        stored = self.cache.get_seq_length()
        for i in range(count):
            if i:
                hidden_B1D = self._guess(hidden_B1D, found[-1])
            found.append(self.ready.token(hidden_B1D))
        if count > 1:
            self.cache.crop(stored)
        return torch.cat(found, 1)

    def _read(self, ids_BT: Tensor) -> Tensor:
        """Let the head read the hidden states that are new, and return its guess of the next one, [B, 1, D].

        ids_BT: all tokens so far, int64.
        """
        assert self.state_BSD is not None
        states = self.state_BSD
        if self.unread > WINDOW or self.cache.get_seq_length() + self.unread > MOST:
            self.cache, self.unread = self.ready.head.new_cache(), states.shape[1]
        new, self.unread = self.unread, 0
        states, tokens = states[:, -new:], ids_BT[:, -new:]
        if self.mask_BS is not None and self.cache.get_seq_length() == 0:
            return self._guess(states, tokens, self.mask_BS[:, -new:])[:, -1:]
        for at in range(0, new, FEW):
            part = slice(at, at + FEW)
            hidden_BTD = self._guess(states[:, part], tokens[:, part])
        return hidden_BTD[:, -1:]

    def _guess(self, hidden_BTD: Tensor, token_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Return the head's guesses of the hidden states one token later, [B, T, D], and extend its cache.

        hidden_BTD: hidden states. token_BT: int64, the token that follows each of them. mask_BT: 0 for padding, or
        None.
        """
        return self.ready(hidden_BTD, self.model.decoder.embed_tokens(token_BT), self.cache, mask_BT)


def head_draft(model: SkipstoneForCausalLM, head: DraftHead | None = None) -> HeadDraft:
    """Return a source of guesses at the next tokens: a trained draft head, which reads the model's hidden states.

    model: the model that is to be sped up. head: the head; None means the one in the folder that the model was loaded
    from. Raises FileNotFoundError if that folder has none, and ValueError for a head that is damaged or belongs to
    another model.
    """
    key = (model.device, model.dtype, model.lm_head.weight.data_ptr(), head or stamp(model.name_or_path))
    known = _loaded.get(model)
    if known is None or known[0] != key:
        if head is not None:
            head.require(model)
        known = _loaded[model] = (key, ReadyHead(head or load_draft_head(model), model))
    return HeadDraft(model, known[1])
