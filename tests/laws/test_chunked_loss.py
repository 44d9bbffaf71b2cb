"""Law 15: the chunked loss equals the plain loss in value, gradients and executed operations, for every mechanism."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laws.builders import LENGTH, VOCAB, Case, assert_close, case, entry, gradients, ids, lively
from laws.test_losses import COMPOSED, labels, shifted
from skipstone.measure.flops import count_flops

TIED = case(entry("mixture_of_depths"), tie_word_embeddings=True)


def step(chosen: Case, chunk: int, **given: object) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = lively(chosen).train()
    model.zero_grad()
    out = model(ids(), noise=False, loss_chunk=chunk, **{"labels": labels(), **given})
    (0.5 * out.loss).backward()
    assert (out.logits is None) == bool(chunk)
    return [out.loss, out.token_loss, out.auxiliary_loss], gradients(model)


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("chosen", [*COMPOSED, TIED], ids=str)
def test_equals_the_loss_of_all_logits(chosen: Case, chunk: int) -> None:
    for given in ({}, {"num_items_in_batch": torch.tensor(50)}, {"shift_labels": shifted(labels()), "labels": None}):
        losses, expected = step(chosen, 0, **given)
        chunked, got = step(chosen, chunk, **given)
        for one, other in zip(chunked, losses, strict=True):
            assert_close(one, other, tolerance=1e-6)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(got[name], gradient, name, tolerance=1e-6)


def test_under_autocast_it_rounds_where_the_head_does() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        losses, expected = step(TIED, 0)
        chunked, got = step(TIED, 7)
    for one, other in zip(chunked, losses, strict=True):
        assert_close(one, other, tolerance=1e-6)
    for name, gradient in expected.items():
        assert got[name].dtype == gradient.dtype
        assert (got[name] - gradient).abs().max() <= 0.02 * gradient.abs().max().clamp(min=1e-6), name


def test_it_executes_the_same_products() -> None:
    model, tokens = lively(TIED).train(), ids()

    def executed(chunk: int) -> int:
        def fn() -> None:
            model(tokens, labels=tokens, noise=False, loss_chunk=chunk).loss.backward()

        found = count_flops(fn)
        assert found.unknown == ()
        return found.total

    assert executed(4) == executed(0) > 6 * VOCAB * LENGTH


@torch.no_grad()
def test_without_labels_there_are_logits() -> None:
    model = lively(TIED)
    assert torch.equal(model(ids(), loss_chunk=4).logits, model(ids()).logits)


def test_without_any_label_it_is_the_mean_of_nothing() -> None:
    model, none = lively(TIED), torch.full_like(ids(), -100)
    assert model(ids(), labels=none).token_loss.isnan()
    assert model(ids(), labels=none, loss_chunk=4).token_loss.isnan()


def test_what_it_cannot_do_is_refused() -> None:
    model = lively(TIED)
    with pytest.raises(ValueError, match="logits_to_keep cannot be combined with labels"):
        model(ids(), labels=ids(), logits_to_keep=1, loss_chunk=4)
    with pytest.raises(ValueError, match="chunk must be at least 1 token, got -3"):
        model(ids(), labels=ids(), loss_chunk=-3)
    head = model.lm_head
    model.lm_head = nn.Sequential(head)  # type: ignore[assignment]
    try:
        with pytest.raises(ValueError, match="loss_chunk needs direct access to the head's weight"):
            model(ids(), labels=ids(), loss_chunk=4)
    finally:
        model.lm_head = head
