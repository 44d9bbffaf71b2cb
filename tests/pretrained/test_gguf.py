"""A GGUF file, written with the format's own package, gives the logits of the checkpoint that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from skipstone.model.pretrained import convert, load_model, load_pretrained
from skipstone_studies.speed import parity

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """GGUF's Llama pairs neighbouring rows of a head for RoPE, not its halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(writer: Any, tensors: dict[str, Tensor]) -> None:
    size = parity.SIZE
    writer.add_context_length(size["max_position_embeddings"])
    writer.add_embedding_length(size["hidden_size"])
    writer.add_block_count(size["num_hidden_layers"])
    writer.add_feed_forward_length(size["intermediate_size"])
    writer.add_head_count(size["num_attention_heads"])
    writer.add_head_count_kv(size["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(size["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"w{i}" for i in range(size["vocab_size"])])
    writer.add_token_scores([0.0] * size["vocab_size"])
    writer.add_token_types([1] * size["vocab_size"])
    for key, weight in tensors.items():
        name = key
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        heads = {"attn_q": size["num_attention_heads"], "attn_k": size["num_key_value_heads"]}.get(name.split(".")[-2])
        writer.add_tensor(name, (weight if heads is None else interleaved(weight, heads)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    parity.save_random(parity.CASES["Llama"], tmp_path / "reference")
    write_gguf(gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama"), load_file(tmp_path / "reference/model.safetensors"))
    ids_BT = torch.randint(2, 97, (2, 30))
    convert(tmp_path / "a.gguf", tmp_path / "out")
    by_name = load_pretrained(tmp_path, gguf_file="a.gguf")
    with torch.no_grad():
        expected = parity.theirs(tmp_path / "reference")(ids_BT).logits
        for model in (by_name, load_model(tmp_path / "out")):
            assert parity.relative_error(model(ids_BT).logits, expected) < 1e-6
    assert "Converted from `a.gguf`." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"gguf|GGUF") as caught:
        load_pretrained(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"a.gguf' needs a package: pip install 'skipstone\[gguf\]'"):
        load_pretrained(tmp_path / "a.gguf")


GEMMA = {"head_dim": 16, "sliding_window": 6, "tie_word_embeddings": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {  # in GGUF's words: what a small model of transformers' class differs in
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # the reader takes no other
    "phi3": {"pad_token_id": 0},
    "starcoder2": {},
    "gemma2": {"pad_token_id": 0, **GEMMA},
    "gemma3": {"pad_token_id": 0, **GEMMA},
}


def describe(writer: Any, name: str) -> None:
    """The header that transformers reads, and a vocabulary."""
    size = parity.SIZE
    writer.add_context_length(size["max_position_embeddings"])
    writer.add_embedding_length(size["hidden_size"])
    writer.add_block_count(size["num_hidden_layers"])
    writer.add_feed_forward_length(size["intermediate_size"])
    writer.add_head_count(size["num_attention_heads"])
    writer.add_head_count_kv(size["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(size["vocab_size"])
    if name.startswith("gemma"):
        writer.add_key_length(16)
        writer.add_sliding_window(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(size["vocab_size"])])
    writer.add_token_merges([])
    writer.add_token_types([1] * size["vocab_size"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_that_both_know(name: str, tmp_path: Path) -> None:
    """Random tensors under GGUF's names, read by transformers and here; what they stand for is the reader's affair."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    kind = {"gemma3": "gemma3_text"}.get(name, name)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**parity.SIZE, **ARCHITECTURES[name]}))
    known = {word: arch for arch, word in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[name], parity.SIZE["num_hidden_layers"])
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), name)
    describe(writer, name)
    torch.manual_seed(0)
    for key, tensor in model.named_parameters():
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert found is not None, key
        around = 1.0 if "norm" in key else 0.0
        writer.add_tensor(found, torch.normal(around, 0.2, tensor.shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ids_BT = torch.randint(2, 97, (2, 30))
    with torch.no_grad():
        expected = parity.theirs(tmp_path / "a.gguf")(ids_BT).logits
        assert parity.relative_error(load_pretrained(tmp_path / "a.gguf")(ids_BT).logits, expected) < 1e-5
