"""Law 15: labels and shifted labels, auxiliary losses that scale like the token loss, gradient accumulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws.builders import DEPTH, LENGTH, ORDERS, Case, assert_close, case, entry, gradients, ids, lively

COMPOSED = [c for c in ORDERS if len(c.mechanisms) in (0, 1, 3)] + [
    case(entry("mixture_of_depths", decision="threshold", auxiliary_weight=0.5))
]


def labels() -> Tensor:
    wanted = ids().clone()
    wanted[0, :6], wanted[1, 11:], wanted[2, 3] = -100, -100, -100
    return wanted


def shifted(wanted: Tensor) -> Tensor:
    return torch.cat((wanted[:, 1:], torch.full_like(wanted[:, :1], -100)), 1)


@pytest.mark.parametrize("chosen", COMPOSED, ids=str)
@torch.no_grad()
def test_labels_equal_shift_labels_and_the_parts_add_up(chosen: Case) -> None:
    model = lively(chosen)
    one = model(ids(), labels=labels(), routing="oracle", noise=False, output_records=True)
    other = model(ids(), shift_labels=shifted(labels()), routing="oracle", noise=False)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.loss, one.token_loss + one.auxiliary_loss)
    target = shifted(labels())
    expected = torch.nn.functional.cross_entropy(one.logits.flatten(0, 1), target.flatten(), ignore_index=-100)
    assert_close(one.token_loss, expected)
    terms = [r.loss_BT for records in one.records for r in records.values() if getattr(r, "loss_BT", None) is not None]
    assert bool(terms) == any(mechanism.has_auxiliary_loss for mechanism in model.routing_modules())
    if terms:
        assert_close(one.auxiliary_loss, sum(terms)[target != -100].mean())
        assert one.auxiliary_loss > 0


def test_depth_loss_is_the_paper_s() -> None:
    """Token-Selective Attention: lambda times the mean over gated blocks and tokens of 1 - p."""
    out = lively(case(entry("token_selective", depth_weight=0.25)))(
        ids(), labels=ids(), routing="oracle", output_records=True
    )
    weights = [records["token_selective"].weight_BT[:, :-1] for records in out.records if records]
    assert len(weights) == 2
    assert_close(out.auxiliary_loss, 0.25 * torch.stack(weights).mean())


def test_auxiliary_loss_of_mixture_of_depths_is_the_binary_cross_entropy() -> None:
    out = lively(case(entry("mixture_of_depths", decision="threshold", auxiliary_weight=0.5)))(
        ids(), labels=ids(), routing="oracle", output_records=True
    )
    expected = torch.zeros(())
    for record in (records["mixture_of_depths"] for records in out.records[1:]):
        score, kept = record.score_BT[:, :-1], record.kept_BT[:, :-1].float()
        expected = expected - (kept * score.sigmoid().log() + (1 - kept) * (-score).sigmoid().log()).mean()
    assert_close(out.auxiliary_loss, 0.5 * expected)


@pytest.mark.parametrize("chosen", COMPOSED, ids=str)
def test_accumulated_micro_batches_equal_one_batch(chosen: Case) -> None:
    """Rows with very different numbers of labels: micro-batches add up to the loss of the batch, auxiliaries too."""
    model, wanted = lively(chosen).train(), labels()
    items = (shifted(wanted) != -100).sum()

    def step(parts: list[slice]) -> tuple[list[Tensor], dict[str, Tensor]]:
        model.zero_grad()
        losses = []
        for rows in parts:
            out = model(ids()[rows], labels=wanted[rows], noise=False, num_items_in_batch=items)
            out.loss.backward()
            losses.append(torch.stack((out.loss, out.token_loss, out.auxiliary_loss)).detach())
        return losses, gradients(model)

    whole, expected = step([slice(0, 3)])
    parts, got = step([slice(0, 1), slice(1, 2), slice(2, 3)])
    assert_close(sum(parts), whole[0])
    for name, gradient in expected.items():
        assert_close(got[name], gradient, name)
    plain = model(ids(), labels=wanted, noise=False)
    assert_close(plain.loss, whole[0][0], "without num_items_in_batch, one batch is its own step")


@pytest.mark.parametrize("name", DEPTH)
def test_padding_adds_nothing_to_any_loss(name: str) -> None:
    model, mask = lively(case(entry(name))), torch.ones(3, LENGTH, dtype=torch.long)
    mask[:, 10:] = 0
    wanted = ids().masked_fill(mask == 0, -100)
    padded = model(ids(), attention_mask=mask, labels=wanted, routing="oracle", noise=False)
    alone = model(ids()[:, :10], labels=ids()[:, :10], routing="oracle", noise=False)
    assert_close(padded.token_loss, alone.token_loss)
    assert_close(padded.auxiliary_loss, alone.auxiliary_loss)


def test_logits_to_keep() -> None:
    model = lively(case(entry("early_exit")))
    whole = model(ids()).logits
    assert_close(model(ids(), logits_to_keep=1).logits, whole[:, -1:])
    assert_close(model(ids(), logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])
    with pytest.raises(ValueError, match="logits_to_keep cannot be combined with labels"):
        model(ids(), labels=ids(), logits_to_keep=1)


def test_embedded_input_tuples_and_bad_calls() -> None:
    model = lively(case(entry("mixture_of_depths")))
    expected = model(ids(), labels=ids())
    embedded = model(inputs_embeds=model.model.embed_tokens(ids()), labels=ids())
    assert torch.equal(embedded.loss, expected.loss)
    loss, logits, *_ = model(ids(), labels=ids(), return_dict=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    for wrong in ({}, {"input_ids": ids(), "inputs_embeds": model.model.embed_tokens(ids())}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**wrong)
    with pytest.raises(ValueError, match="unknown executor 'gatherd'; did you mean 'gathered'"):
        model(ids(), executor="gatherd")
