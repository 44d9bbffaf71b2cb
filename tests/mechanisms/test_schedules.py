"""Capacity over depth and training, and exploration: what a trainer advances, and what checkpoints keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models import tiny_model
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms import MixtureOfDepths, Placement
from skipstone.mechanisms.exploration import Exploration
from skipstone.mechanisms.schedules import Capacity, between
from skipstone.ops.reference import quota

D, T, MOD = 16, 40, "mixture_of_depths"
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}


def model(**options: Any) -> SkipstoneForCausalLM:
    return tiny_model(**SIZES, mechanisms=[{"name": MOD, "layers": "1:", "capacity": 0.25, **options}]).train()


def mods(model: SkipstoneForCausalLM) -> list[Any]:
    return [block.mechanisms[MOD] for block in model.model.layers if len(block.mechanisms)]


def kept_share(model: SkipstoneForCausalLM, **call: Any) -> list[float]:
    out = model(torch.arange(2 * T).view(2, T) % 31, output_records=True, noise=False, **call)
    return [records[MOD].kept_BT.double().mean().item() for records in out.records[1:]]


def tokens(noise: bool) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(routing="oracle", noise=noise))


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_starts_and_ends_exactly(shape: Any) -> None:
    values = [between(1.0, 0.3, share / 10, shape) for share in range(-1, 12)]
    assert values[:2] == [1, 1]
    assert values[-2:] == [0.3, 0.3]
    assert values == sorted(values, reverse=True)
    assert values[6] == pytest.approx(0.65)
    assert (values[2] > 0.93) == (shape == "cosine")


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (0.25, [0.25, 0.25, 0.25]),
        ([0.5, 0.25, 1], [0.5, 0.25, 1.0]),
        ({"start": 0.5, "end": 0.1}, [0.5, 0.3, 0.1]),
        ({"start": 0.2, "end": 0.4, "shape": "cosine"}, [0.2, 0.3, 0.4]),
    ],
)
def test_capacity_over_depth(capacity: Any, expected: list[float]) -> None:
    built = model(capacity=capacity, decision="topk")
    assert [m.capacity for m in mods(built)] == pytest.approx(expected)
    assert kept_share(built, routing="oracle") == pytest.approx([quota(c, T) / T for c in expected])
    plain = SkipstoneConfig.from_dict(built.config.to_dict())
    assert plain.mechanisms == built.config.mechanisms


def test_one_routed_block_has_the_start_of_a_ramp() -> None:
    assert MixtureOfDepths(D, capacity={"start": 0.5, "end": 0.1}).capacity == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": {"strat": 0.5, "end": 0.1}}, "unknown key in capacity 'strat'; did you mean 'start'"),
        ({"capacity": {"start": 0.5}}, "capacity.end is missing"),
        ({"capacity": {"start": 0.5, "end": 0}}, r"capacity: end must be in \(0, 1\], got 0"),
        ({"capacity": {"start": 0.5, "end": 0.1, "shape": "cosin"}}, "did you mean 'cosine'"),
        ({"capacity": [0.5, 2.0]}, r"capacity must be in \(0, 1\], got 2.0"),
        ({"capacity": []}, "capacity lists no number"),
        ({"capacity": [0.5, "x"]}, r"capacity\[1\] must be float, got 'x'"),
        ({"capacity": [0.5, 0.25]}, "capacity lists 2 numbers, but 1 blocks are routed"),
        ({"capacity_warmup": 1.5}, r"capacity_warmup must be in \[0, 1\], got 1.5"),
        ({"warmup_shape": "liner"}, "did you mean 'linear'"),
        ({"exploration": -1}, "exploration must not be negative, got -1"),
        ({"exploration_until": 0}, r"exploration_until must be in \(0, 1\], got 0"),
        ({"exploration": 1, "decision": "random"}, "exploration adds noise to scores, which decision 'random'"),
        ({"z_loss": float("nan")}, "z_loss must not be negative, got nan"),
        ({"threshold": 1}, r"threshold must be in \(0, 1\), got 1"),
        ({"router": "lineer"}, "unknown router 'lineer'; did you mean 'linear'"),
        ({"kv": "ful"}, "unknown kv 'ful'; did you mean 'full'"),
        ({"skip": "low-rank"}, "unknown skip 'low-rank'; did you mean 'low_rank'"),
        ({"skip_rank": 0}, r"skip_rank must be in \[1, 65,536\], got 0"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MixtureOfDepths(D, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decision", ["topk", "predictor", "random", "positional"])
def test_capacity_warms_up(decision: str) -> None:
    """Every token at first, the set share from the end of the warm-up on; in causal passes, too."""
    built = model(decision=decision, capacity_warmup=0.5)
    for progress, now in [(0, 1), (0.25, 0.625), (0.4, 0.4), (0.5, 0.25), (1, 0.25)]:
        for mechanism in mods(built):
            mechanism.advance(progress, None)
            assert mechanism.decision.capacity.now == pytest.approx(now)
        assert kept_share(built, routing="oracle") == pytest.approx([quota(now, T) / T] * 3)
        if decision == "positional":
            assert kept_share(built, routing="causal") == pytest.approx([quota(now, T) / T] * 3)
        promised = built.cost(T, routing="oracle").forward
        assert promised == model(decision=decision).cost(T, routing="oracle").forward


def test_a_running_threshold_follows_the_warm_up() -> None:
    mechanism = MixtureOfDepths(D, capacity=0.2, decision="ema_threshold", capacity_warmup=0.5)
    score, asked = torch.randn(8, 512), torch.ones(8, 512, dtype=torch.bool)
    for step in range(1, 201):
        mechanism.advance(step / 200, mechanism.decision.statistics(score, asked))
        if step == 60:  # a step late, whatever came before
            assert (score > mechanism.decision.threshold).float().mean() == pytest.approx(0.528, abs=0.002)
        if step == 101:  # and not held back by the way down
            assert (score > mechanism.decision.threshold).float().mean() == pytest.approx(0.2, abs=0.01)
    assert (score > mechanism.decision.threshold).float().mean() == pytest.approx(0.2, abs=0.01)


def test_a_warm_up_that_nobody_advanced_says_so() -> None:
    built = model(decision="positional", capacity_warmup=0.5)
    assert kept_share(built) == [1, 1, 1]
    assert all("capacity_warmup was never advanced" in m.not_ready_reason() for m in mods(built))
    for mechanism in mods(built):
        mechanism.advance(0.1, None)
        assert mechanism.not_ready_reason() is None


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
def test_checkpoints_keep_the_capacity_in_force(cast: torch.dtype, tmp_path: Path) -> None:
    built = model(decision="positional", capacity=0.3, capacity_warmup=0.7, exploration=0, warmup_shape="cosine")
    for mechanism in mods(built):
        mechanism.advance(1 / 3, None)
    now = mods(built)[0].decision.capacity.now
    assert 0.3 < now < 1
    built.to(cast).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [m.decision.capacity.now for m in mods(loaded)] == [now] * 3
    other = model(decision="positional", capacity=0.3, capacity_warmup=0.7, warmup_shape="cosine")
    assert kept_share(other) == [1, 1, 1]
    other.load_state_dict(built.state_dict())
    assert [m.decision.capacity.now for m in mods(other)] == [now] * 3
    with torch.device("meta"):
        shapes = SkipstoneForCausalLM(built.config)
    assert shapes.to_empty(device="cpu").load_state_dict(built.state_dict()).missing_keys == []
    assert [m.decision.capacity.now for m in mods(shapes)] == [now] * 3


def test_what_is_not_asked_for_leaves_no_tensor() -> None:
    assert [name for name, _ in MixtureOfDepths(D).named_buffers()] == ["decision.threshold", "decision.steps"]
    assert [name for name, _ in MixtureOfDepths(D, decision="topk").named_parameters()] == ["router.weight"]


@pytest.mark.parametrize("decision", ["topk", "threshold", "predictor", "ema_threshold", "threshold_p"])
def test_exploration_changes_who_is_kept_and_fades(decision: str) -> None:
    mechanism = MixtureOfDepths(
        D, Placement(), decision=decision, capacity=0.25, exploration=2.0, exploration_until=0.5
    )
    x = torch.randn(64, T, D)
    score = mechanism.router(x)
    if decision == "ema_threshold":
        mechanism.advance(0, mechanism.decision.statistics(score, torch.ones(64, T, dtype=torch.bool)))
    plain = mechanism.decide(score, x, tokens(noise=False))
    changed = []
    for progress in (0.0, 0.25, 0.45, 0.5, 1.0):
        mechanism.advance(progress, None)
        explored = mechanism.decide(score, x, tokens(noise=True))
        changed.append((explored != plain).float().mean().item())
        if decision != "threshold_p":
            assert explored.float().mean() == pytest.approx(0.25, abs=0.02)
        assert torch.equal(mechanism.decide(score, x, tokens(noise=False)), plain)
    assert changed[0] > changed[1] > changed[2] > changed[3] == changed[4] == 0
    assert changed[0] > 0.1


def test_exploration_draws_gumbel_noise_and_leaves_the_quantile() -> None:
    layer, score, asked = Exploration(2.0, 1.0), torch.randn(64, 256), torch.rand(64, 256) < 0.9
    uniform = torch.rand(64, 256)
    noise = (layer(score, uniform, asked) - score) / 2
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(torch.pi**2 / 6, abs=0.06)
    held = layer(score, uniform, asked, 0.25)
    torch.testing.assert_close(held[asked].quantile(0.75), score[asked].quantile(0.75))
    assert not layer(score.requires_grad_(), uniform, asked).requires_grad


def test_the_auxiliary_target_is_what_would_be_kept_without_noise() -> None:
    mechanism, x = MixtureOfDepths(D, decision="threshold", capacity=0.25, exploration=3.0), torch.randn(4, T, D)

    def update(x: torch.Tensor, tokens: Tokens) -> Any:
        return x, {}

    noisy = mechanism(update, x, tokens(noise=True))[1]["MixtureOfDepths"]
    plain = mechanism(update, x, tokens(noise=False))[1]["MixtureOfDepths"]
    assert not torch.equal(noisy.kept_BT, plain.kept_BT)
    assert torch.equal(noisy.loss_BT, plain.loss_BT)


def test_a_pinned_capacity_ends_a_warm_up_there() -> None:
    capacity = Capacity(0.25, warmup=0.5)
    capacity.advance(0.3)
    capacity.pin(1.0)
    assert capacity.now == 1
