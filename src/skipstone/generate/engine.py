"""Greedy decoding and sampling with a cache, optionally speculative, and the compute of each token.

Routing is causal and noise is off, whatever mode the model is in. Rows of different length are padded on the left.
Shape letters: B rows, T tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from skipstone.budget import BudgetTable
from skipstone.core.records import Records
from skipstone.core.strict import choose
from skipstone.generate.build_draft import Drafted, build_draft
from skipstone.generate.drafts import Draft
from skipstone.generate.prompt import check_padding, checked_prompt, ends_of
from skipstone.generate.sampler import Sampler
from skipstone.generate.speculation import Length
from skipstone.measure.compute import compute_shares
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig

CACHES: dict[str, Callable[[SkipstoneConfig, int], Cache]] = {
    "dynamic": lambda config, tokens: DynamicCache(config=config),
    "static": lambda config, tokens: StaticCache(config=config, max_cache_len=tokens),
}
MOST_GUESSES = 32  # of a pass; a cache can remove as many again, with or without a window
Setting = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One new token of each of B rows.

    token_B: int64, the new tokens; the pad id in rows that have ended. live_B: bool, rows that had not ended before.
    compute_B: fp32 on the CPU, the share (0 to 1) of the blocks' computation that was executed in the pass that
    predicted the token. guessed_B: bool, whether a draft, whose own computation is not in compute_B, had proposed it.
    """

    token_B: Tensor
    live_B: Tensor
    compute_B: Tensor
    guessed_B: Tensor


class DecodingPass(NamedTuple):
    """A pass over the prompt, or over one or a few tokens of each row, and one token chosen from it.

    A pass that checks drafted tokens is described by several of these objects, one for each token that it yields.
    token_B: int64, the chosen tokens; the pad id in rows that have ended. live_B: bool, rows that had not ended before.
    records: the decisions of every block, by mechanism name. logits_BTV: the logits of the last T tokens of the pass.
    cache: the cache after the pass. at: index, counted from the end of the pass (-1: its last token), of the position
    that predicted the token. guessed_B: bool, whether a draft had proposed the token; None without drafts. guess_BK:
    int64, the K guesses that the pass checks; the first wrong one and all after it are dropped. None without drafts.
    """

    token_B: Tensor
    live_B: Tensor
    records: tuple[Records, ...]
    logits_BTV: Tensor
    cache: Cache
    at: int = -1
    guessed_B: Tensor | None = None
    guess_BK: Tensor | None = None


def generate(
    model: SkipstoneForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    cache: str = "dynamic",
    budget: float | None = None,
    budget_table: BudgetTable | None = None,
    draft: Drafted | None = None,
    draft_length: int | None = None,
) -> Tensor:
    """Continue a prompt and return prompt and continuation, int64 [B, T + N] with N <= max_new_tokens.

    input_ids: int64 [B, T]. attention_mask: 0 for padding, on the left. temperature: 0 is greedy; above 0, tokens are
    drawn with `seed` (None: at random) from the `top_k` most probable (None: all). eos_token_id, pad_token_id: ids that
    end a text, and that fill ended rows; None: generation_config's. cache: "dynamic" or "static" (allocated once).
    budget: share of the dense FLOPs to execute, by budget_table; None: as set. draft, draft_length: source and number
    of guesses for speculative decoding; None: no drafts. `stream` describes all these and the errors in full.
    """
    decode = Decoder(model, input_ids, attention_mask, max_new_tokens, pad_token_id, eos_token_id, cache)
    decode.drafting = drafting_of(decode, draft, draft_length, budget, budget_table)
    passes = decode(Sampler(temperature, top_k, seed, input_ids.device), setting_of(model, budget, budget_table, draft))
    return torch.cat([input_ids, *(each.token_B[:, None] for each in passes)], dim=1)


def stream(
    model: SkipstoneForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    cache: str = "dynamic",
    budget: float | None = None,
    budget_table: BudgetTable | None = None,
    draft: Drafted | None = None,
    draft_length: int | None = None,
) -> Iterator[Step]:
    """Continue a prompt and yield a `Step` for each new token, until all rows have ended or max_new_tokens are reached.

    model: decides without later tokens and without noise, whatever its mode. input_ids: int64 [B, T]. attention_mask:
    [B, T], 0 for padding, which must be on the left; None means no padding. temperature: 0 chooses the most probable
    token; above 0, tokens are drawn from softmax(logits / temperature), with `top_k` among the k most probable. seed:
    seed of the draws; None means a random seed. eos_token_id, pad_token_id: ids that end a text, and the id that fills
    ended rows; None means the ids in generation_config. cache: "dynamic" grows, and steps do not compute skipped
    blocks; "static" is allocated once, and a step's shapes never change. budget: share of the dense FLOPs to execute
    while generating; None: as set. budget_table: thresholds for it; None means budget.json in the model's folder.
    draft: source of guesses that the model checks several at a time: "lookup", "exit", "exit:N", "skip", "int8",
    "int4", "budget:SHARE", "head", another model or a draft head (`build_draft`); None: no drafts. Greedy text stays
    the same but for ties in the logits, and sampled text keeps its distribution. draft_length: guesses at a time, 1 to
    32; None: measured times decide. Raises ValueError, before the first step, for invalid arguments, a prompt that
    exceeds the context, and mechanisms that need later tokens; FileNotFoundError for a missing budget table or head.
    """
    decode = Decoder(model, input_ids, attention_mask, max_new_tokens, pad_token_id, eos_token_id, cache)
    decode.drafting = drafting_of(decode, draft, draft_length, budget, budget_table)
    passes = decode(Sampler(temperature, top_k, seed, input_ids.device), setting_of(model, budget, budget_table, draft))
    return (_step(model, decided) for decided in passes)


def _step(model: SkipstoneForCausalLM, decided: DecodingPass) -> Step:
    share_BT = compute_shares(model.decoder.layers, decided.records)
    at = decided.at if share_BT.shape[1] > 1 else -1  # one column stands for all tokens of a dense model
    compute_B = share_BT[:, at].expand(len(decided.token_B))
    guessed_B = torch.zeros_like(decided.live_B) if decided.guessed_B is None else decided.guessed_B
    return Step(token_B=decided.token_B, live_B=decided.live_B, compute_B=compute_B, guessed_B=guessed_B)


def drafting_of(
    decode: Decoder,
    draft: Drafted | None,
    length: int | None,
    budget: float | None,
    table: BudgetTable | None,
) -> tuple[Draft, Length] | None:
    """Return a decoder's draft (source of guesses) and the rule that chooses how many; None if `draft` is None.

    decode: the decoder that is to be sped up. draft: the draft's name, another model or a draft head. length: number of
    guesses at a time, 1 to 32; None means that measured times decide. budget, table: the model's own budget (None: as
    trained) and its thresholds for budgets (None: those in its folder). Raises ValueError for an impossible draft, a
    length without a draft, and a static cache; FileNotFoundError for a missing head or table.
    """
    if draft is None:
        if length is not None:
            raise ValueError("draft_length has no effect without a draft")
        return None
    if decode.fixed_size:
        raise ValueError("a draft needs cache 'dynamic': a cache of fixed size cannot take guesses back")
    if length is not None and not 1 <= length <= MOST_GUESSES:
        raise ValueError(f"draft_length must be in [1, {MOST_GUESSES}], got {length}")
    found = build_draft(draft, decode.model, table, budget)
    return found, Length(length, found.cost, found.seconds, hoped=found.hoped)


@dataclass
class _Text:
    """The state of the rows that are being continued.

    unread_BT: int64, tokens that the cache does not hold yet. mask_BT: their attention mask, None without padding.
    position_BT: their positions, None if these are indices in the row. live_B: bool, rows that have not ended. cache:
    the model's cache. new: tokens [B, 1] of the plain steps since the last draft. ended: whether every row has ended.
    """

    unread_BT: Tensor
    mask_BT: Tensor | None
    position_BT: Tensor | None
    live_B: Tensor
    cache: Cache
    new: list[Tensor]
    ended: bool = False


class Decoder:
    """A checked prompt, and the loop that continues it: calling a decoder yields a `DecodingPass` for each new token.

    input_ids: int64 [B, T]. attention_mask: 0 for left padding; None: no padding. pad_token_id, eos_token_id: the id
    that fills ended rows, ids that end a text; None: generation_config's. cache: "dynamic" or "static" (allocated
    once). Raises ValueError for invalid ones. drafting: source of guesses and rule for their number; None: no guesses.
    """

    def __init__(
        self,
        model: SkipstoneForCausalLM,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_new_tokens: int,
        pad_token_id: int | None,
        eos_token_id: int | Sequence[int] | None,
        cache: str,
    ) -> None:
        self.new_cache, self.fixed_size = choose("cache", cache, CACHES), cache == "static"
        self.drafting: tuple[Draft, Length] | None = None
        self.mask_BT = checked_prompt(model, input_ids, attention_mask, max_new_tokens)
        self.model, self.input_ids, self.max_new_tokens = model, input_ids, max_new_tokens
        ends = ends_of(model, eos_token_id)
        check_padding(model, pad_token_id)
        pads = (pad_token_id, model.generation_config.pad_token_id, *ends)
        known = range(model.config.vocab_size)  # the first Llamas say -1 for "none"
        self.pad = next((i for i in pads if i in known), 0)
        self.ends_E = torch.tensor(ends, dtype=torch.long, device=input_ids.device)

    def __call__(self, sample: Sampler, setting: Setting, logits_to_keep: int = 1) -> Iterator[DecodingPass]:
        """Yield a `DecodingPass` for each new token.

        sample: draws tokens from logits. setting: returns a context manager that sets the model's budget while it
        generates. logits_to_keep: at how many last positions a pass computes logits; 0 means at all.
        """
        with setting():
            yield from (
                self._passes(sample, logits_to_keep) if self.drafting is None else self._drafted(sample, logits_to_keep)
            )

    @torch.no_grad()
    def _passes(self, sample: Sampler, logits_to_keep: int) -> Iterator[DecodingPass]:
        text = self._begin(self.input_ids.shape[1] + self.max_new_tokens)
        yield from self._plain(text, sample, self.max_new_tokens, logits_to_keep)

    def _begin(self, columns: int) -> _Text:
        position_BT = None if self.mask_BT is None else (self.mask_BT.cumsum(1) - 1).clamp(min=0)
        live_B = torch.ones(len(self.input_ids), dtype=torch.bool, device=self.input_ids.device)
        return _Text(self.input_ids, self.mask_BT, position_BT, live_B, self.new_cache(self.model.config, columns), [])

    def _plain(
        self, text: _Text, sample: Sampler, count: int, logits_to_keep: int, length: Length | None = None
    ) -> Iterator[DecodingPass]:
        """Yield the passes of `count` tokens, one for each, or fewer if all rows end.

        text: the rows, brought up to date. sample, logits_to_keep: as in `__call__`. length: the rule that is told how
        long each step takes, if drafts are used.
        """
        for _ in range(count):
            began = time.perf_counter()
            out = self.model(
                input_ids=text.unread_BT,
                attention_mask=text.mask_BT,
                position_ids=text.position_BT,
                past_key_values=text.cache,
                use_cache=True,
                routing="causal",
                noise=False,
                output_records=True,
                logits_to_keep=logits_to_keep,
            )
            live_B = text.live_B
            token_B = torch.where(live_B, sample(out.logits[:, -1]), self.pad)
            seconds = time.perf_counter() - began
            yield DecodingPass(token_B, live_B, out.records, out.logits, text.cache)
            began = time.perf_counter()
            if self._ends(text, token_B):
                return
            text.unread_BT, text.mask_BT = token_B[:, None], None  # nothing new is padding
            text.position_BT = None if text.position_BT is None else text.position_BT[:, -1:] + 1
            if length is not None:
                text.new.append(text.unread_BT)
                length.learn(0, 0, 0.0, seconds + time.perf_counter() - began)

    def _ends(self, text: _Text, token_B: Tensor) -> bool:
        """Mark the rows of `text` that end with the tokens token_B, int64, and return whether every row has ended."""
        text.live_B = text.live_B & ~torch.isin(token_B, self.ends_E)
        text.ended = bool(len(self.ends_E)) and not bool(text.live_B.any())
        return text.ended

    @torch.no_grad()
    def _drafted(self, sample: Sampler, logits_to_keep: int) -> Iterator[DecodingPass]:
        """Yield a `DecodingPass` for each new token, by passes that each check several drafted tokens.

        All rows advance by the number of tokens that every row accepts. sample, logits_to_keep: as in `__call__`, the
        latter for the pass over the prompt only.
        """
        assert self.drafting is not None
        (draft, length), text = self.drafting, self._begin(0)
        whole, end, prompt = self.input_ids, self.input_ids.shape[1] + self.max_new_tokens, True
        guess_BK, guessing, kind = whole[:, :0], 0.0, 0
        while not text.ended and whole.shape[1] < end:
            if not prompt and not guess_BK.shape[1] and (rest := min(length.rest(), end - whole.shape[1])):
                draft.rest()
                yield from self._plain(text, sample, rest, 1, length)
                whole, text.new = torch.cat([whole, *text.new], 1), []
                guessing, guess_BK, kind = self._guess(draft, length, whole, text, end)
                continue
            began, count = time.perf_counter(), guess_BK.shape[1]
            out = self.model(
                input_ids=torch.cat([text.unread_BT, guess_BK], 1) if count else text.unread_BT,
                attention_mask=text.mask_BT,
                position_ids=text.position_BT if prompt else _on(text.position_BT, 0, count + 1),
                past_key_values=text.cache,
                use_cache=True,
                routing="causal",
                noise=False,
                output_records=True,
                output_last_hidden_state=draft.reads_states,
                logits_to_keep=logits_to_keep if prompt else count + 1,
            )
            mask_BT, stood, waited, new = text.mask_BT, 0, 0.0, list[Tensor]()
            for i in range(count + 1):
                guess_B, live_B = guess_BK[:, i] if i < count else None, text.live_B
                token_B = torch.where(live_B, sample(out.logits[:, i - count - 1], guess_B), self.pad)
                right_B = torch.zeros_like(live_B) if guess_B is None else (token_B == guess_B) & live_B
                asked = time.perf_counter()
                yield DecodingPass(
                    token_B, live_B, out.records, out.logits, text.cache, i - count - 1, right_B, guess_BK
                )
                waited += time.perf_counter() - asked
                new.append(token_B[:, None])
                agreed = guess_B is not None and bool((right_B | ~live_B).all())
                if self._ends(text, token_B):
                    return
                if not agreed or whole.shape[1] + len(new) == end:
                    break
                stood += 1
            whole = torch.cat([whole, *new], 1)
            text.unread_BT, text.mask_BT = new[-1], None
            text.position_BT = _on(text.position_BT, len(new), 1)
            if stood < count:  # nothing was wrong otherwise, and a crop looks at every block
                text.cache.crop(whole.shape[1] - 1)
            if not prompt:
                length.learn(count, stood, guessing, time.perf_counter() - began - waited, kind)
            hidden_BTD = out.last_hidden_state[:, : None if prompt else stood + 1] if draft.reads_states else None
            guessing, guess_BK, kind = self._guess(draft, length, whole, text, end, hidden_BTD, mask_BT)
            prompt = False

    def _guess(
        self,
        draft: Draft,
        length: Length,
        whole: Tensor,
        text: _Text,
        end: int,
        hidden_BTD: Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> tuple[float, Tensor, int]:
        """Draft what the next pass checks; return the seconds spent, the guesses, int64 [B, K], and their kind.

        draft, length: the draft and the rule for the number of guesses. whole: all tokens so far, [B, T]. text: the
        rows. end: largest number of tokens per row. hidden_BTD: the hidden states of the last pass for a draft that
        reads them, or None. mask_BT: their attention mask, or None.
        """
        began, most = time.perf_counter(), max(end - whole.shape[1] - 1, 0)
        if hidden_BTD is not None:
            draft.see(hidden_BTD, mask_BT)
        possible = draft.kind(whole)
        kind, wanted = (0, 0) if possible is None else (possible, length.next(most, possible))
        guess_BK = draft.propose(whole, text.cache, text.position_BT, wanted) if wanted else whole[:, :0]
        return time.perf_counter() - began, guess_BK, kind


def _on(position_BT: Tensor | None, steps: int, count: int) -> Tensor | None:
    """Return the positions [B, count] of neighbouring tokens, or None for position_BT None.

    The first of them lies `steps` after the last of position_BT [B, T].
    """
    if position_BT is None:
        return None
    return position_BT[:, -1:] + steps + torch.arange(count, device=position_BT.device)


def setting_of(
    model: SkipstoneForCausalLM,
    budget: float | None,
    budget_table: BudgetTable | None,
    draft: Drafted | None = None,
) -> Setting:
    """Return a function that returns a context manager, which sets the model to a budget inside a `with` block.

    budget: share of the dense FLOPs to execute; None changes nothing. budget_table: the thresholds for it; None means
    budget.json in the model's folder. draft: the source of guesses in use; "budget:SHARE" may need the table even
    without a budget. Raises ValueError for a budget out of range, and for a table that nothing would use;
    FileNotFoundError for a budget without a table.
    """
    if budget is None:
        if budget_table is not None and not (isinstance(draft, str) and draft.startswith("budget:")):
            raise ValueError("a budget table has no effect without a budget")
        return nullcontext
    budget_table = BudgetTable.of(model) if budget_table is None else budget_table
    budget_table.thresholds(budget)
    return partial(budget_table.at, model, budget)
