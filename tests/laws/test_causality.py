"""Law 2: with causal routing no logit depends on a later slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws.builders import CAUSAL, FORMS, LENGTH, NESTED, ORDERS, VOCAB, Case, assert_close, case, ids, lively
from skipstone import SkipstoneForCausalLM
from skipstone.mechanisms.polyglu import PolyGLUConfig

CUTS = (4, 9, LENGTH - 1)
SOME = [c for c in ORDERS + NESTED if c.mechanisms]


def changed_after(cut: int) -> Tensor:
    other = ids().clone()
    other[:, cut:] = (other[:, cut:] + 1 + torch.arange(LENGTH - cut)) % VOCAB
    return other


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("chosen", CAUSAL, ids=str)
@torch.no_grad()
def test_logits_do_not_see_later_tokens(chosen: Case, training: bool) -> None:
    model = lively(chosen).train(training)
    before = model(ids(), routing="causal").logits
    for cut in CUTS:
        after = model(changed_after(cut), routing="causal").logits
        assert_close(after[:, :cut], before[:, :cut], f"changed from {cut}")
        assert (after[:, cut:] - before[:, cut:]).abs().max() > 0.01


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_later_padding_and_documents_change_nothing(chosen: Case) -> None:
    model = lively(chosen)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :5], mask[2, 12:] = 0, 0
    documents = torch.tensor([[0] * 6 + [1] * 9, [0] * 9 + [1] * 6, [0] * 15])
    later = documents.clone()
    later[:, 11:] = 7
    for cut in (9, 11):
        first, second = (model(x, attention_mask=mask).logits for x in (ids(), changed_after(cut)))
        real = mask[:, :cut].bool()
        assert_close(second[:, :cut][real], first[:, :cut][real], f"padded, changed from {cut}")
        first = model(ids(), document_ids=documents).logits
        second = model(changed_after(cut), document_ids=documents if cut == 9 else later).logits
        assert_close(second[:, :cut], first[:, :cut], f"packed, changed from {cut}")


@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_no_gradient_from_an_earlier_logit_to_a_later_token(chosen: Case) -> None:
    model = lively(chosen).train()
    embedded = model.model.embed_tokens(ids()).detach().requires_grad_()
    at = 8
    model(inputs_embeds=embedded, routing="causal").logits[:, at].square().sum().backward()
    assert embedded.grad[:, at + 1 :].abs().max() == 0
    assert embedded.grad[:, : at + 1].abs().max() > 0


@torch.no_grad()
def test_oracle_routing_does_see_later_tokens() -> None:
    """The counter-check: the law can fail."""
    for chosen in (c for c in CAUSAL if c.name in ("mixture_of_depths/silu", "mixture_of_depths-threshold-raw/silu")):
        model = lively(chosen)
        gaps = [
            model(changed_after(cut), routing="oracle").logits[:, :cut] - model(ids(), routing="oracle").logits[:, :cut]
            for cut in CUTS
        ]
        assert max(gap.abs().max() for gap in gaps) > 0.01


def seeded(model: SkipstoneForCausalLM, tokens: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return model(tokens).logits[:, :9]


@pytest.mark.parametrize("chosen", [case(activation=n) for n in ("polyglu", *FORMS) if "polyglu" in n], ids=str)
@torch.no_grad()
def test_activations_do_not_see_later_tokens_in_training_either(chosen: Case) -> None:
    """With its noise, which is drawn for rows and does not depend on tokens."""
    model = lively(chosen).train()
    before = seeded(model, ids(), 1)
    assert_close(seeded(model, changed_after(9), 1), before)
    assert (seeded(model, ids(), 2) - before).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:context 'sequence' of polyglu is not causal")
@torch.no_grad()
def test_the_published_context_does_see_later_tokens() -> None:
    """The counter-check."""
    model = lively(case(activation="polyglu")).train()
    for block in model.model.layers:
        block.mlp.activation.config = PolyGLUConfig(context="sequence")
    assert (seeded(model, changed_after(9), 1) - seeded(model, ids(), 1)).abs().max() > 0.01
