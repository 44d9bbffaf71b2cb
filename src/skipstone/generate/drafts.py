"""Drafts for speculative decoding: cheap proposals of the next tokens, which the model then checks in one pass.

A draft is deterministic, so checking is exact: greedy text is the same as without drafts, and sampled text has the same
distribution (`speculation.py`).

Shape letters: B rows, T tokens so far, K proposed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from skipstone.core.strict import PlainDict
from skipstone.model.build import Blocks
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.quantise import FLOAT, INT4, INT8, dequantise, quantise

if TYPE_CHECKING:
    from skipstone.budget import BudgetTable

LONGEST_MATCH = 3  # tokens
CALL_S = 5e-4  # a guess by a model takes no less, however small it is


class Draft:
    """The base class of drafts: cheap guesses at the next tokens, which the model then checks in one pass.

    cost: time of one guess, divided by the time of a decoding step of the model; an estimate that is used until it is
    measured. seconds: the least time that a guess takes, in seconds. hoped: share of guesses that are expected to be
    right, as far as there is no evidence. reads_states: whether the draft needs the hidden states of the model's passes
    (`see`).
    """

    cost = 0.0
    seconds = 0.0
    hoped = 0.5
    reads_states = False

    def kind(self, ids_BT: Tensor) -> int | None:
        """Return the kind of guess that is possible after these tokens, a number; None if none is possible.

        ids_BT: all tokens so far, int64 [B, T]. Guesses of one kind are expected to be right equally often, so
        statistics are collected by kind.
        """
        return 0

    def see(self, hidden_BTD: Tensor, mask_BT: Tensor | None) -> None:
        """Receive the hidden states of the tokens that the model has computed since the last call.

        The method is called only if `reads_states` is True. hidden_BTD: normalised hidden states, [B, T, D] (rows,
        tokens, width). mask_BT: [B, T], 0 for padding; given with the prompt only, else None.
        """

    def rest(self) -> None:
        """Forget what `see` has received, because the model will compute tokens whose states are not passed on.

        Drafts that read no states do nothing.
        """

    def propose(self, ids_BT: Tensor, cache: Cache, position_B1: Tensor | None, count: int) -> Tensor:
        """Return the guesses for the next tokens of each row, int64 [B, K], with K at most `count`.

        ids_BT: all tokens so far, int64 [B, T]; the last one is not in the cache yet. cache: the model's cache, which
        is the same again on return. position_B1: int64 [B, 1], position of the last token; None means that positions
        are indices in the row.
        """
        raise NotImplementedError


class Lookup(Draft):
    """Prompt lookup: guesses the tokens that followed an earlier occurrence of the last tokens (arXiv 2304.04487).

    The longest match of up to 3 last tokens counts, and of equally long ones the latest; the kind of a guess is the
    length of the match, the shortest of all rows. If fewer tokens follow the occurrence than are requested, they are
    repeated.
    """

    def __init__(self) -> None:
        self.rows: list[_Seen] = []

    def kind(self, ids_BT: Tensor) -> int | None:
        if not self.rows:
            self.rows = [_Seen() for _ in ids_BT]
        for row, new in zip(self.rows, ids_BT[:, len(self.rows[0].ids) :].tolist(), strict=True):
            row.extend(new)
        return min(row.match()[0] for row in self.rows) or None

    def propose(self, ids_BT: Tensor, cache: Cache, position_B1: Tensor | None, count: int) -> Tensor:
        if self.kind(ids_BT) is None:
            return ids_BT[:, :0]
        return torch.tensor([row.continuation(count) for row in self.rows], device=ids_BT.device)


class _Seen:
    """The tokens of a row, and where each sequence of a few of them was last followed by another."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.after: dict[tuple[int, ...], int] = {}

    def extend(self, new: list[int]) -> None:
        for token in new:
            for length in range(1, min(LONGEST_MATCH, len(self.ids)) + 1):
                self.after[tuple(self.ids[-length:])] = len(self.ids)
            self.ids.append(token)

    def match(self) -> tuple[int, int]:
        """Return the length of the longest ending that has occurred before, and the place after it; 0, 0 if none."""
        for length in range(min(LONGEST_MATCH, len(self.ids)), 0, -1):
            if (at := self.after.get(tuple(self.ids[-length:]))) is not None:
                return length, at
        return 0, 0

    def continuation(self, count: int) -> list[int]:
        at = self.match()[1]
        found = self.ids[at : at + count]
        while len(found) < count:
            found.append(found[len(found) - (len(self.ids) - at)])
        return found


class OwnDraft(Draft):
    """The base class of drafts by the model itself in a cheaper form, which uses the model's own cache.

    Entries of the guessed tokens are removed from the cache before the model checks the guesses. model: the model that
    makes the guesses: the one that is to be sped up, or a copy of it. cost: an estimate of the time of one guess,
    divided by the time of a decoding step.
    """

    def __init__(self, model: SkipstoneForCausalLM, cost: float) -> None:
        self.model, self.cost, self.seconds = model, cost, CALL_S

    def cheaper(self) -> AbstractContextManager[None]:
        """Return a context manager in which a pass of the model computes less, for example fewer blocks."""
        raise NotImplementedError

    def propose(self, ids_BT: Tensor, cache: Cache, position_B1: Tensor | None, count: int) -> Tensor:
        seen, token_B1, found = cache.get_seq_length(), ids_BT[:, -1:], []
        with self.cheaper():
            for _ in range(count):
                out = self.model(token_B1, position_ids=position_B1, past_key_values=cache, use_cache=True, **CAUSAL)
                token_B1 = out.logits[:, -1:].argmax(-1)
                position_B1 = None if position_B1 is None else position_B1 + 1
                found.append(token_B1)
        cache.crop(seen)
        return torch.cat(found, 1)


CAUSAL: PlainDict = {"routing": "causal", "noise": False, "logits_to_keep": 1}


class FewerBlocks(OwnDraft):
    """A draft (source of guesses) by some of the model's own blocks, followed by its final norm and head.

    model: the model that is to be sped up. blocks: indices of the blocks that run, ascending.
    """

    def __init__(self, model: SkipstoneForCausalLM, blocks: list[int]) -> None:
        super().__init__(model, len(blocks) / model.config.num_hidden_layers)
        self.fewer = Blocks([model.decoder.layers[i] for i in blocks])

    @contextmanager
    def cheaper(self) -> Iterator[None]:
        """Run only the chosen blocks inside a `with` block."""
        children = self.model.decoder._modules  # an assignment would tell all that listen to new modules, every time
        whole = children["layers"]
        children["layers"] = self.fewer
        try:
            yield
        finally:
            children["layers"] = whole


class LowerBudget(OwnDraft):
    """A draft (source of guesses) by the model itself at a lower budget, a share of the dense model's FLOPs.

    model: the model that is to be sped up. table: the model's thresholds for every budget. budget: the budget at which
    guesses are made. Raises ValueError for a budget that the table says the model cannot meet.
    """

    def __init__(self, model: SkipstoneForCausalLM, table: BudgetTable, budget: float) -> None:
        super().__init__(model, budget)
        table.thresholds(budget)
        self.table, self.budget = table, budget

    def cheaper(self) -> AbstractContextManager[None]:
        """Set the model's thresholds to the lower FLOP budget inside a `with` block."""
        return self.table.at(self.model, self.budget)


class FewerBits(OwnDraft):
    """A draft (source of guesses) by a copy of the model with weights in fewer bits, which uses the model's own cache.

    Speculation by a quantised copy of the same model is that of QSpec (arXiv 2410.11305). model: the model that is to
    be sped up. bits: of a weight of the copy, 8 or 4. table, budget: the model's thresholds for every FLOP budget, and
    the share of the dense FLOPs at which it runs, and so does the copy; a budget of None means as trained. Raises
    ValueError if the model's weights have as few bits already, or cannot be rounded.
    """

    hoped = 0.9

    def __init__(
        self, model: SkipstoneForCausalLM, bits: int, table: BudgetTable | None = None, budget: float | None = None
    ) -> None:
        rounded = in_fewer_bits(model, bits)
        super().__init__(rounded, _bytes_of(rounded) / _bytes_of(model))
        self.table, self.budget = table, budget

    def cheaper(self) -> AbstractContextManager[None]:
        """Set the copy's thresholds to the model's FLOP budget, if it has one, inside a `with` block."""
        if self.table is None or self.budget is None:
            return nullcontext()
        return self.table.at(self.model, self.budget)


_COPIES: WeakKeyDictionary[SkipstoneForCausalLM, dict[int, tuple[object, SkipstoneForCausalLM]]] = WeakKeyDictionary()


def in_fewer_bits(model: SkipstoneForCausalLM, bits: int) -> SkipstoneForCausalLM:
    """Return a copy of the model with rounded weights, which is kept for the next call as long as the model lives.

    It is made anew if the model's weights have changed since. model: the original. bits: of a weight, 8 or 4. Raises
    ValueError if the model's weights have as few bits already, or cannot be rounded.
    """
    has = {INT8: 8, INT4: 4}.get(model.config.weight_format, 16)
    if has <= bits:
        raise ValueError(f"draft 'int{bits}': the model's weights have {has} bits already")
    tensors = (*model.parameters(), *model.buffers())
    weights = tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors)
    known = _COPIES.setdefault(model, {})
    if bits not in known or known[bits][0] != weights:
        known.pop(bits, None)  # before another is made: both would need memory
        whole = model if model.config.weight_format == FLOAT else dequantise(model)
        known[bits] = (weights, quantise(whole, bits).eval())
    return known[bits][1]


def _bytes_of(model: SkipstoneForCausalLM) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


class OtherModel(Draft):
    """A draft (source of guesses) by another model with the same vocabulary, which has a cache of its own.

    model: the drafting model, a Skipstone model or one of transformers. target: the model that is to be sped up. Raises
    ValueError if their vocabularies differ in size, and `propose` does if rows are padded.
    """

    def __init__(self, model: PreTrainedModel, target: SkipstoneForCausalLM) -> None:
        ours, theirs = target.config.vocab_size, model.config.vocab_size
        if ours != theirs:
            raise ValueError(f"draft: its vocabulary has {theirs} tokens, the model's {ours}; they must be the same")
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.cost = model.num_parameters() / max(target.num_parameters(), 1)
        self.seconds = CALL_S
        self.options = CAUSAL if isinstance(model, SkipstoneForCausalLM) else {}

    def propose(self, ids_BT: Tensor, cache: Cache, position_B1: Tensor | None, count: int) -> Tensor:
        if position_B1 is not None:
            raise ValueError("draft: another model drafts for rows of one length only, without padding")
        seen, total, found = self.cache.get_seq_length(), ids_BT.shape[1], []
        ids = ids_BT[:, seen:]
        for _ in range(count):
            out = self.model(ids, past_key_values=self.cache, use_cache=True, **self.options)
            ids = out.logits[:, -1:].argmax(-1)
            found.append(ids)
        if (guesses := self.cache.get_seq_length() - total) > 0:
            self.cache.crop(-guesses)  # they are fed again where they were right
        return torch.cat(found, 1)
