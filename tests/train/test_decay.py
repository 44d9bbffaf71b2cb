"""The parameters that weight decay leaves out."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.train import decay
from skipstone.train.recipe import DECAY_KINDS, TrainConfig
from train.tool import DENSE, MODELS

WITH_BIASES = {**DENSE, "norm": "layernorm", "positions": "learned", "mlp_bias": True, "attention_bias": True}


def names(model: dict[str, Any]) -> list[str]:
    return [name for name, _ in built(model).named_parameters()]


def built(model: dict[str, Any]) -> SkipstoneForCausalLM:
    return SkipstoneForCausalLM(SkipstoneConfig(**model, vocab_size=11))


def decaying(model: dict[str, Any], spared: list[str] | None) -> list[str]:
    return decay.decaying(built(model), names(model), spared)


@pytest.mark.parametrize("model", [*MODELS.values(), {**WITH_BIASES, "qk_norm": True}])
def test_usually_what_a_stock_trainer_spares(model: dict[str, Any], tmp_path: Any) -> None:
    stock = Trainer(
        model=built(model), args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    )
    assert set(decaying(model, None)) == set(stock.get_decay_parameter_names(built(model)))


@pytest.mark.parametrize(
    ("spared", "free", "decays"),
    [
        ([], [], ["model.norm.weight", "model.layers.0.mlp.activation.preference_bias"]),
        (["preferences"], ["model.layers.1.mlp.activation.preference_bias"], ["model.norm.weight"]),
        (["embeddings"], ["model.embed_tokens.weight"], ["lm_head.weight", "model.layers.0.mlp.activation.scale"]),
        (
            ["routers"],
            [
                "model.layers.0.mlp.activation.scale",
                "model.layers.0.mlp.activation.mix_weight",
                "model.layers.0.mechanisms.mixture_of_depths.router.weight",
            ],
            ["model.layers.0.mlp.activation.mix_bias", "model.layers.0.mlp.gate_proj.weight"],
        ),
    ],
)
def test_each_kind(spared: list[str], free: list[str], decays: list[str]) -> None:
    given = names(MODELS["all"])
    found = set(decaying(MODELS["all"], spared))
    assert {*free, *decays} <= set(given)
    assert not found & set(free)
    assert found >= set(decays)


def test_everything_is_of_a_kind_that_can_be_named() -> None:
    """What no kind spares are matrices of attention, MLP and head."""
    for model in (*MODELS.values(), WITH_BIASES):
        always = decaying(model, list(DECAY_KINDS))
        assert all(name.endswith("_proj.weight") or "_proj" in name or name == "lm_head.weight" for name in always)
    assert "model.layers.0.mlp.router.weight" not in decaying(MODELS["experts"], ["routers"])


def test_a_mistyped_kind_is_named() -> None:
    with pytest.raises(ValueError, match="unknown no_decay 'norm'; did you mean 'norms'"):
        TrainConfig(no_decay=["norm"])
