"""Unsupported checkpoints are refused in one line that names the setting, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from skipstone.model.pretrained import load_pretrained
from skipstone_studies.speed import parity

WEIGHTS = "model.safetensors"
ODD = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def refusal(source: str | Path, kind: type[Exception] = ValueError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_pretrained(source, **options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def describe(folder: Path, case: str, **changes: Any) -> Path:
    """Write a folder with config.json alone: reading weights from it would raise another error."""
    values = {**parity.CASES[case].to_dict(), **changes}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("Llama", {"model_type": "gptj"}, "architecture 'gptj'"),
        ("Llama", {"model_type": "gptj"}, "llama, mistral, ministral, qwen2, qwen3, smollm3, granite, olmo2, olmo3"),
        ("Llama", {"model_type": "gemma3"}, "architecture 'gemma3' is not one of"),
        ("Llama", {"model_type": "not_even_known"}, "architecture 'not_even_known'"),
        ("Llama", {"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts"),
        ("Qwen3", {"model_type": "qwen3_moe", "num_experts": 8}, "mixture of experts"),
        ("Llama", {"model_type": None}, "no model_type"),
        ("Llama", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "architecture 'x'"),
        ("Qwen3", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'chunked_attention'"),
        ("Gemma 3", {"sliding_window": None}, "sliding_window is null, but layer_types has 'sliding_attention'"),
        ("Cohere 2, biases", {"sliding_window": None}, "sliding_window is null, but layer_types has"),
        ("OLMo 3, window, yarn", {"sliding_window": None}, "sliding_window is null, but layer_types has"),
        ("Llama", {"rope_parameters": DYNAMIC}, "rope_type 'dynamic'"),
        ("Nemotron, partial RoPE", {"rope_parameters": ODD}, "head_dim 20 times partial_rotary_factor 0.25 must"),
        ("Llama", {"hidden_act": "laplace"}, "hidden_act 'laplace'"),
        ("GPT-2", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu'"),
        ("GPT-2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("GPT-2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        ("GPT-2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("Llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ("Llama", {"hidden_size": 50}, "50"),
    ],
)  # fmt: skip
def test_a_setting_that_this_decoder_does_not_compute(
    tmp_path: Path, case: str, changes: dict[str, Any], said: str
) -> None:
    assert said in refusal(describe(tmp_path, case, **changes))


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("Mistral", {"sliding_window": 64}),
        ("Qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 16, "layer_types": None, "max_window_layers": 3}),
    ],
)
def test_a_window_that_never_closes_is_full_attention(tmp_path: Path, case: str, changes: dict[str, Any]) -> None:
    parity.save_random(parity.CASES[case], tmp_path)
    ids_BT = torch.randint(2, 97, (1, 60))
    assert parity.logits_error(describe(tmp_path, case, **changes), ids_BT, torch.float32) < 1e-6


def test_neither_a_folder_nor_on_the_hub(tmp_path: Path) -> None:
    for source in (str(tmp_path / "absent"), "no/such-model", "nothing", "a/b/c", "./x", "~/x", "", " "):
        assert repr(source) in refusal(source, FileNotFoundError)


def test_a_file_and_an_empty_folder(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.touch()
    assert "is a file" in refusal(file)
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")


def test_a_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert str(tmp_path) in refusal(tmp_path)


def test_an_unknown_dtype(tmp_path: Path) -> None:
    parity.save_random(parity.CASES["Llama"], tmp_path)
    assert "did you mean 'bfloat16'" in refusal(tmp_path, dtype="bfloat17")


def test_no_weights(tmp_path: Path) -> None:
    assert WEIGHTS in refusal(describe(tmp_path, "Llama"))


def test_broken_weights(tmp_path: Path) -> None:
    describe(tmp_path, "Llama")
    (tmp_path / WEIGHTS).write_bytes(b"not safetensors at all")
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    ("case", "lost"),
    [("Llama", "model.layers.1.self_attn.q_proj.weight"), ("Qwen2", "model.layers.0.self_attn.k_proj.bias"),
     ("Qwen3", "model.layers.2.self_attn.q_norm.weight"), ("Llama", "lm_head.weight"),
     ("GPT-2", "transformer.h.1.ln_2.bias")],
)  # fmt: skip
def test_missing_weights(tmp_path: Path, case: str, lost: str) -> None:
    parity.save_random(parity.CASES[case], tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[lost]
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert f"the checkpoint lacks {lost}" in refusal(tmp_path)


def test_extra_weights(tmp_path: Path) -> None:
    """Qwen2's biases under the name of Llama: transformers itself would drop them with a warning."""
    parity.save_random(parity.CASES["Qwen2"], tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "llama"}), encoding="utf-8")
    message = refusal(tmp_path)
    assert "no place for model.layers.0.self_attn.k_proj.bias and 8 more" in message


def test_weights_of_another_shape(tmp_path: Path) -> None:
    parity.save_random(parity.CASES["Llama"], tmp_path)
    message = refusal(describe(tmp_path, "Llama", intermediate_size=96))
    assert "has shape [48, 80] in the checkpoint and [48, 96] in the model" in message


def test_a_model_without_a_head(tmp_path: Path) -> None:
    AutoModel.from_config(LlamaConfig(**parity.SIZE)).save_pretrained(tmp_path)
    assert "the checkpoint lacks lm_head.weight" in refusal(tmp_path)


def test_tensors_that_every_old_checkpoint_carries_are_no_extra(tmp_path: Path) -> None:
    """Buffers that transformers dropped long ago, and GPT-2 saved without its head's prefix."""
    parity.save_random(parity.CASES["GPT-2"], tmp_path)
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    ids_BT = torch.randint(2, 97, (1, 20))
    assert parity.logits_error(tmp_path, ids_BT, torch.float32) < 1e-6


def test_weights_decide_whether_the_head_is_tied(tmp_path: Path) -> None:
    """A checkpoint with a head of its own that calls itself tied: what transformers makes of it is what we make."""
    parity.save_random(parity.CASES["Llama"], tmp_path)
    describe(tmp_path, "Llama", tie_word_embeddings=True)
    ids_BT = torch.randint(2, 97, (1, 20))
    assert parity.logits_error(tmp_path, ids_BT, torch.float32) < 1e-6
    ours = load_pretrained(tmp_path)
    assert ours.config.tie_word_embeddings == (ours.lm_head.weight is ours.model.embed_tokens.weight)


def test_pickled_and_sharded_weights_load(tmp_path: Path) -> None:
    parity.save_random(parity.CASES["Llama"], tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ids_BT = torch.randint(2, 97, (1, 20))
    assert parity.logits_error(tmp_path / "sharded", ids_BT, torch.float32) < 1e-6
    describe(tmp_path, "Llama")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert parity.logits_error(tmp_path, ids_BT, torch.float32) < 1e-6
