"""What is measured of nothing is refused in one line, and a pass that is missing has a reason."""

from __future__ import annotations

import pytest
import torch

from skipstone.measure.flops import flop_check
from skipstone.measure.losses import Accuracy, measure_loss
from skipstone.measure.passes import NOTHING_TO_FORCE, PASSES, passes_of
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig


def dense() -> SkipstoneForCausalLM:
    sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SkipstoneForCausalLM(SkipstoneConfig(**sizes)).eval()


def test_accuracy_without_batches() -> None:
    with pytest.raises(ValueError, match="no batch has been added"):
        Accuracy().by_bin()


@pytest.mark.parametrize("rows", [0, 2])
def test_a_loss_without_labels(rows: int) -> None:
    ids = torch.ones(2, 5, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    with pytest.raises(ValueError, match="there is nothing to predict"):
        measure_loss(dense(), PASSES["causal"], [batch] * rows)


def test_flops_of_no_tokens() -> None:
    with pytest.raises(ValueError, match="no token in the batches"):
        flop_check(dense(), PASSES["causal"], [])


def test_a_dense_model_has_no_decision_to_force() -> None:
    passes, why = passes_of(dense(), "reset-s3")
    assert ({*passes}, why) == ({"oracle", "causal", "executed"}, {"forced": NOTHING_TO_FORCE})
    assert passes_of(dense(), "tiny-shakespeare")[1] == {}


def test_the_cost_of_blocks_that_do_not_exist() -> None:
    for options in ({"kept": {1: {"mod": 2}}}, {"stored": {-1: 5}}):
        with pytest.raises(ValueError, match=r"names block -?1, but the model has blocks 0 to 0"):
            dense().cost(tokens=4, **options)
