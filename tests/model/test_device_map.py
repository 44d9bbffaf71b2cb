"""A model with blocks on several devices: accelerate moves a block's arguments, tokens included."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from skipstone import SkipstoneForCausalLM, presets
from skipstone.core.selection import Padded
from skipstone.core.tokens import PassMode, Tokens


@pytest.mark.filterwarnings("ignore::UserWarning")  # accelerate's remarks on offloading
def test_blocks_on_disk_compute_the_same(tmp_path: Path) -> None:
    mechanisms = [{"name": "mixture_of_depths", "capacity": 0.5}, {"name": "early_exit"}]
    model = SkipstoneForCausalLM(presets.get("tiny", mechanisms=mechanisms, activation="polyglu")).eval()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.positions", "model.norm", "lm_head"], "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(model.config.num_hidden_layers)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert {parameter.device.type for parameter in spread.parameters()} == {"cpu", "meta"}
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(spread(ids).logits, model(ids).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spread.generate(ids, **greedy), model.generate(ids, **greedy))


def test_every_tensor_of_the_tokens_moves() -> None:
    slot = torch.arange(3)[None]
    ones = torch.ones(1, 3)
    tokens = Tokens(
        slot_BT=slot,
        position_BT=slot,
        rotary=(ones[..., None], ones[..., None]),
        document_BT=slot,
        real_BT=ones.bool(),
        gain_BT=ones,
        queries=Padded(slot, 3, ones.bool()),
        state={"early_exit": ones},
        forced_BT=ones.bool(),
        mode=PassMode(noise=True),
    )
    moved = tokens.to("meta")
    assert moved.mode == tokens.mode
    assert isinstance(moved.queries, Padded)
    assert moved.queries.length == 3
    found = [getattr(moved, f.name) for f in fields(moved)] + [moved.queries.index_BK, moved.queries.valid_BK]
    found += [*moved.state.values(), *(moved.rotary or ())]
    tensors = [x for x in found if isinstance(x, torch.Tensor)]
    assert len(tensors) == 11
    assert all(x.device.type == "meta" for x in tensors)
