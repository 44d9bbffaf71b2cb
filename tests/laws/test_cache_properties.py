"""Law 3: after any sequence of cache operations, the model gives what it computes for the rows' tokens from scratch.

Each row is the list of its inputs; the specification is the plain forward pass of every document of every row alone,
without cache, padding and packing.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from laws.builders import GROUPS, VOCAB, Case, assert_close, case, entry, lively
from skipstone import SkipstoneForCausalLM

CASES = [
    case(activation="polyglu"),
    case(entry("mixture_of_depths", decision="ema_threshold"), activation="polyglu"),
    case(entry("mixture_of_depths", decision="predictor")),
    case(entry("mixture_of_depths", decision="random")),
    case(entry("token_selective")),
    case(entry("early_exit"), activation="polyglu"),
    case(*map(entry, ("mixture_of_depths", "token_selective", "early_exit")), activation="polyglu"),
    case(entry("early_exit"), entry("token_selective", on="attention"), entry("mixture_of_depths", on="mlp")),
    *GROUPS[:3],
    case(*map(entry, ("token_selective", "mixture_of_depths")), neuron_groups=GROUPS[0].more[0][1]),
]
MOST_ROWS, MOST_SLOTS = 4, 40
EXACT = 1e-5


class Entry(NamedTuple):
    """A slot of a row, and what the model said there."""

    token: int
    real: bool
    document: int
    logits: Tensor


class History:
    """A model with its cache, and beside it what each row was given."""

    def __init__(self, model: SkipstoneForCausalLM, cache: Cache, packed: bool, padded: bool, seed: int) -> None:
        self.model, self.cache, self.packed, self.padded = model, cache, packed, padded
        self.fixed = isinstance(cache, StaticCache)
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: list[list[Entry]] = [[] for _ in range(2)]

    @property
    def seen(self) -> int:
        return len(self.rows[0])

    def draw(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator)

    def act(self, name: str, n: int) -> None:
        B = len(self.rows)
        if name == "append":
            self.append(min(n, MOST_SLOTS - self.seen))
        elif name == "reset":
            self.check()
            self.cache.reset()
            rows = len(self.rows) if self.fixed else 1 + n % 3  # a cache of fixed size keeps its memory
            self.rows = [[] for _ in range(rows)]
        elif name == "crop":
            self.check()
            n = n % (self.seen + 1)
            self.cache.crop(n or -self.seen)
            self.rows = [row[:n] for row in self.rows]
        elif name == "remove":
            self.check()
            n = min(n, self.seen)
            self.cache.crop(-n)
            self.rows = [row[: len(row) - n] for row in self.rows]
        elif self.seen:
            self.move(name, self.draw(B, B if name == "reorder" else 1 + n % 3), 2 if 2 * B <= MOST_ROWS else 1)

    def move(self, name: str, rows: Tensor, repeats: int) -> None:
        if name == "repeat":
            rows = torch.arange(len(self.rows)).repeat_interleave(repeats)
            self.cache.batch_repeat_interleave(repeats)
        elif name == "select":
            self.cache.batch_select_indices(rows)
        else:
            self.cache.reorder_cache(rows)
        self.rows = [list(self.rows[i]) for i in rows.tolist()]

    def append(self, T: int) -> None:
        B = len(self.rows)
        if not T:
            return
        token, executor = self.draw(VOCAB, B, T), ("gathered", "masked")[int(self.draw(2, 1))]
        real = self.draw(3, B, T) > 0 if self.padded else torch.ones(B, T, dtype=torch.bool)
        last = torch.tensor([[row[-1].document if row else 0] for row in self.rows])
        document = last + (self.draw(4, B, T) == 0).cumsum(1) * self.packed
        logits = self.model(
            token, past_key_values=self.cache, executor=executor, **self.arguments(real, document)
        ).logits
        for b, row in enumerate(self.rows):
            row += map(Entry, token[b].tolist(), real[b].tolist(), document[b].tolist(), logits[b])
        assert int(self.cache.get_seq_length()) == self.seen

    def arguments(self, real: Tensor, document: Tensor) -> dict[str, Tensor]:
        """What a caller gives with these tokens: a mask of all slots so far, or of these beside their positions."""
        more = {"document_ids": document} if self.packed else {}
        if self.packed or (self.padded and bool(self.draw(2, 1))):
            more["position_ids"] = self.positions(real, document)
        if self.padded:
            before = torch.tensor([[e.real for e in row] for row in self.rows]).view(len(real), self.seen).bool()
            short = "position_ids" in more and bool(self.draw(2, 1))
            more["attention_mask"] = (real if short else torch.cat((before, real), 1)).long()
        return more

    def positions(self, real: Tensor, document: Tensor) -> Tensor:
        """How many real tokens of its document come before each token."""
        found = torch.zeros_like(document)
        for b, row in enumerate(self.rows):
            count: dict[int, int] = {}
            for e in row:
                count[e.document] = count.get(e.document, 0) + e.real
            for t, (d, is_real) in enumerate(zip(document[b].tolist(), real[b].tolist(), strict=True)):
                found[b, t] = count.setdefault(d, 0)
                count[d] += is_real
        return found

    def check(self) -> None:
        """Every logit that is still remembered against its document alone."""
        for b, row in enumerate(self.rows):
            for document, entries in itertools.groupby((e for e in row if e.real), lambda e: e.document):
                alone = list(entries)
                expected = self.model(torch.tensor([[e.token for e in alone]]), use_cache=False).logits[0]
                assert_close(torch.stack([e.logits for e in alone]), expected, f"row {b} {document}", EXACT)


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 7)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.sampled_from(["crop", "remove", "reorder", "select", "repeat", "reset"]), st.integers(0, 9)),
    ),
    min_size=2,
    max_size=10,
)


@pytest.mark.parametrize("chosen", CASES, ids=str)
@torch.no_grad()
def test_any_history_equals_recomputation(chosen: Case) -> None:
    model = lively(chosen)

    @settings(max_examples=8)
    @given(ACTS, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 10_000))
    def run(acts: list[tuple[str, int]], packed: bool, padded: bool, fixed: bool, seed: int) -> None:
        grows, holds = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=MOST_SLOTS + 2)
        history = History(model, holds if fixed else grows, packed, padded, seed)
        for name, n in acts:
            history.act(name, n)
        history.append(2)
        history.check()

    run()
