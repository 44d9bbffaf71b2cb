"""A compiled step of many rows equals the blocks one after the other; of more rows, it is left."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from nn.test_compiled_blocks import OPTIONS, model
from nn.test_compiled_blocks import counted as counted
from skipstone.model.quantise import quantise
from skipstone.ops import decode_stack

pytest.importorskip("numba")


@pytest.mark.parametrize("bits", [32, pytest.param(8, marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_batch_as_large_as_a_step_takes(bits: int, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16, of which a mechanism keeps different ones; of 17, every block runs as usual."""
    given, found = model(**OPTIONS["routed"]), []
    given = given if bits == 32 else quantise(given, bits)
    for rows, most in ((16, 16), (16, 0), (17, 16)):
        monkeypatch.setattr(decode_stack, "MOST_TOKENS", most)
        cache, row = DynamicCache(config=given.config), torch.Generator().manual_seed(2)
        given_ids = torch.randint(0, 61, (17, 8), generator=row)[:rows]
        calls = [given_ids[:, :4], *given_ids[:, 4:].split(1, 1)]
        found.append(torch.cat([given(x, past_key_values=cache, use_cache=True).logits for x in calls], 1))
    assert len(counted) == 4
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4 if bits == 32 else 2e-3)
