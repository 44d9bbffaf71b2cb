"""A guided router learns from the gradient of the loss, and sends no gradient into the model."""

from __future__ import annotations

import pytest
import torch

from skipstone.mechanisms import MixtureOfDepths
from skipstone.mechanisms.guidance import guided

B, T, D = 2, 12, 8


def test_the_score_is_taught_where_the_gradient_is_largest() -> None:
    delta = torch.randn(B, T, D, requires_grad=True)
    score = torch.randn(B, T, requires_grad=True)
    asked = torch.ones(B, T, dtype=torch.bool)
    asked[1, 8:] = False
    pull = torch.rand(B, T) + 0.1
    pull[1, 8:] = 9.0  # padding, whatever its gradient
    out, loss = guided(delta, score, asked, 0.25)
    assert torch.equal(out, delta)
    assert (loss == 0).all()
    towards = torch.nn.functional.one_hot(torch.zeros(B, T, dtype=torch.long), D) * pull[..., None]
    ((out * towards).sum() + 3 * loss.sum()).backward()
    torch.testing.assert_close(delta.grad, towards)
    wanted = pull > pull[asked].quantile(0.75)
    torch.testing.assert_close(score.grad, 3 * (score.sigmoid() - wanted.float()).detach())
    assert 4 <= (wanted & asked).sum() <= 5


def test_guidance_is_scaled_like_the_loss() -> None:
    grads = []
    for scale in (1.0, 0.25):  # as gradient accumulation scales it
        score = torch.linspace(-1, 1, T)[None].requires_grad_()
        delta = torch.randn(1, T, D, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out, loss = guided(delta, score, torch.ones(1, T, dtype=torch.bool), 0.5)
        ((out.square().sum() + loss.sum()) * scale).backward()
        grads.append(score.grad)
    torch.testing.assert_close(grads[1], grads[0] * 0.25)


def test_it_is_on_by_default_and_off_where_the_weight_teaches() -> None:
    assert MixtureOfDepths(D).config.guidance
    assert MixtureOfDepths(D).config.router_norm
    for options in ({"weight": "raw"}, {"decision": "random"}, {"guidance": False, "router_norm": False}):
        config = MixtureOfDepths(D, **options).config
        assert not config.guidance
        assert not config.router_norm
    assert MixtureOfDepths(D, weight="raw", guidance=True).config.guidance


def test_scores_that_nobody_reads_cannot_be_taught() -> None:
    with pytest.raises(ValueError, match="guidance trains scores, which decision 'random' does not read"):
        MixtureOfDepths(D, decision="random", guidance=True)
