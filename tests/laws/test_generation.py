"""Law 11: `generate` equals a plain loop that recomputes everything, in every mode, batch and search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from laws.builders import CAUSAL, DECIDED, LENGTH, NESTED, ORDERS, VARIANTS, Case, case, entry, fresh, ids, lively
from skipstone import SkipstoneForCausalLM

NEW = 5
SOME = (
    [c for c in ORDERS if len(c.mechanisms) in (1, 3)] + NESTED + [c for c in DECIDED + VARIANTS if not c.oracle_only]
)


@torch.no_grad()
def plain_loop(model: SkipstoneForCausalLM, tokens: Tensor, new: int = NEW) -> Tensor:
    for _ in range(new):
        logits = model(tokens, routing="causal", noise=False, use_cache=False).logits[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    return tokens


def greedy(model: SkipstoneForCausalLM, tokens: Tensor, **options: object) -> Tensor:
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, **options)


@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_greedy_equals_the_plain_loop(chosen: Case) -> None:
    model = lively(chosen)
    expected = plain_loop(model, ids())
    assert torch.equal(greedy(model, ids()), expected)
    assert torch.equal(greedy(model, ids(), use_cache=False), expected)
    assert torch.equal(greedy(model, ids()[1:2]), expected[1:2])


@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_left_padded_batch_equals_single_rows(chosen: Case) -> None:
    model, lengths = lively(chosen), (15, 8, 3)
    mask = torch.stack([(torch.arange(15) >= 15 - n).long() for n in lengths])
    batch = greedy(model, ids(), attention_mask=mask, pad_token_id=0)
    for row, n in enumerate(lengths):
        assert torch.equal(batch[row, 15:], plain_loop(model, ids()[row : row + 1, 15 - n :])[0, n:])


@pytest.mark.parametrize("chosen", [c for c in SOME if c.activation == "polyglu"], ids=str)
def test_training_mode_generates_without_noise(chosen: Case) -> None:
    model = lively(chosen)
    expected = greedy(model, ids())
    model.train()
    for _ in range(2):
        assert torch.equal(greedy(model, ids()), expected)
    assert model.training


def test_the_random_decision_draws_nothing_while_generating() -> None:
    model = lively(case(entry("mixture_of_depths", decision="random"))).train()
    state = torch.get_rng_state()
    assert torch.equal(greedy(model, ids()), greedy(model, ids()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("chosen", [c for c in ORDERS if len(c.mechanisms) in (1, 3)], ids=str)
def test_beams_are_the_same_with_and_without_a_cache(chosen: Case) -> None:
    model = lively(chosen)
    results = [
        model.generate(
            ids(), max_new_tokens=4, do_sample=False, num_beams=3, use_cache=use_cache,
            return_dict_in_generate=True, output_scores=True,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(results[0].sequences, results[1].sequences)
    torch.testing.assert_close(results[0].sequences_scores, results[1].sequences_scores)


@pytest.mark.parametrize("chosen", [c for c in ORDERS if len(c.mechanisms) == 1], ids=str)
def test_sampling_and_several_returns(chosen: Case) -> None:
    model, drawn = lively(chosen), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = {"do_sample": True, "top_k": 5, "num_return_sequences": 2, "use_cache": use_cache}
        drawn.append(model.generate(ids(), max_new_tokens=4, **options))
    assert drawn[0].shape == (6, 19)
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("chosen", [c for c in ORDERS if len(c.mechanisms) in (1, 3)], ids=str)
def test_assisted_generation_crops_the_cache(chosen: Case) -> None:
    """Guesses are verified several at a time and rejected ones are cropped away: the tokens must not change."""
    model, tokens = lively(chosen), ids()[:1, :4].repeat(1, 3)
    expected = plain_loop(model, tokens)
    assert torch.equal(greedy(model, tokens, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("chosen", [c for c in ORDERS if len(c.mechanisms) == 1], ids=str)
def test_generation_from_embeddings(chosen: Case) -> None:
    model = lively(chosen)
    embedded = model.model.embed_tokens(ids()).detach()
    got = model.generate(inputs_embeds=embedded, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, plain_loop(model, ids())[:, LENGTH:])


@pytest.mark.parametrize("chosen", [c for c in ORDERS if len(c.mechanisms) == 3], ids=str)
def test_a_conversation_goes_on_with_its_cache(chosen: Case) -> None:
    model = lively(chosen)
    first = greedy(model, ids(), return_dict_in_generate=True)
    longer = torch.cat((first.sequences, ids(seed=3)[:, :4]), 1)
    second = greedy(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(second, plain_loop(model, longer))


def test_stopped_rows_do_not_disturb_the_others() -> None:
    model = lively(case(entry("mixture_of_depths"), entry("token_selective"), activation="polyglu"))
    free = plain_loop(model, ids(), 8)
    eos = free[1, 16].item()  # row 1 ends after two tokens
    stopped = model.generate(ids(), max_new_tokens=8, do_sample=False, eos_token_id=eos, pad_token_id=0)
    for row in range(3):
        ends = (free[row, 15:] == eos).nonzero()
        end = 16 + ends[0].item() if len(ends) else 23
        assert torch.equal(stopped[row, :end], free[row, :end])


def test_oracle_decisions_cannot_generate() -> None:
    model = fresh(case(entry("mixture_of_depths", decision="topk")))
    for act in (lambda: model.generate(ids(), max_new_tokens=2), lambda: model(ids(), routing="causal")):
        with pytest.raises(
            ValueError, match=r"decision 'topk' ranks the whole row .* train with one of threshold"
        ) as error:
            act()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="routing 'oracle' needs the whole row and cannot use a cache"):
        fresh(case(entry("mixture_of_depths"))).generate(ids(), max_new_tokens=2, routing="oracle")


@pytest.mark.filterwarnings("ignore:context 'sequence' of polyglu is not causal")
def test_the_whole_row_context_of_polyglu_cannot_generate() -> None:
    chosen = case(entry("mixture_of_depths"))
    model = fresh(chosen, activation={"name": "polyglu", "context": "sequence"})
    assert model(ids(), routing="oracle").logits.isfinite().all()
    for act in (lambda: model.generate(ids(), max_new_tokens=2), lambda: model(ids(), routing="causal")):
        with pytest.raises(ValueError, match=r"context 'sequence' .*running_mean.*routing='oracle'"):
            act()


def test_an_untrained_threshold_warns() -> None:
    model = fresh(case(entry("mixture_of_depths", decision="ema_threshold")))
    with pytest.warns(UserWarning, match="ema_threshold was never advanced"):
        model.generate(ids(), max_new_tokens=2)


def test_caches_of_another_kind_are_refused() -> None:
    model = lively(case(entry("mixture_of_depths")))
    with pytest.raises(ValueError, match=r"past_key_values must be a DynamicCache\(config=model.config\)"):
        model(ids(), past_key_values=DynamicCache())
    for kind in ("offloaded", "offloaded_static", "quantized"):
        with pytest.raises(ValueError, match=f"cache_implementation '{kind}' cannot hold"):
            greedy(model, ids(), cache_implementation=kind)
    assert torch.equal(greedy(model, ids(), cache_implementation="dynamic"), greedy(model, ids()))


@pytest.mark.slow
def test_every_causal_case_is_ready_to_generate() -> None:
    for chosen in CAUSAL:
        for mechanism in lively(chosen).routing_modules():
            mechanism.require_causal()
            assert mechanism.not_ready_reason() is None
