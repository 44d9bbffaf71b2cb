"""Presets have the sizes that are published."""

from __future__ import annotations

import pytest
import torch

from skipstone import SkipstoneForCausalLM, presets

# Total, and of it the mechanisms. GPT-2, Llama and Qwen3: the published checkpoints. TSA: its released code. PolyGLU:
# its released weights.
PARAMETERS = {
    "tiny": (229_952, 0),
    "gpt2": (124_439_808, 0),
    "llama-3.2-1b": (1_235_814_400, 0),
    "qwen3-0.6b": (596_049_920, 0),
    "mod-220m": (216_648_710, 1_582_086),
    "tsa-shakespeare": (4_782_336 + 5 * 16_513, 5 * 16_513),
    "tsa-enwik8": (6_433_413, 5 * 16_513),
    "tsa-copy": (1_219_909, 5 * 4_161),
    "polychromatic-0.6b": (597_153_888, 1_380_960),
}


pytestmark = pytest.mark.filterwarnings("ignore:context 'sequence' of polyglu is not causal")


def build(name: str) -> SkipstoneForCausalLM:
    with torch.device("meta"):
        return SkipstoneForCausalLM(presets.get(name))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name: str) -> None:
    model = build(name)
    ours = sum(p.numel() for mechanism in model.routing_modules() for p in mechanism.parameters())
    assert (model.num_parameters(), ours) == PARAMETERS[name]


def test_every_preset_is_counted() -> None:
    assert set(PARAMETERS) <= set(presets.names())
    for name in presets.names():
        assert build(name).config.to_dict() == presets.get(name).to_dict()


def test_overrides() -> None:
    config = presets.get("polychromatic-0.6b", activation={"name": "polyglu"}, num_hidden_layers=2)
    assert config.activation == {"name": "polyglu"}
    assert config.num_hidden_layers == 2
    assert presets.get("polychromatic-0.6b").activation["context"] == "sequence"


def test_a_config_is_the_callers_own() -> None:
    presets.get("mod-220m").mechanisms[0].plain()["capacity"] = 0.9
    presets.get("llama-3.2-1b").rope_parameters["factor"] = 1.0
    assert presets.get("mod-220m").mechanisms[0]["capacity"] == 0.125
    assert presets.get("llama-3.2-1b").rope_parameters["factor"] == 32.0


def test_unknown_names_and_keys() -> None:
    with pytest.raises(ValueError, match="unknown preset 'tinny'; did you mean 'tiny'"):
        presets.get("tinny")
    with pytest.raises(ValueError, match="unknown key in model 'hiden_size'; did you mean 'hidden_size'"):
        presets.get("tiny", hiden_size=3)
    with pytest.raises(ValueError, match="unknown linear_init 'tourch'; did you mean 'torch'"):
        presets.get("tiny", linear_init="tourch")
    with pytest.raises(ValueError, match="unknown auxiliary_loss_over 'labeled'; did you mean 'labelled'"):
        presets.get("tiny", auxiliary_loss_over="labeled")
    with pytest.raises(ValueError, match="head_dim must be even") as caught:
        presets.get("tiny", hidden_size=36)
    assert "\n" not in str(caught.value)


def test_the_tsa_base_drops_out_what_the_paper_does() -> None:
    block = SkipstoneForCausalLM(presets.get("tsa-copy")).model.layers[0]
    assert (block.mlp.dropout, block.mlp.hidden_dropout, block.self_attn.dropout) == (0.1, 0.1, 0.1)
    assert block.self_attn.residual_dropout == 0
    assert not block.routing_modules()
