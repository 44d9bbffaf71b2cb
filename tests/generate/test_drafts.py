"""Speculative decoding: greedy text is the same as without drafts, sampled text has the same distribution."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import skipstone
from generate.chances import plausible
from models import tiny_model
from skipstone.generate import generate, stream
from skipstone.generate.drafts import FewerBits, Lookup, in_fewer_bits
from skipstone.generate.speculation import HOPED, LENGTHS, Length, stand_or_redraw
from skipstone.model.quantise import quantise

ROUTED: list[dict[str, Any]] = [
    {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.5, "decision": "threshold"},
    {"name": "token_selective", "layers": "2:"},
]


def model(mechanisms: list[dict[str, Any]] | None = None, **options: Any) -> skipstone.SkipstoneForCausalLM:
    sizes = {"num_hidden_layers": 4, "vocab_size": 23, "initializer_range": 0.3}
    return tiny_model(None, **{**sizes, **options}, mechanisms=mechanisms)


def ids(rows: int = 1, tokens: int = 7) -> Tensor:
    return torch.randint(0, 23, (rows, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("draft", "rows"),
    [
        pytest.param(draft, rows, marks=() if (i + rows) % 4 == 1 else pytest.mark.slow)
        for i, draft in enumerate(("lookup", "exit", "exit:1", "skip", "model", "llama", "int8", "int4"))
        for rows in (1, 3)
    ],
)
def test_greedy_text_is_the_same(draft: str, rows: int) -> None:
    target = model(ROUTED)
    others = {"model": lambda: model(num_hidden_layers=1), "llama": llama}
    guesses = others[draft]() if draft in others else draft
    plain = generate(target, ids(rows), max_new_tokens=24)
    for length in (3, None):
        assert torch.equal(generate(target, ids(rows), max_new_tokens=24, draft=guesses, draft_length=length), plain)


@pytest.mark.parametrize("bits", [16, 4])
def test_greedy_text_is_the_same_with_weights_of_few_bits(bits: int) -> None:
    target = quantise(model(ROUTED, hidden_size=64, intermediate_size=128), bits)
    for rows, draft, length in ((1, "lookup", 7), (1, "exit", 3), (3, "exit", 5)):
        plain = generate(target, ids(rows), max_new_tokens=20)
        assert torch.equal(generate(target, ids(rows), max_new_tokens=20, draft=draft, draft_length=length), plain)


def test_a_copy_in_fewer_bits_is_made_once_and_anew_when_weights_change() -> None:
    target = model(ROUTED, hidden_size=64)
    copy = in_fewer_bits(target, 8)
    assert in_fewer_bits(target, 8) is copy
    with torch.no_grad():
        next(target.model.layers[0].parameters()).mul_(1.5)
    changed = in_fewer_bits(target, 8)
    assert changed is not copy
    assert not torch.equal(changed(ids()).logits, copy(ids()).logits)


def test_a_copy_in_fewer_bits_guesses_what_the_model_says() -> None:
    """It reads the model's cache, which it leaves as it found it, and weights of 16 bits have copies too."""
    for target in (model(ROUTED, hidden_size=64), quantise(model(ROUTED, hidden_size=64), 16)):
        steps = list(stream(target, ids(), max_new_tokens=40, draft="int8", draft_length=3))
        assert [int(step.token_B) for step in steps] == generate(target, ids(), max_new_tokens=40)[0, 7:].tolist()
        assert sum(bool(step.guessed_B) for step in steps) > 20


def test_a_model_made_in_inference_mode_has_copies_too() -> None:
    with torch.inference_mode():
        target = model(hidden_size=64)
        plain = generate(target, ids(), max_new_tokens=8)
        assert torch.equal(generate(target, ids(), max_new_tokens=8, draft="int8", draft_length=2), plain)


@pytest.mark.usefixtures("coarse_tables")
def test_a_copy_in_fewer_bits_runs_at_the_budget_of_the_model() -> None:
    target = model(ROUTED[1:], hidden_size=64)
    table = skipstone.calibrate(target, ids(4, 32))
    draft = FewerBits(target, 8, table, table.range[0])
    before = draft.model(ids()).logits
    with draft.cheaper():
        assert not torch.equal(draft.model(ids()).logits, before)
    assert torch.equal(draft.model(ids()).logits, before)


@pytest.mark.parametrize("draft", ["lookup", "exit", "int8"])
def test_greedy_text_is_the_same_with_a_cache_in_16_bits(draft: str) -> None:
    target = model(ROUTED, hidden_size=64, cache_format="float16")
    plain = generate(target, ids(3), max_new_tokens=16)
    assert torch.equal(generate(target, ids(3), max_new_tokens=16, draft=draft, draft_length=3), plain)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=23, bos_token_id=None, eos_token_id=None)).eval()


@pytest.mark.usefixtures("coarse_tables")
def test_a_lower_budget_drafts() -> None:
    target = model(ROUTED[1:])
    table = skipstone.calibrate(target, ids(4, 32))
    low = table.range[0]
    plain = generate(target, ids(), max_new_tokens=12)
    assert torch.equal(
        generate(target, ids(), max_new_tokens=12, draft=f"budget:{low:g}", budget_table=table, draft_length=2), plain
    )


def test_padding_and_ends_are_those_without_drafts() -> None:
    target, given = model(ROUTED), ids(2)
    mask = torch.ones_like(given)
    mask[0, :3] = 0
    end = int(generate(target, given, mask, max_new_tokens=8)[0, -3])
    options: dict[str, Any] = {"max_new_tokens": 16, "eos_token_id": end, "pad_token_id": 0}
    plain = generate(target, given, mask, **options)
    for draft in ("lookup", "exit"):
        assert torch.equal(generate(target, given, mask, **options, draft=draft, draft_length=4), plain)


@pytest.mark.parametrize("draft", ["lookup", "exit:3"])
def test_the_text_is_the_same_where_drafts_rest(draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two padded rows, with plain steps between the drafts."""
    target, given, rests = model(ROUTED), ids(2), cycle([3, 0, 1, 0])
    mask = torch.ones_like(given)
    mask[0, :3] = 0
    plain = generate(target, given, mask, max_new_tokens=24)
    monkeypatch.setattr(Length, "rest", lambda self: next(rests))
    monkeypatch.setattr(Length, "next", lambda self, most, kind=0: min(2, most))
    steps = list(stream(target, given, mask, max_new_tokens=24, draft=draft))
    assert torch.equal(torch.stack([step.token_B for step in steps], 1), plain[:, 7:])
    end = int(plain[0, -6])
    options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": end, "pad_token_id": 0}
    monkeypatch.undo()
    plain = generate(target, given, mask, **options)
    monkeypatch.setattr(Length, "rest", lambda self: next(rests))
    assert torch.equal(generate(target, given, mask, **options, draft=draft), plain)


def test_steps_tell_what_was_guessed_and_the_model_is_as_it_was() -> None:
    target = model()
    layers = target.model.layers
    steps = list(stream(target, ids(), max_new_tokens=30, draft="exit:3", draft_length=2))
    plain = list(stream(target, ids(), max_new_tokens=30))
    assert [int(step.token_B) for step in steps] == [int(step.token_B) for step in plain]
    assert any(bool(step.guessed_B) for step in steps)
    assert not any(bool(step.guessed_B) for step in plain)
    assert target.model.layers is layers


def test_lookup_goes_on_from_the_latest_place() -> None:
    row = torch.tensor([[5, 6, 7, 1, 5, 6, 8, 2, 5, 6]])
    assert Lookup().propose(row, None, None, 3).tolist() == [[8, 2, 5]]  # type: ignore[arg-type]
    assert Lookup().propose(torch.tensor([[1, 2, 3]]), None, None, 3).shape == (1, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("guess", [0, 3, 5])
def test_a_guess_is_drawn_as_often_as_without_it(guess: int) -> None:
    """Chi-square over 20,000 draws of a distribution with six tokens, one of them impossible."""
    probability = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05, 0.0])
    generator = torch.Generator().manual_seed(0)
    drawn = stand_or_redraw(probability.expand(20_000, -1), torch.full((20_000,), guess), generator)
    counts = torch.bincount(drawn, minlength=6)
    assert counts[5] == 0
    assert plausible(counts[:5], probability[:5] * 20_000)
    certain = torch.tensor([[0.0, 1.0]]).expand(64, -1)
    assert stand_or_redraw(certain, torch.full((64,), 1), generator).eq(1).all()


@pytest.mark.slow
def test_sampled_text_keeps_its_distribution() -> None:
    """Second tokens of 1,500 rows, with and without a draft, by a chi-square test of equal distributions."""
    target, rows = model(vocab_size=6, initializer_range=0.1), 1500
    given = torch.tensor([[1, 2, 3]]).expand(rows, -1)
    plain = generate(target, given, max_new_tokens=3, temperature=1.0, seed=0)[:, -1]
    drafted = [
        generate(target, given[:1], max_new_tokens=3, temperature=1.0, seed=i, draft="exit:3", draft_length=2)[0, -1]
        for i in range(300)
    ]
    expected = torch.bincount(plain, minlength=6).double() / rows
    counts = torch.bincount(torch.stack(drafted), minlength=6)
    assert plausible(counts, expected * 300)


def test_a_loop_goes_on() -> None:
    """The earlier place is so late that the text ends before there are enough tokens after it."""
    draft = Lookup()
    assert draft.propose(torch.tensor([[9, 5, 6, 5, 6]]), None, None, 5).tolist() == [[5, 6, 5, 6, 5]]  # type: ignore[arg-type]
    assert draft.kind(torch.tensor([[9, 5, 6, 5, 6, 9]])) == 1
    assert draft.propose(torch.tensor([[9, 5, 6, 5, 6, 9, 4]]), None, None, 5).shape == (1, 0)  # type: ignore[arg-type]


def simulated(
    stands: Callable[[int], float],
    guess: float,
    tokens: int,
    check: float = 0.1,
    noise: float = 0.0,
    seed: int = 0,
    watch: float = 0.0,
    least: float = 0.0,
    hoped: float = HOPED,
) -> tuple[float, list[int]]:
    """Decode with a simulated clock; return how many times as fast as without drafts, and the drafted numbers.

    stands: the probability that a guess is right, by the tokens so far. guess, check: seconds of a guess and of its
    check; a plain step takes 1. noise: the share of measurements that are five times as long as they should be. watch:
    seconds that every step takes longer in which guesses are thought of. least: what a check is known to take longer.
    hoped: the probability that is expected at first.
    """
    length, drawn = Length(cost=guess, least=least, hoped=hoped), random.Random(seed)
    made, seconds, lengths = 0, 0.0, list[int]()
    while made < tokens:
        rest = min(length.rest(), tokens - made)
        for _ in range(rest):
            length.learn(0, 0, 0.0, 1.0)
        made, seconds, lengths = made + rest, seconds + rest, lengths + [0] * rest
        if made == tokens:
            break
        count, stood = length.next(tokens - made - 1), 0
        while stood < count and drawn.random() < stands(made + stood):
            stood += 1
        times = [count * guess + watch, 1 + count * check]
        seconds += sum(times)
        measured = [5 * x if drawn.random() < noise else x for x in times]
        length.learn(count, stood, *measured)
        made += stood + 1
        lengths.append(count)
    return made / seconds, lengths


def texts() -> Iterator[Any]:
    """Shares of guesses that stand, costs of a guess and numbers of tokens; two of the long texts are quick."""
    for stands, guess, tokens in itertools.product((0.0, 0.05, 0.3, 0.6), (0.0, 0.3, 0.6, 1.0), (64, 256, 2048)):
        quick = tokens < 2048 or (stands == 0.05 and guess in (0.0, 0.6))
        yield pytest.param(stands, guess, tokens, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("stands", "guess", "tokens"), list(texts()))
def test_drafts_are_never_slower_than_98_percent(stands: float, guess: float, tokens: int) -> None:
    for check, seed in ((0.02, 0), (0.1, 1), (0.3, 2)):
        assert simulated(lambda at: stands, guess, tokens, check, seed=seed)[0] >= 0.98
        if tokens > 100:  # the least for guesses that are expected to stand
            assert simulated(lambda at: stands, guess, tokens, check, seed=seed, hoped=0.9)[0] >= 0.98


@pytest.mark.parametrize("tokens", [128, 512])
@pytest.mark.parametrize("watch", [0.001, 0.05, 0.3])
@pytest.mark.parametrize(("guess", "check"), [(0.0, 0.4), (0.9, 0.4), (1.3, 0.5)])
def test_the_bound_holds_where_python_takes_longer_than_the_model(
    guess: float, check: float, watch: float, tokens: int
) -> None:
    """In a tiny model, a guess costs a step, and merely thinking of one is seen."""
    for stands, seed in ((0.0, 0), (0.3, 1), (0.6, 2)):
        faster, lengths = simulated(lambda at: stands, guess, tokens, check, seed=seed, watch=watch, least=0.4)  # noqa: B023
        assert faster >= 0.98, (stands, lengths)


def test_watching_costs_nothing_beside_a_large_model_and_goes_on() -> None:
    faster, lengths = simulated(lambda at: 0.9 if at >= 300 else 0.0, 0.02, 600, watch=0.001)
    assert faster > 1.3
    assert max(lengths[200:]) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_a_text_that_turns_is_noticed(seed: int) -> None:
    """Nothing is right, then nearly everything, then nothing: drafting begins, and stops again."""
    faster, lengths = simulated(lambda at: 0.9 if 300 <= at < 600 else 0.0, 0.02, 900, seed=seed)
    assert faster > 1.2
    assert max(lengths) >= 5
    assert sum(0.12 * count for count in lengths[-200:]) < 4 + 0.02 * 200


@pytest.mark.parametrize("seed", range(3))
def test_drafts_that_pay_are_used_at_the_best_length(seed: int) -> None:
    faster, lengths = simulated(lambda at: 0.95, 0.02, 1000, seed=seed)
    best = max(sum(0.95**i for i in range(n + 1)) / (1 + 0.12 * n) for n in LENGTHS)
    assert faster > 0.93 * best
    assert lengths[0] == 0  # what a plain step takes has to be known


@pytest.mark.parametrize("seed", range(5))
def test_a_process_that_loses_its_processor_is_not_misled(seed: int) -> None:
    assert simulated(lambda at: 0.1, 0.5, 500, noise=0.1, seed=seed)[0] >= 0.97
    assert simulated(lambda at: 0.95, 0.02, 500, noise=0.1, seed=seed)[0] >= 2


def test_a_first_guess_that_lost_its_processor_does_not_end_drafting() -> None:
    for slow in ({"guessing": 9.0, "checking": 1.1}, {"guessing": 0.1, "checking": 9.0}):
        length = Length(cost=0.1, hoped=0.9)
        for _ in range(2):
            length.learn(0, 0, 0.0, 1.0)
        length.learn(1, 1, **slow)
        length.allowed = 1.0
        assert length.next(7) > 0


def test_kinds_of_guesses_are_told_apart() -> None:
    length = Length()
    for _ in range(2):
        length.learn(0, 0, 0.0, 1.0)
    for _ in range(20):
        length.learn(5, 5, 0.0, 1.5, kind=3)
        length.learn(1, 0, 0.0, 1.3, kind=1)
    length.allowed = 0.0
    assert length.next(7, kind=3) == 0  # not even what pays, if nothing more may be lost
    length.allowed = 1.0
    assert length.next(7, kind=3) >= 5
    assert length.next(3, kind=3) == 3
    assert length.stands[1].share() < 0.1 < 0.9 < length.stands[3].share()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": "luck"}, "unknown draft 'luck'"),
        ({"draft": "exit:9"}, r"the number of blocks must be in \[1, 3\]"),
        ({"draft": "int8:2"}, "unknown draft 'int8:2'"),
        ({"draft": "budget:x"}, "name the share of the dense FLOPs"),
        ({"draft_length": 3}, "draft_length has no effect without a draft"),
        ({"draft": "exit", "draft_length": 0}, r"draft_length must be in \[1, 32\]"),
        ({"draft": "exit", "cache": "static"}, "needs cache 'dynamic'"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    target = model(ROUTED[1:])
    table = {"budget_table": skipstone.calibrate(target, ids(2, 16))} if "budget" in str(options) else {}
    with pytest.raises(ValueError, match=message):
        generate(target, ids(), max_new_tokens=2, **options, **table)


def test_a_copy_with_as_many_bits_is_refused() -> None:
    target = quantise(model(hidden_size=64), 8)
    with pytest.raises(ValueError, match="draft 'int8': the model's weights have 8 bits already"):
        generate(target, ids(), max_new_tokens=2, draft="int8")


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="its vocabulary has 29 tokens, the model's 23"):
        generate(model(), ids(), max_new_tokens=2, draft=model(vocab_size=29))
