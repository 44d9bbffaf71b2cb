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
