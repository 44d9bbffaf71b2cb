"""Law 19: an fp64 model computes in fp64 throughout, so that gradients can be checked by finite differences."""

from __future__ import annotations

import pytest
import torch

from laws import builders as b


@pytest.mark.parametrize("case", b.CAUSAL, ids=str)
def test_double_precision_computes_the_same_and_more_precisely(case: b.Case) -> None:
    model, ids = b.lively(case), b.ids()
    single = model(ids, output_records=True)
    double = model.double()(ids, labels=ids, output_records=True)
    assert double.logits.dtype == double.loss.dtype == torch.float64
    for (layer, name, mine), (_, _, theirs) in zip(b.depth_records(single), b.depth_records(double), strict=True):
        assert torch.equal(mine.kept_BT, theirs.kept_BT), f"block {layer} {name}: another decision"
    b.assert_close(single.logits.double(), double.logits, tolerance=1e-4)
    double.loss.backward()
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("case", [c for c in b.ORDERS if c.activation in ("silu", "polyglu")][:10], ids=str)
def test_gradients_are_those_of_differences(case: b.Case) -> None:
    """A derivative along one random direction: 1e-6 is far below what any fp32 step inside would leave."""
    model, ids = b.lively(case).double(), b.ids()

    def loss() -> torch.Tensor:
        return model(ids, labels=ids, routing="causal").token_loss

    parameters = [p for n, p in model.named_parameters() if "router" not in n and "guess" not in n]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    torch.manual_seed(3)
    directions = [torch.randn_like(p) for p in parameters]
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    found, step = [], 1e-6
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            found.append(loss())
    slope = (found[0] - found[1]) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)
