"""What generation is given is used or refused in one line, never replaced silently."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import skipstone
from models import tiny_model
from skipstone.generate import ends_of, generate

IDS = torch.arange(3, 15).view(2, 6)


@pytest.fixture(scope="module")
def model() -> skipstone.SkipstoneForCausalLM:
    return tiny_model(vocab_size=40, hidden_size=16, num_hidden_layers=1)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": IDS.tolist()}, "input_ids must be a tensor of shape .*, got list"),
    ({"seed": 2**64}, r"seed must be a number of 64 bits, .*, got 18446744073709551616"),
    ({"input_ids": IDS[0]}, r"input_ids must be whole numbers of shape .*, got torch.int64 \[6\]"),
    ({"input_ids": IDS.float()}, "input_ids must be whole numbers .*, got torch.float32"),
    ({"attention_mask": torch.full_like(IDS, 2)}, "attention_mask must hold 1 for tokens and 0 for padding"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, got 2.5"),
    ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
    ({"temperature": 1.0, "top_k": 2.5}, "top_k must be a whole number, got 2.5"),
    ({"pad_token_id": -5}, r"pad_token_id must be in \[0, 40\), got -5"),
    ({"pad_token_id": 40}, r"pad_token_id must be in \[0, 40\), got 40"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list of them, got '</s>'"),
    ({"eos_token_id": [[1]]}, r"eos_token_id must be a token id or a list of them, got \[\[1\]\]"),
]


@pytest.mark.parametrize(("given", "why"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_one_line(model: skipstone.SkipstoneForCausalLM, given: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        generate(model, **{"input_ids": IDS, "max_new_tokens": 2, **given})


@pytest.mark.parametrize("ends", [7, [7, 9], torch.tensor([7, 9]), torch.tensor(7)], ids=str)
def test_ends_in_any_form(model: skipstone.SkipstoneForCausalLM, ends: Any) -> None:
    assert ends_of(model, ends) in ([7], [7, 9])


def test_a_temperature_that_fp32_does_not_know_is_nearly_greedy(model: skipstone.SkipstoneForCausalLM) -> None:
    """1e-300 became 0 in fp32, and probabilities no numbers."""
    greedy = generate(model, IDS, max_new_tokens=4)
    assert torch.equal(generate(model, IDS, max_new_tokens=4, temperature=1e-300, seed=0), greedy)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_finite(model: skipstone.SkipstoneForCausalLM, temperature: float) -> None:
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(broken, IDS, max_new_tokens=2, temperature=temperature)
