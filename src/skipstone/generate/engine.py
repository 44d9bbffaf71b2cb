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
from skipstone.generate.prompt import check_count, check_padding, checked_prompt, ends_of
from skipstone.generate.speculation import Length, stand_or_redraw
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

    token_B: int64, the pad id in rows that have ended. live_B: bool, rows that had not ended before. compute_B: fp32 on
    the CPU, the share (0 to 1) of the blocks' computation that was executed in the pass that predicted the token.
    guessed_B: bool, whether a draft had proposed the token; compute_B does not include the draft's own computation.
    """

    token_B: Tensor
    live_B: Tensor
    compute_B: Tensor
    guessed_B: Tensor


class DecodingPass(NamedTuple):
    """A pass over the prompt, or over one or a few tokens of each row, and one token chosen from it.

    A pass that checks drafted tokens is described by several of these objects, one for each token that it yields.
    token_B, live_B: as in `Step`. records: the decisions of every block, by mechanism name. logits_BTV: the logits of
    the pass's last T tokens. cache: the cache after the pass. at: index, counted from the end of the pass (-1: its last
    token), of the position that predicted the token. guessed_B: bool, whether a draft had proposed the token; None
    without drafts. guess_BK: int64, the K guesses that the pass checks, of which the first wrong one and those after it
    are dropped; None without drafts.
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

    The arguments are those of `stream`.
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
    blocks; "static" is allocated once, and a step's shapes never change. budget: share of the dense FLOPs to execute;
    the model is set to it while generating. budget_table: thresholds for it; None means budget.json in the model's
    folder. draft: source of guesses that the model checks several at a time: "lookup", "exit", "exit:N", "skip",
    "budget:SHARE", "head", another model or a draft head (`build_draft`). Greedy text then stays the same but for ties
    in the logits, and sampled text keeps its distribution. draft_length: number of guesses at a time; None means that
    measured times decide. Raises ValueError, before the first step, for invalid arguments, a prompt that exceeds the
    context, and mechanisms that need later tokens; FileNotFoundError for a budget without a table and for "head"
    without a draft head.
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
    """Return the draft for a decoder and the rule that chooses the number of guesses; None if `draft` is None.

    decode: the decoder that is to be sped up. draft, length, budget, table: `draft`, `draft_length`, `budget` and
    `budget_table` of `stream`. Raises ValueError for a draft that is not possible, and for a length without a draft.
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
    return found, Length(length, found.cost)


class Decoder:
    """A checked prompt, and the loop that continues it: calling a decoder yields a `DecodingPass` for each new token.

    The arguments are those of `stream`; invalid ones raise ValueError.
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
        """Yield every pass. logits_to_keep: as in forward, 0 for every token."""
        with setting():
            yield from (
                self._passes(sample, logits_to_keep) if self.drafting is None else self._drafted(sample, logits_to_keep)
            )

    @torch.no_grad()
    def _passes(self, sample: Sampler, logits_to_keep: int) -> Iterator[DecodingPass]:
        ids, mask_BT = self.input_ids, self.mask_BT
        cache = self.new_cache(self.model.config, ids.shape[1] + self.max_new_tokens)
        position_BT = None if mask_BT is None else (mask_BT.cumsum(1) - 1).clamp(min=0)
        live_B = torch.ones(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(self.max_new_tokens):
            out = self.model(
                input_ids=ids,
                attention_mask=mask_BT,
                position_ids=position_BT,
                past_key_values=cache,
                use_cache=True,
                routing="causal",
                noise=False,
                output_records=True,
                logits_to_keep=logits_to_keep,
            )
            token_B = torch.where(live_B, sample(out.logits[:, -1]), self.pad)
            yield DecodingPass(token_B, live_B, out.records, out.logits, cache)
            live_B = live_B & ~torch.isin(token_B, self.ends_E)
            if len(self.ends_E) and not bool(live_B.any()):
                return
            ids, mask_BT = token_B[:, None], None  # nothing new is padding
            position_BT = None if position_BT is None else position_BT[:, -1:] + 1

    @torch.no_grad()
    def _drafted(self, sample: Sampler, logits_to_keep: int) -> Iterator[DecodingPass]:
        """Yield every token of passes that check drafted tokens; logits_to_keep holds for the pass over the prompt.

        All rows advance by the number of tokens that every row accepts.
        """
        assert self.drafting is not None
        (draft, length), cache = self.drafting, self.new_cache(self.model.config, 0)
        whole, first = self.input_ids, self.input_ids.shape[1]
        position_BT = None if self.mask_BT is None else (self.mask_BT.cumsum(1) - 1).clamp(min=0)
        live_B = torch.ones(len(whole), dtype=torch.bool, device=whole.device)
        guess_BK, guessing, end, kind = whole[:, :0], 0.0, first + self.max_new_tokens, 0
        while whole.shape[1] < end:
            prompt, began, count = whole.shape[1] == first, time.perf_counter(), guess_BK.shape[1]
            out = self.model(
                input_ids=whole if prompt else torch.cat([whole[:, -1:], guess_BK], 1),
                attention_mask=self.mask_BT if prompt else None,
                position_ids=position_BT if prompt else _on(position_BT, whole.shape[1] - first, count + 1),
                past_key_values=cache,
                use_cache=True,
                routing="causal",
                noise=False,
                output_records=True,
                output_last_hidden_state=draft.reads_states,
                logits_to_keep=logits_to_keep if prompt else count + 1,
            )
            checking, stood = time.perf_counter() - began, 0
            for i in range(count + 1):
                guess_B = guess_BK[:, i] if i < count else None
                token_B = torch.where(live_B, sample(out.logits[:, i - count - 1], guess_B), self.pad)
                right_B = torch.zeros_like(live_B) if guess_B is None else (token_B == guess_B) & live_B
                yield DecodingPass(token_B, live_B, out.records, out.logits, cache, i - count - 1, right_B, guess_BK)
                whole = torch.cat([whole, token_B[:, None]], 1)
                agreed = guess_B is not None and bool((right_B | ~live_B).all())
                live_B = live_B & ~torch.isin(token_B, self.ends_E)
                if len(self.ends_E) and not bool(live_B.any()):
                    return
                if not agreed or whole.shape[1] == end:
                    break
                stood += 1
            if stood < count:  # nothing was wrong otherwise, and a crop looks at every block
                cache.crop(whole.shape[1] - 1)
            if not prompt:
                length.learn(count, stood, guessing, checking, kind)
            began, most = time.perf_counter(), max(end - whole.shape[1] - 1, 0)
            if draft.reads_states:
                draft.see(out.last_hidden_state[:, : None if prompt else stood + 1], self.mask_BT if prompt else None)
            possible = draft.kind(whole)
            kind, wanted = (0, 0) if possible is None else (possible, length.next(most, possible))
            last_B1 = _on(position_BT, whole.shape[1] - first, 1)
            guess_BK = draft.propose(whole, cache, last_B1, wanted) if wanted else whole[:, :0]
            guessing = time.perf_counter() - began


def _on(position_BT: Tensor | None, steps: int, count: int) -> Tensor | None:
    """Return the positions of `count` tokens, the first of which is `steps` after the last of the prompt."""
    if position_BT is None:
        return None
    return position_BT[:, -1:] + steps + torch.arange(count, device=position_BT.device)


def setting_of(
    model: SkipstoneForCausalLM,
    budget: float | None,
    budget_table: BudgetTable | None,
    draft: Drafted | None = None,
) -> Setting:
    """Return a function whose result is a context manager that sets the model to a budget inside a `with` block.

    budget, budget_table, draft: as in `stream`. Without a budget, the context manager changes nothing. Raises
    ValueError for a budget out of range, and for a table that nothing would use; FileNotFoundError for a budget without
    a table.
    """
    if budget is None:
        if budget_table is not None and not (isinstance(draft, str) and draft.startswith("budget:")):
            raise ValueError("a budget table has no effect without a budget")
        return nullcontext
    budget_table = BudgetTable.of(model) if budget_table is None else budget_table
    budget_table.thresholds(budget)
    return partial(budget_table.at, model, budget)


class Sampler:
    """Draws one token of each row from its logits when called.

    temperature: 0 chooses the most probable token; above 0, tokens are drawn from softmax(logits / temperature). top_k:
    draw among this many of the most probable tokens; None means all of them. seed: seed of the draws; None means a
    random seed. device: the logits' device. Raises ValueError for values out of range.
    """

    def __init__(self, temperature: float, top_k: int | None, seed: int | None, device: torch.device) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
        if top_k is not None:
            check_count("top_k", top_k)
        self.temperature, self.top_k = temperature, top_k
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits_BV: Tensor, guess_B: Tensor | None = None) -> Tensor:
        """Draw a token of each row.

        guess_B: the drafted tokens; they are returned exactly as often as they would be drawn without a draft.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        best_BK, index_BK = self._candidates(logits_BV.float())
        probability_BK = best_BK.softmax(-1)
        if guess_B is not None:
            if index_BK is not None:
                zero_BV = torch.zeros(logits_BV.shape, device=logits_BV.device)
                probability_BK = zero_BV.scatter(1, index_BK, probability_BK)
            return stand_or_redraw(probability_BK, guess_B, self.generator)
        drawn_B1 = torch.multinomial(probability_BK, 1, generator=self.generator)
        return (drawn_B1 if index_BK is None else index_BK.gather(1, drawn_B1))[:, 0]

    def _candidates(self, logits_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits to draw from, by temperature, and their tokens; None for the whole vocabulary."""
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature  # no overflow when nearly greedy
        if self.top_k is None or self.top_k >= logits_BV.shape[-1]:
            return logits_BV, None
        best_BK, index_BK = logits_BV.topk(self.top_k)
        return best_BK, index_BK
