"""Four-bit weights in the compiled call for all blocks: beside other formats, and where they are left to the blocks.

`test_compiled_blocks.py` compares every kind of block.
"""

from __future__ import annotations

import pytest
import torch

from nn.test_compiled_blocks import CALLS, OPTIONS, general, logits, model
from nn.test_compiled_blocks import counted as counted
from skipstone.model.quantise import quantise
from skipstone.nn.int4 import Int4Linear
from skipstone.ops import int4

pytest.importorskip("numba")


def test_other_formats_in_the_same_step(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    start = model(intermediate_size=192)
    start.model.layers[0].mlp.up_proj.weight.data.mul_(1e-5)  # too small for fp16 scales
    given = quantise(start, 4)
    assert given.config.weight_int8 == ["layers.0.mlp.up_proj"]
    given.model.layers[1].mlp.gate_proj = start.model.layers[1].mlp.gate_proj
    got = logits(given)
    assert counted == list(CALLS[1:])
    torch.testing.assert_close(got, general(given, monkeypatch), rtol=1e-4, atol=2e-3)


def test_chosen_neurons_of_four_bits_go_one_by_one(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantise` makes these matrices int8; a configuration by hand need not."""
    given = model(weight_format="int4", weight_group=64, **OPTIONS["by magnitude"])
    for module in given.modules():
        if isinstance(module, Int4Linear):
            module.weight.data = int4.quantise(torch.randn(module.out_features, module.in_features) / 10)
    for module in (given.model.embed_tokens, given.lm_head):
        module.weight.data.random_(-127, 127)
        module.weight_scale.data.fill_(0.01)
    got = logits(given)
    assert not counted
    torch.testing.assert_close(got, general(given, monkeypatch))
    assert len(got.unique()) > got.numel() // 2
