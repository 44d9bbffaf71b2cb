"""Law 11: assisted decoding equals greedy decoding for every assistant and model, and guesses are really used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from laws.builders import VOCAB, Case, case, entry, lively
from laws.test_generation import plain_loop
from skipstone import SkipstoneForCausalLM

NEW = 12
DENSE, MIXED = case(), case(*map(entry, ("mixture_of_depths", "token_selective", "early_exit")), activation="polyglu")
ROUTED = [
    case(entry("mixture_of_depths", decision="predictor")),
    case(entry("mixture_of_depths", decision="random"), activation="polyglu"),
    case(entry("mixture_of_depths", decision="ema_threshold", layers=(0, 1, 2))),
    case(entry("token_selective")),
    case(entry("early_exit"), activation="polyglu"),
    MIXED,
]


def prompt(repeated: bool = False) -> Tensor:
    ids = torch.randint(0, VOCAB, (1, 4), generator=torch.Generator().manual_seed(3))
    return ids.repeat(1, 3) if repeated else ids


@torch.no_grad()
def near(model: SkipstoneForCausalLM, noise: float) -> SkipstoneForCausalLM:
    """Changed a little, so that its guesses are right sometimes."""
    for parameter in model.parameters():
        parameter += noise * parameter.std(correction=0) * torch.randn_like(parameter)
    return model


class Widths:
    """The number of tokens of every forward pass of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[int] = []
        model.model.layers[0].register_forward_pre_hook(lambda module, args: self.seen.append(args[0].shape[1]))


def assisted(model: SkipstoneForCausalLM, tokens: Tensor, **options: object) -> tuple[Tensor, list[int]]:
    widths = Widths(model)
    return model.generate(tokens, max_new_tokens=NEW, do_sample=False, **options), widths.seen


@pytest.mark.parametrize("chosen", ROUTED, ids=str)
def test_a_routed_model_is_helped_by_a_dense_one(chosen: Case) -> None:
    model, helper = lively(chosen), lively(DENSE)
    got, widths = assisted(model, prompt(), assistant_model=helper)
    assert torch.equal(got, plain_loop(lively(chosen), prompt(), NEW))
    assert max(widths[1:]) > 1


@pytest.mark.parametrize("chosen", ROUTED, ids=str)
def test_a_dense_model_is_helped_by_a_routed_one(chosen: Case) -> None:
    got, widths = assisted(lively(DENSE), prompt(), assistant_model=lively(chosen))
    assert torch.equal(got, plain_loop(lively(DENSE), prompt(), NEW))
    assert max(widths[1:]) > 1


@pytest.mark.parametrize("chosen", ROUTED, ids=str)
def test_a_helper_that_is_sometimes_right(chosen: Case) -> None:
    """Some guesses stay and some are cropped away, in the same pass."""
    expected = plain_loop(lively(chosen), prompt(), NEW)
    helper = near(lively(chosen), 0.05)
    got, widths = assisted(lively(chosen), prompt(), assistant_model=helper)
    assert torch.equal(got, expected)
    assert len(widths) < NEW, "no guess was ever right"


@pytest.mark.parametrize("chosen", ROUTED, ids=str)
def test_guesses_from_the_prompt(chosen: Case) -> None:
    tokens = prompt(repeated=True)
    got, widths = assisted(lively(chosen), tokens, prompt_lookup_num_tokens=3)
    assert torch.equal(got, plain_loop(lively(chosen), tokens, NEW))
    assert widths[0] == 12 + 3


@pytest.mark.parametrize("chosen", ROUTED, ids=str)
def test_a_model_is_helped_by_its_own_first_blocks(chosen: Case) -> None:
    got, widths = assisted(lively(chosen), prompt(), assistant_early_exit=2)
    assert torch.equal(got, plain_loop(lively(chosen), prompt(), NEW))
    assert max(widths[1:]) > 1
