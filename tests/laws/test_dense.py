"""Law 12: without mechanisms, a model has the logits of transformers' own model with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from laws.builders import LENGTH, VOCAB, assert_close, ids
from skipstone import SkipstoneConfig, SkipstoneForCausalLM

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # theirs, ours
    "plain": ({}, {}),
    "one-kv-head": ({"num_key_value_heads": 1}, {"num_key_value_heads": 1}),
    "head-dim": ({"head_dim": 16}, {"head_dim": 16}),
    "biases": (
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    ),
    "gelu": ({"hidden_act": "gelu"}, {"activation": "gelu"}),
    "gelu-tanh": ({"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
    "tied": ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "eps": ({"rms_norm_eps": 1e-3}, {"norm_eps": 1e-3}),
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}},
    ),
    "linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ),
    "llama3": ({"rope_parameters": LLAMA3}, {"rope_parameters": LLAMA3}),
    "yarn": ({"rope_parameters": YARN}, {"rope_parameters": YARN}),
}


def pair(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[LlamaForCausalLM, SkipstoneForCausalLM]:
    torch.manual_seed(2)
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, **theirs})).eval()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model = SkipstoneForCausalLM(SkipstoneConfig(**{**SIZES, **ours})).eval()
    model.load_state_dict(llama.state_dict())  # strict: the names are the same
    return llama, model


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_equal_llama(variant: str) -> None:
    llama, model = pair(*VARIANTS[variant])
    assert llama.state_dict().keys() == model.state_dict().keys()
    expected = llama(ids()).logits
    assert expected.std() > 0.2
    assert_close(model(ids()).logits, expected)
    positions = torch.arange(LENGTH)[None] + 7
    assert_close(model(ids(), position_ids=positions).logits, llama(ids(), position_ids=positions).logits)


@torch.no_grad()
def test_bfloat16_is_bit_for_bit() -> None:
    """The order of additions is transformers' own, (x + a) + m, so that pretrained models lose nothing.

    Their rotary frequencies are fp32, as in both models after loading in bf16. A cast rounds those of transformers.
    """
    llama, model = pair({}, {})
    frequencies = llama.model.rotary_emb.inv_freq.clone()
    llama, model = llama.bfloat16(), model.bfloat16()
    llama.model.rotary_emb.inv_freq = frequencies
    assert torch.equal(model(ids()).logits, llama(ids()).logits)


def test_loss_and_every_gradient_equal_llama() -> None:
    llama, model = pair({}, {})
    losses = [m.train()(ids(), labels=ids()).loss for m in (llama, model)]
    assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), llama.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, name)


@torch.no_grad()
def test_left_padded_generation_equals_llama() -> None:
    llama, model = pair({}, {})
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :4], mask[2, :9] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids(), **options), llama.generate(ids(), **options))


@torch.no_grad()
def test_qk_norm_equals_qwen3() -> None:
    torch.manual_seed(2)
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False)).eval()
    for parameter in qwen.parameters():
        parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    theta = qwen.config.rope_parameters["rope_theta"]
    model = SkipstoneForCausalLM(SkipstoneConfig(**SIZES, qk_norm=True, rope_parameters={"rope_theta": theta})).eval()
    model.load_state_dict(qwen.state_dict())
    assert_close(model(ids()).logits, qwen(ids()).logits)


@torch.no_grad()
def test_hidden_states_equal_llama() -> None:
    llama, model = pair({}, {})
    theirs = llama(ids(), output_hidden_states=True).hidden_states
    ours = model(ids(), output_hidden_states=True).hidden_states
    assert len(theirs) == len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
