"""A GGUF file, written with the format's own package, gives the logits of the checkpoint that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

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
