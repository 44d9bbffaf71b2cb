"""Blocks that were removed, copied or exchanged after the model was built keep their own angles and windows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ecosystem.tool import TOOLS_OWN_WARNINGS
from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.model.pretrained import load_model

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "initializer_range": 0.5}
TYPES = [("row", None), ("none", None), ("window", 3), ("row", None)]  # angles and window of each block
IDS = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))


def built(types: list[tuple[str, int | None]], **options: Any) -> SkipstoneForCausalLM:
    windows = [i for i, (_, window) in enumerate(types) if window]
    return tiny_model(
        **SIZES,
        num_hidden_layers=len(types),
        rope_layers=[i for i, (angles, _) in enumerate(types) if angles != "none"],
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        **({"attention_window": 3, "window_layers": windows} if windows else {}),
        **({"window_rope_parameters": {"rope_type": "default", "rope_theta": 7.0}} if windows else {}),
        **options,
    )


def rearranged(model: SkipstoneForCausalLM, order: list[int]) -> SkipstoneForCausalLM:
    """The model with these of its blocks, numbered anew, as tools that cut or stack models do."""
    model.model.layers = nn.ModuleList([copy.deepcopy(model.model.layers[i]) for i in order])  # type: ignore[assignment]
    for i, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(order)
    return model


@pytest.mark.parametrize("order", [[1, 2, 3], [0, 2], [2, 3, 1, 0], [0, 1, 2, 3, 2, 3], [1]], ids=str)
@torch.no_grad()
def test_blocks_keep_their_angles_and_windows(order: list[int]) -> None:
    model = built(TYPES)
    right = built([TYPES[i] for i in order])
    tensors = model.state_dict()
    moved = {name.replace(".layers.0.", f".layers.{new}."): tensors[name.replace(".layers.0.", f".layers.{old}.")]
             for new, old in enumerate(order) for name in tensors if ".layers.0." in name}  # fmt: skip
    right.load_state_dict({**{name: x for name, x in tensors.items() if ".layers." not in name}, **moved})
    changed = rearranged(model, order)
    assert not torch.equal(built(TYPES)(IDS).logits, right(IDS).logits)
    torch.testing.assert_close(changed(IDS).logits, right(IDS).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for rows in (IDS, IDS[:1]):
        assert changed.generate(rows, **options).tolist() == right.generate(rows, **options).tolist()


@pytest.mark.filterwarnings(TOOLS_OWN_WARNINGS)
@pytest.mark.parametrize("spans", [[[0, 3], [1, 4]], [[0, 2], [0, 2], [3, 4]]], ids=str)
def test_blocks_replicated_by_peft(spans: list[list[int]]) -> None:
    peft = pytest.importorskip("peft")
    order = [i for start, end in spans for i in range(start, end)]
    right = rearranged(built(TYPES), order)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], layer_replication=spans)
    adapted = peft.get_peft_model(built(TYPES), lora).eval()
    torch.testing.assert_close(adapted(input_ids=IDS).logits, right(IDS).logits)


def saved(model: SkipstoneForCausalLM, folder: Path) -> SkipstoneForCausalLM:
    model.save_pretrained(folder)
    return load_model(folder).eval()


@pytest.mark.parametrize("order", [[1, 2, 3], [0, 2], [2, 3, 1, 0], [0, 1, 2, 3, 2, 3], [1], [0, 3]], ids=str)
@torch.no_grad()
def test_a_saved_model_of_moved_blocks_computes_the_same(order: list[int], tmp_path: Path) -> None:
    for name, options in {
        "dense": {},
        "all": {"mechanisms": [{"name": "mixture_of_depths", "capacity": 0.5, "layers": "::1"}]},
    }.items():
        model = rearranged(built(TYPES, **options), order).eval()
        torch.testing.assert_close(saved(model, tmp_path / name)(IDS).logits, model(IDS).logits)
    assert [i in model.config.windowed_layers() for i in range(len(order))] == [i == 2 for i in order]


@torch.no_grad()
def test_mechanisms_of_moved_blocks_are_named(tmp_path: Path) -> None:
    for entry in ({"name": "mixture_of_depths", "capacity": 0.5}, {"name": "layer_dropout", "on": "mlp"}):
        model = rearranged(built(TYPES, mechanisms=[{**entry, "layers": "1::2"}]), [0, 1, 3]).eval()
        with pytest.raises(ValueError, match=r"block 2 has the mechanisms \['.*'\], but .* gives it \[\]; blocks were"):
            model.save_pretrained(tmp_path / "no")
        assert not (tmp_path / "no").exists()
        model.config.mechanisms = [{**entry, "layers": [1, 2]}]
        torch.testing.assert_close(saved(model, tmp_path / entry["name"])(IDS).logits, model(IDS).logits)


def test_blocks_that_nobody_counted_are_one_line(tmp_path: Path) -> None:
    model = built(TYPES)
    del model.model.layers[1]
    with pytest.raises(ValueError, match="has 3 blocks, but num_hidden_layers of its configuration is 4"):
        model.save_pretrained(tmp_path / "no")
