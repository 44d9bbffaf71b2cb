"""Saved models load unchanged, and no missing weight is initialised at random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.model.pretrained import load_model, load_pretrained

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied, LayerNorm": {"tie_word_embeddings": True, "norm": "layernorm", "positions": "learned", "mlp": "plain"},
    "MoD": {"mechanisms": [{"name": "mixture_of_depths", "capacity": 0.5, "decision": "ema_threshold"}]},
    "TSA on the MLP": {"mechanisms": [{"name": "token_selective", "on": "mlp"}]},
    "early exit, PolyGLU": {"mechanisms": [{"name": "early_exit"}], "activation": {"name": "polyglu"}},
}


def build(name: str) -> SkipstoneForCausalLM:
    """Every tensor drawn, buffers such as thresholds too, so that a value which is not restored shows."""
    model = tiny_model(None, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64, **MODELS[name])
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 0.5)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build("MoD").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set or, with None, remove tensors."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")


def refusal(folder: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        load_model(folder)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("load", [load_model, load_pretrained])
def test_round_trip(tmp_path: Path, name: str, load: Any) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids_BT = torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        assert torch.equal(model(ids_BT).logits, again(ids_BT).logits)


def test_dtype_keeps_routers_in_fp32(saved: Path) -> None:
    model = load_model(saved, "bfloat16")
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
    assert kinds["model.layers.1.mechanisms.mixture_of_depths.router.weight"] == torch.float32


def test_missing_router(saved: Path) -> None:
    edit_weights(saved, **{"model.layers.1.mechanisms.mixture_of_depths.router.weight": None})
    assert "lacks model.layers.1.mechanisms.mixture_of_depths.router.weight" in refusal(saved)


def test_missing_buffer(saved: Path) -> None:
    edit_weights(saved, **{"model.layers.1.mechanisms.mixture_of_depths.decision.threshold": None})
    assert "lacks model.layers.1.mechanisms.mixture_of_depths.decision.threshold" in refusal(saved)


def test_a_mechanism_that_the_weights_do_not_have(saved: Path) -> None:
    edit_config(saved, mechanisms=[{"name": "mixture_of_depths", "layers": ":", "decision": "ema_threshold"}])
    assert "lacks model.layers.0.mechanisms" in refusal(saved)


def test_a_mechanism_that_the_config_does_not_have(saved: Path) -> None:
    edit_config(saved, mechanisms=[])
    assert "no place for model.layers.1.mechanisms" in refusal(saved)


def test_weights_of_another_shape(saved: Path) -> None:
    edit_weights(saved, **{"model.norm.weight": torch.ones(16)})
    assert "model.norm.weight has shape [16] in the checkpoint and [32] in the model" in refusal(saved)


def test_another_format_version(saved: Path) -> None:
    edit_config(saved, format_version=99)
    assert "format_version 99" in refusal(saved)


def test_unknown_mechanism(saved: Path) -> None:
    edit_config(saved, mechanisms=[{"name": "mixture_of_depth"}])
    assert "did you mean 'mixture_of_depths'" in refusal(saved)


def test_another_architecture(tmp_path: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    assert "'llama'; `skipstone convert`" in refusal(tmp_path)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent", FileNotFoundError)
    assert "no config.json" in refusal(tmp_path)


def test_no_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    assert "model.safetensors" in refusal(saved)
