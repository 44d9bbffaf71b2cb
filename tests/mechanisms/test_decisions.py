"""Each decision alone: the tokens that it keeps, its loss, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms.decisions import DECISIONS, Decision, EmaThreshold, build_decision, causal_decisions
from skipstone.ops.reference import quota

T, D = 24, 8


def tokens(noise: bool = False, position: Tensor | None = None) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot if position is None else position, mode=PassMode(noise=noise))


def made(name: str, capacity: float = 0.25, seed: int = 0) -> Decision:
    torch.manual_seed(0)
    return build_decision(name, capacity, D, seed)


def kept(decision: Decision, form: str, given: Tokens | None = None) -> Tensor:
    torch.manual_seed(3)
    score, x = torch.randn(2, T), torch.randn(2, T, D)
    return getattr(decision, form)(score, x, given or tokens())


@pytest.mark.parametrize("capacity", [0.125, 0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", ["topk", "threshold", "predictor", "random", "positional"])
def test_static_oracles_keep_their_quota(name: str, capacity: float) -> None:
    decision = made(name, capacity)
    assert decision.static
    assert kept(decision, "oracle").sum(1).tolist() == [quota(capacity, T)] * 2


def test_names() -> None:
    learned = ["threshold", "predictor", "ema_threshold", "threshold_p"]
    assert causal_decisions() == [*learned, "random", "positional", "boundary"]
    assert {name for name, kind in DECISIONS.items() if not kind.is_causal} == {"topk"}
    with pytest.raises(ValueError, match="unknown decision 'top_k'; did you mean 'topk'"):
        made("top_k")


def test_scores_above_zero_pass_a_threshold() -> None:
    score = torch.randn(2, T)
    assert torch.equal(made("threshold").causal(score, torch.randn(2, T, D), tokens()), score > 0)


@pytest.mark.parametrize("name", ["threshold", "predictor"])
def test_the_loss_is_zero_for_a_perfect_guess_and_stays_off_the_input(name: str) -> None:
    decision, x = made(name), torch.randn(2, T, D, requires_grad=True)
    score, target = torch.randn(2, T, requires_grad=True), torch.rand(2, T) < 0.25
    asked = torch.ones(2, T, dtype=torch.bool)
    decision.loss(score, target, x, asked).sum().backward()
    assert x.grad is None or (x.grad == 0).all()
    assert (score.grad is not None) == decision.trains_router
    sure = torch.where(target, 50.0, -50.0)
    if name == "threshold":
        assert decision.loss(sure, target, x, asked).max() < 1e-6


@pytest.mark.parametrize("capacity", [0.125, 0.3, 0.5])
def test_positions_are_spread_evenly(capacity: float) -> None:
    decision = made("positional", capacity)
    causal = kept(decision, "causal")
    assert torch.equal(causal, kept(decision, "oracle"))
    at = causal[0].nonzero().flatten()
    gaps = at.diff()
    assert gaps.max() - gaps.min() <= 1
    assert [int(causal[0, :n].sum()) for n in range(1, T + 1)] == [quota(capacity, n) for n in range(1, T + 1)]


def test_positions_with_gaps_still_fill_the_quota() -> None:
    """Inside another mechanism the positions are those that it kept: all may match the pattern, or none."""
    for start in (0, 1):
        given = tokens(position=torch.arange(start, 2 * T, 2)[None])
        mask = kept(made("positional", 0.5), "oracle", given)
        assert mask.sum(1).tolist() == [12, 12]


def test_random_is_drawn_with_noise_and_fixed_without() -> None:
    decision = made("random", 0.5)
    assert torch.equal(kept(decision, "oracle"), kept(decision, "oracle"))
    noisy = tokens(noise=True)
    score, x = torch.randn(2, T), torch.randn(2, T, D)
    draws = [decision.oracle(score, x, noisy) for _ in range(2)]
    assert not torch.equal(*draws)
    assert draws[0].sum(1).tolist() == [12, 12]
    assert not torch.equal(kept(decision, "causal"), kept(made("random", 0.5, seed=1), "causal"))
    wide = torch.arange(20_000)[None]
    share = made("random", 0.3).causal(torch.zeros(1, 20_000), torch.zeros(1), tokens(position=wide)).float().mean()
    assert share == pytest.approx(0.3, abs=0.02)


def test_the_running_threshold_follows_the_quantile() -> None:
    decision = made("ema_threshold", 0.25)
    assert isinstance(decision, EmaThreshold)
    assert not decision.static
    assert "never advanced" in decision.not_ready_reason()
    torch.manual_seed(0)
    for _ in range(200):
        score = torch.randn(8, 64) + 2
        decision.advance(decision.statistics(score, torch.ones(8, 64, dtype=torch.bool)))
    assert decision.not_ready_reason() is None
    assert (torch.randn(100_000) + 2 > decision.threshold).float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(kept(decision, "oracle"), kept(decision, "causal"))


def test_the_first_quantile_counts_in_full_and_padding_not_at_all() -> None:
    decision, score = made("ema_threshold", 0.5), torch.tensor([[1.0, 3.0, 900.0]])
    statistics = decision.statistics(score, torch.tensor([[True, True, False]]))
    decision.advance(statistics)
    assert decision.threshold.item() == 2.0
    nobody = decision.statistics(score, torch.zeros(1, 3, dtype=torch.bool))
    assert nobody.isnan().all()
    decision.advance(nobody)
    decision.advance(None)
    assert (decision.threshold.item(), decision.steps.item()) == (2.0, 1)


@pytest.mark.parametrize("name", [n for n in DECISIONS if n != "ema_threshold"])
def test_others_are_always_ready_and_never_move(name: str) -> None:
    decision = made(name)
    before = {k: v.clone() for k, v in decision.state_dict().items()}
    assert decision.not_ready_reason() is None
    assert decision.statistics(torch.randn(2, T), torch.ones(2, T, dtype=torch.bool)) is None
    decision.advance(None)
    assert all(torch.equal(v, before[k]) for k, v in decision.state_dict().items())
