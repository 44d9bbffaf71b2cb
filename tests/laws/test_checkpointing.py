"""Law 14: activation checkpointing does not change loss, records or gradients; unsupported uses are refused."""

from __future__ import annotations

import pytest
import torch

from laws.builders import (
    DECIDED,
    NESTED,
    ORDERS,
    VARIANTS,
    Case,
    assert_close,
    assert_same_records,
    case,
    entry,
    gradients,
    ids,
    lively,
)


@pytest.mark.parametrize("chosen", ORDERS + NESTED + DECIDED + VARIANTS, ids=str)
def test_checkpointing_changes_nothing(chosen: Case) -> None:
    for routing in ["oracle"] if chosen.oracle_only else ["oracle", "causal"]:
        results = []
        for checkpointed in (False, True):
            model = lively(chosen).train()
            if checkpointed:
                model.activation_checkpointing_enable()
            torch.manual_seed(3)  # noise is drawn in the first pass and again, the same, in the second
            out = model(ids(), labels=ids(), routing=routing, output_records=True)
            out.loss.backward()
            results.append((out, gradients(model)))
        (plain, expected), (saved, got) = results
        assert torch.equal(plain.loss, saved.loss)
        assert_same_records(plain.records, saved.records, 0.0)
        for name, gradient in expected.items():
            assert_close(got[name], gradient, name, 1e-6)


def test_blocks_are_really_recomputed() -> None:
    model, calls = lively(case(entry("mixture_of_depths"))).train(), []
    model.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    model.activation_checkpointing_enable()
    model(ids(), labels=ids()).loss.backward()
    assert len(calls) == 2


def test_reentrant_mode_is_refused() -> None:
    model = lively(case(entry("early_exit")))
    with pytest.raises(ValueError, match="use_reentrant=True loses the records"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=True"), pytest.warns(FutureWarning):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


def test_the_cache_it_would_lose_is_refused() -> None:
    """transformers drops the cache of a checkpointed layer in training mode: generation would forget its prompt."""
    model = lively(case(entry("mixture_of_depths"))).train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="activation checkpointing"):
        model.generate(ids(), max_new_tokens=3, do_sample=False)
    expected = lively(case(entry("mixture_of_depths"))).generate(ids(), max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids(), max_new_tokens=3, do_sample=False, use_cache=False), expected)
    assert torch.equal(model.eval().generate(ids(), max_new_tokens=3, do_sample=False), expected)
