"""A GGUF file gives the model that it was written from; what cannot be read of it is refused by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

from skipstone.model.pretrained import convert, load_pretrained, load_tokenizer
from skipstone_studies.speed import parity

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
IDS = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(0))
SIZE = {**parity.SIZE, "num_hidden_layers": 2, "pad_token_id": 0}
PLAIN: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
ROPES: dict[str, Any] = {
    "linear": {**PLAIN, "rope_type": "linear", "factor": 2.0},
    "yarn": {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": parity.LLAMA3,
    "longrope": {
        **parity.LONGROPE,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.1, 1.2],
        "long_factor": [2.0] * 3,
    },
}
Change = Callable[[Any], Any]


def factors(rope: dict[str, Any], size: int) -> Tensor:
    """What llama.cpp divides the frequencies of Llama 3's RoPE by."""
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2) / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def describe(writer: Any, config: PreTrainedConfig, tokenizer: bool = True) -> None:
    """The header as llama.cpp's converter writes it."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(getattr(config, "norm_epsilon", 1e-5))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(size * rope.get("partial_rotary_factor", 1)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", factors(rope, size).numpy())
    if rope["rope_type"] == "longrope":
        for name in ("short", "long"):
            writer.add_tensor(f"rope_factors_{name}.weight", torch.tensor(rope[f"{name}_factor"]).numpy())
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"w{i}" for i in range(config.vocab_size)])
        writer.add_token_merges([])
        writer.add_token_types([1] * config.vocab_size)
        writer.add_token_scores([0.0] * config.vocab_size)
        writer.add_pad_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(1)


def write(path: Path, name: str, config: PreTrainedConfig, change: Change | None = None, tokenizer: bool = True) -> Any:
    """Write random weights as a GGUF file of architecture `name`; return transformers' model with the same weights."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    known = {word: architecture for architecture, word in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[name], config.num_hidden_layers)
    writer = gguf.GGUFWriter(str(path), name)
    describe(writer, config, tokenizer)
    if change is not None:
        change(writer)
    for key, parameter in model.named_parameters():
        parameter.data.normal_(1.0 if "norm" in key else 0.0, 0.2)
        tensor = parameter.data
        if name == "llama" and key.split(".")[-2] in ("q_proj", "k_proj"):  # GGUF's Llama pairs neighbours for RoPE
            pairs = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        if name == "gemma3" and "norm" in key:
            tensor = tensor + 1
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def gemma3(**options: Any) -> PreTrainedConfig:
    types = ["sliding_attention", "full_attention"]
    ropes = {"sliding_attention": PLAIN, "full_attention": {**ROPES["linear"], "rope_theta": 5e4}}
    sizes = {**SIZE, "head_dim": 16, "query_pre_attn_scalar": 256, "sliding_window": 6, "tie_word_embeddings": True}
    return Gemma3TextConfig(**sizes, layer_types=types, rope_parameters=ropes, **options)


WHOLE: dict[str, tuple[str, PreTrainedConfig, Change | None]] = {
    "Llama": ("llama", LlamaConfig(**SIZE), None),
    "Llama, linear RoPE": ("llama", LlamaConfig(**SIZE, rope_parameters=ROPES["linear"]), None),
    "Llama, yarn": ("llama", LlamaConfig(**SIZE, rope_parameters=ROPES["yarn"]), None),
    "Llama 3": ("llama", LlamaConfig(**SIZE, rope_parameters=ROPES["llama3"]), None),
    "Llama, another head size": ("llama", LlamaConfig(**SIZE, head_dim=20), None),
    "Qwen2, yarn": ("qwen2", Qwen2Config(**SIZE, rope_parameters=ROPES["yarn"]), None),
    "Qwen3, another head size": ("qwen3", Qwen3Config(**SIZE, head_dim=16), None),
    "StarCoder2": ("starcoder2", Starcoder2Config(**SIZE, rope_parameters={**PLAIN, "rope_theta": 5e4}), None),
    "Phi-3, a part of each head, a window": (
        "phi3", Phi3Config(**SIZE, sliding_window=6, rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}), None),
    "Phi-3, longrope": (
        "phi3", Phi3Config(**SIZE, original_max_position_embeddings=16, rope_parameters=ROPES["longrope"]), None),
    "Gemma 3, linear RoPE, pattern": ("gemma3", gemma3(), lambda w: w.add_sliding_window_pattern([True, False])),
    "Gemma 3, a cap": ("gemma3", gemma3(final_logit_softcapping=4.0), lambda w: w.add_sliding_window_pattern(2)),
}  # fmt: skip
REFUSED: dict[str, tuple[Change, str]] = {
    "bias": (
        lambda writer: writer.add_tensor("blk.0.attn_q.bias", torch.ones(48).numpy()),
        "place for blk.0.attn_q.bias",
    ),
    "more blocks": (
        lambda writer: writer.add_tensor("blk.2.attn_q.weight", torch.ones(48, 48).numpy()),
        "blk.2.attn_q",
    ),
    "window": (
        lambda writer: writer.add_sliding_window(4),
        "llama.attention.sliding_window is 4, which is not supported",
    ),
    "cap": (lambda writer: writer.add_final_logit_softcapping(3.0), r"llama.final_logit_softcapping is 3\.0, which"),
    "scale": (lambda writer: writer.add_logit_scale(2.0), r"llama.logit_scale is 2\.0, which is not supported"),
    "experts": (lambda writer: writer.add_expert_count(8), "llama.expert_count is 8: a mixture of experts"),
    "part": (lambda w: (w.add_uint16("split.no", 1), w.add_uint16("split.count", 3)), "is part 2 of 3; join them"),
    "factors": (lambda w: w.add_tensor("rope_freqs.weight", torch.ones(4).numpy()), "must have 6 factors, got 4"),
    "unknown": (lambda writer: writer.add_uint32("llama.something.new", 7), "llama.something.new is 7, which is not"),
}


@pytest.mark.parametrize("case", WHOLE)
@torch.no_grad()
def test_a_file_gives_the_model_that_it_was_written_from(case: str, tmp_path: Path) -> None:
    name, config, change = WHOLE[case]
    expected = write(tmp_path / "a.gguf", name, config, change)(IDS).logits
    found = load_pretrained(tmp_path / "a.gguf", "float32")(IDS).logits
    assert parity.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_reader_leaves_out_is_refused(what: str, tmp_path: Path) -> None:
    change, why = REFUSED[what]
    write(tmp_path / "a.gguf", "llama", LlamaConfig(**SIZE), change)
    with pytest.raises(ValueError, match=why) as told:
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert "\n" not in str(told.value)
    assert str(tmp_path / "a.gguf") in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda value: b"",
    "half": lambda value: value[: len(value) // 2],
    "a header": lambda value: value[:100],
    "another magic": lambda value: b"GGML" + value[4:],
    "another version": lambda value: value[:4] + b"\x63" + value[5:],
    "big-endian": lambda value: value[:4] + b"\0\0\0\3" + value[8:],
    "many tensors": lambda value: value[:8] + b"\xff" * 8 + value[16:],
    "another architecture": lambda value: value.replace(b"llama", b"bertx"),
    "a pointer": lambda value: b"version https://git-lfs.github.com/spec/v1\n",
}


def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path) -> None:
    write(tmp_path / "whole", "llama", LlamaConfig(**SIZE))
    for what, spoil in DAMAGE.items():
        (tmp_path / "a.gguf").write_bytes(spoil((tmp_path / "whole").read_bytes()))
        with pytest.raises(ValueError, match=r"a\.gguf") as told:
            convert(tmp_path / "a.gguf", tmp_path / "out")
        assert "\n" not in str(told.value), what
        assert not (tmp_path / "out").exists(), what
    (tmp_path / "b.GGUF").write_bytes((tmp_path / "whole").read_bytes())
    with pytest.raises(ValueError, match=r"b\.GGUF' must end in \.gguf, .*; rename it"):
        convert(tmp_path / "b.GGUF", tmp_path / "out")


def test_files_beside_a_gguf_file_do_not_count_but_an_adapter_does(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", "llama", LlamaConfig(**SIZE), tokenizer=False)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "generation_config.json").write_text("{")
    (tmp_path / "other.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert load_pretrained(tmp_path / "a.gguf").config.family == "llama"
    assert load_tokenizer(tmp_path / "a.gguf") is None  # the file has none
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    with pytest.raises(ValueError, match=r"holds a\.gguf and an adapter \(adapter_config\.json\); move one of them"):
        load_pretrained(tmp_path / "a.gguf")
