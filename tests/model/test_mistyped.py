"""An argument of forward whose name is close to one of ours is refused."""

from __future__ import annotations

import pytest
import torch

from skipstone import SkipstoneForCausalLM, presets


def test_a_mistyped_argument_is_named() -> None:
    model = SkipstoneForCausalLM(presets.get("tiny"))
    ids = torch.zeros(1, 4, dtype=torch.long)
    for call in (model, model.model):
        with pytest.raises(ValueError, match="unknown argument 'rooting'; did you mean 'routing'"):
            call(ids, rooting="causal")
    model(ids, output_attentions=False, seq_idx=None)  # what transformers may pass along


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("atention_mask", "attention_mask"),
        ("label", "labels"),
        ("position_id", "position_ids"),
        ("use_cach", "use_cache"),
    ],
)
def test_a_mistyped_argument_of_transformers_is_named(typed: str, meant: str) -> None:
    model = SkipstoneForCausalLM(presets.get("tiny"))
    with pytest.raises(ValueError, match=f"unknown argument '{typed}'; did you mean '{meant}'"):
        model(torch.zeros(1, 4, dtype=torch.long), **{typed: torch.ones(1, 4, dtype=torch.long)})


def test_other_arguments_of_transformers_pass() -> None:
    names = ("num_logits_to_keep", "cache_position", "token_type_ids", "head_mask", "is_causal", "cu_seq_lens_q")
    ids = torch.zeros(1, 4, dtype=torch.long)
    model = SkipstoneForCausalLM(presets.get("tiny"))
    for names_given in (names, ("num_items_in_batch", "return_dict", "output_hidden_states")):
        model(ids, labels=ids, **dict.fromkeys(names_given))
