"""TEAL's thresholds on the inputs of a dense MLP: calibrated shares, zeros in the right places, and no hooks left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import PASSES
from skipstone_studies.quality.teal import measure_teal

WAY = PASSES["executed"]


def model(layers: int = 2, **more: Any) -> SkipstoneForCausalLM:
    return tiny_model(4, vocab_size=23, num_hidden_layers=layers, num_attention_heads=4, initializer_range=0.3, **more)


def rows(seed: int) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 23, (4, 30), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids, "labels": ids}]


def test_share_of_zeros_follows_the_quantile() -> None:
    built = model()
    plain = measure_loss(built, WAY, rows(2)).loss
    losses = []
    for sparsity in (0.0, 0.4, 0.8):
        found = measure_teal(built, WAY, rows(1), rows(2), sparsity)
        assert found.sparsity == pytest.approx(sparsity, abs=0.04)  # what small inputs leave is smaller
        losses.append(found.loss)
    assert losses[0] == pytest.approx(plain, abs=1e-3)
    assert len({round(loss, 4) for loss in losses}) == 3
    assert measure_loss(built, WAY, rows(2)).loss == plain


@torch.no_grad()
def test_equals_zeros_put_in_by_hand() -> None:
    """One layer alone, whose norm, matrices and thresholds are at hand."""
    built = model(layers=1)
    seen: dict[str, Tensor] = {}
    block: Any = built.model.layers[0]
    mlp = block.mlp
    hook = mlp.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    built(rows(1)[0]["input_ids"])
    hook.remove()

    def thresholded(x: Tensor) -> Tensor:
        ordered = x.abs().flatten().sort().values
        return torch.where(x.abs() <= ordered[int(0.5 * len(ordered))], 0.0, x)

    dense = torch.nn.functional.silu(mlp.gate_proj(seen["x"])) * mlp.up_proj(seen["x"])
    small = thresholded(seen["x"])
    hidden = torch.nn.functional.silu(mlp.gate_proj(small)) * mlp.up_proj(small)
    cut = dense.abs().flatten().sort().values[int(0.5 * dense.numel())]
    expected = mlp.down_proj(torch.where(hidden.abs() <= cut, 0.0, hidden))
    got: list[Tensor] = []
    hook = mlp.register_forward_hook(lambda module, inputs, output: got.append(output[0]))
    measure_teal(built, WAY, rows(1), rows(1), 0.5)
    hook.remove()
    torch.testing.assert_close(got[-1], expected)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        measure_teal(model(), WAY, rows(1), rows(2), 1)
    with pytest.raises(ValueError, match="need gated MLPs of three matrices, this model has mlp 'plain'"):
        measure_teal(model(mlp="plain"), WAY, rows(1), rows(2), 0.4)
