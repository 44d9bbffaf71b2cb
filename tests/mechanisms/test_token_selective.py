"""Token-Selective Attention beyond its paper: training the executed pass, a given share, and controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechanisms.test_mechanisms import D, T, double, tokens
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.counts import TokenCounts
from skipstone.core.records import DepthRecord
from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms import MixtureOfDepths, Placement, TokenSelective

PASSES = ("hard", "straight_through")


def built(**options: Any) -> TokenSelective:
    """A gate whose threshold lies among its scores."""
    torch.manual_seed(0)
    layer = TokenSelective(D, Placement(name="tsa"), **options)
    if options.get("capacity") and hasattr(layer.decision, "threshold"):
        scores = layer(double, inputs(), tokens())[1]["tsa"].score_BT
        layer.decision.threshold.copy_(scores.quantile(1 - layer.capacity))
    return layer


def inputs() -> Tensor:
    return torch.randn(2, T, D, generator=torch.Generator().manual_seed(1)) * 3


def run(layer: TokenSelective, routing: str) -> tuple[Tensor, DepthRecord]:
    delta, records = layer(double, inputs(), tokens(routing))
    record = records["tsa"]
    assert isinstance(record, DepthRecord)
    return delta, record


@pytest.mark.parametrize("training", PASSES)
@pytest.mark.parametrize("hard_gain", ["gate", "one"])
@pytest.mark.parametrize("capacity", [None, 0.4])
def test_the_pass_that_is_trained_is_the_one_that_is_executed(
    training: str, hard_gain: str, capacity: float | None
) -> None:
    layer = built(training=training, hard_gain=hard_gain, capacity=capacity, start_bias=-0.3)
    (trained, mine), (executed, theirs) = run(layer, "oracle"), run(layer, "causal")
    assert torch.equal(trained, executed)
    assert torch.equal(mine.weight_BT, theirs.weight_BT)
    assert 0 < theirs.kept_BT.sum() < theirs.kept_BT.numel()
    if training == "hard":
        assert torch.equal(mine.kept_BT, theirs.kept_BT)
    else:
        assert mine.kept_BT.all()  # it computes them all, and says so


def gate_gradients(layer: TokenSelective) -> tuple[Tensor, Tensor, DepthRecord]:
    """d loss / d score as the router hears it, and what it would be if every token's gate had really been there."""
    heard: list[Tensor] = []

    def listen(module: Any, args: Any, halt_BT: Tensor) -> None:
        halt_BT.register_hook(lambda gradient: heard.append(-gradient))

    layer.router.register_forward_hook(listen)
    pull = torch.randn(2, T, D, generator=torch.Generator().manual_seed(2))
    delta, record = run(layer, "oracle")
    assert record.loss_BT is not None
    ((delta * pull).sum() + record.loss_BT.sum() * 0).backward()
    opened = record.score_BT.sigmoid()
    return heard[0], (pull * 2 * inputs()).sum(-1) * opened * (1 - opened), record


@pytest.mark.parametrize("hard_gain", ["gate", "one"])
def test_straight_through_tells_every_gate_what_its_token_would_bring(hard_gain: str) -> None:
    layer = built(training="straight_through", hard_gain=hard_gain, capacity=0.4)
    heard, expected, record = gate_gradients(layer)
    torch.testing.assert_close(heard, expected.detach())
    assert 0 < (record.weight_BT == 0).sum() < record.weight_BT.numel()
    assert (heard[record.weight_BT == 0] != 0).all()


def test_hard_training_tells_kept_tokens_only() -> None:
    """What the update was worth is known where it was computed; for the others there is guidance."""
    heard, expected, record = gate_gradients(built(training="hard", capacity=0.4))
    torch.testing.assert_close(heard, torch.where(record.kept_BT, expected, 0.0).detach())


def test_guidance_tells_every_token_and_the_model_hears_nothing() -> None:
    layer = built(training="hard", hard_gain="one", capacity=0.25, guidance=True, auxiliary_weight=0.5, depth_weight=0)
    x = inputs().requires_grad_()
    delta, records = layer(double, x, tokens())
    record = records["tsa"]
    pull = torch.rand(2, T, 1) + 0.1
    heard: list[Tensor] = []
    record.score_BT.register_hook(heard.append)
    assert (record.loss_BT == 0).all()
    ((delta * pull).sum() + record.loss_BT.sum()).backward()
    wanted = pull[..., 0] > pull.quantile(0.75)
    torch.testing.assert_close(heard[0], (0.5 * (record.score_BT.sigmoid() - wanted.float())).detach())
    torch.testing.assert_close(x.grad, (2 * pull * record.kept_BT[..., None]).expand_as(x))


@pytest.mark.parametrize("kv", ["full", "kept"])
def test_guided_with_gain_one_it_is_mixture_of_depths(kv: str) -> None:
    """Not like it: the same numbers. What is left of the paper's idea is the gain 1 - p and its gradient."""
    gate = built(training="hard", hard_gain="one", capacity=0.25, guidance=True, router_norm=True, kv=kv)
    mixture = MixtureOfDepths(D, Placement(name="tsa"), capacity=0.25, router="mlp", kv=kv)
    mixture.load_state_dict(gate.state_dict())
    with torch.no_grad():
        mixture.router.weight.neg_()
        mixture.router.score_bias.neg_()
    for routing in ("oracle", "causal"):
        (delta, record), (other, records) = run(gate, routing), mixture(double, inputs(), tokens(routing))
        torch.testing.assert_close(delta, other)
        for a, b in zip(record[:4], records["tsa"][:4], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("routing", ["oracle", "causal"])
def test_dropped_tokens_do_not_exist_inside(routing: str) -> None:
    layer, seen = built(training="hard", capacity=0.4, kv="kept"), []

    def update(x: Tensor, inside: Tokens) -> tuple[Tensor, dict[str, Any]]:
        seen.append((x, inside))
        return double(x, inside)

    delta, records = layer(update, inputs(), tokens(routing))
    record, (x, inside) = records["tsa"], seen[0]
    assert x.shape[1] == record.kept_BT.sum(1).max() < T
    assert torch.equal(inside.slot_BT[0][: record.kept_BT[0].sum()], record.kept_BT[0].nonzero()[:, 0])
    torch.testing.assert_close(delta, 2 * inputs() * record.weight_BT[..., None])


def test_nobody_kept_leaves_the_stream_alone() -> None:
    layer = built(training="hard", kv="kept", start_bias=9.0)
    delta, record = run(layer, "oracle")
    assert not record.kept_BT.any()
    assert not delta.any()


def test_a_capacity_is_met_whatever_the_scores_do() -> None:
    """Scores that drift, ever slower, as with the learning rate of a training."""
    layer, generator = TokenSelective(D, Placement(name="tsa"), training="hard", capacity=0.3), torch.Generator()
    generator.manual_seed(3)
    shares = []
    for step in range(100):
        with torch.no_grad():
            layer.router.score_bias.add_(0.02 * max(1 - step / 80, 0))
        record = layer(double, torch.randn(8, 64, D, generator=generator), tokens(T=64))[1]["tsa"]
        shares.append(record.kept_BT.float().mean().item())
        layer.advance(step / 100, layer.statistics(record))
    assert shares[0] > 0.9  # nothing is known before the first step
    assert sum(shares[-20:]) / 20 == pytest.approx(0.3, abs=0.03)


def test_a_warm_up_goes_from_the_soft_pass_to_the_hard_one() -> None:
    layer, soft = built(training="hard", capacity=0.25, capacity_warmup=0.5), built()
    soft.load_state_dict(layer.state_dict(), strict=False)
    assert torch.equal(run(layer, "oracle")[0], run(soft, "oracle")[0])
    for progress, share in ((0.25, 0.625), (0.5, 0.25), (1.0, 0.25)):
        for _ in range(200):
            layer.advance(progress, layer.statistics(run(layer, "oracle")[1]))
        assert run(layer, "causal")[1].kept_BT.float().mean() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("routing", ["oracle", "causal"])
@pytest.mark.parametrize("gate", ["token", "constant"])
def test_random_skipping_of_the_same_share(gate: str, routing: str) -> None:
    layer, x = TokenSelective(D, capacity=0.25, decision="random", training="hard", gate=gate), torch.randn(4, 400, D)
    slot = torch.arange(400)[None]
    noisy = Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(routing=routing, noise=routing == "oracle"))
    record = layer(double, x, noisy)[1]["TokenSelective"]
    assert record.kept_BT.float().mean() == pytest.approx(0.25, abs=0.06)
    assert abs(torch.corrcoef(torch.stack((record.kept_BT.float().flatten(), x.norm(dim=-1).flatten())))[0, 1]) < 0.1


def test_a_constant_gate_is_one_number() -> None:
    layer = TokenSelective(D, gate="constant", start_bias=0.4)
    assert [tuple(p.shape) for p in layer.parameters()] == [(1,)]
    delta, _ = layer(double, inputs(), tokens())
    torch.testing.assert_close(delta, 2 * inputs() * torch.tensor(-0.4).sigmoid())
    assert layer.flops(7, "causal") == layer.backward_flops(7) == 0


# In a model

ENTRY = {"name": "token_selective", "layers": "1:"}
FULL = {**ENTRY, "training": "hard", "capacity": 0.5, "guidance": True, "router_norm": True}


def trained(entry: dict[str, Any], steps: int = 70) -> tuple[SkipstoneForCausalLM, SkipstoneForCausalLM, float]:
    """A tiny model before and after, and the share of tokens that the last ten steps executed."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = SkipstoneForCausalLM(SkipstoneConfig.from_plain({**sizes, "mechanisms": [entry]}))
    before = SkipstoneForCausalLM(model.config)
    before.load_state_dict(model.state_dict())
    optimizer, shares = torch.optim.AdamW(model.train().parameters(), weight_decay=0.1), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * max(1 - step / 40, 0)
        ids = torch.randint(0, 31, (8, 32), generator=torch.Generator().manual_seed(step))
        out = model(ids, labels=ids, output_records=True)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for mechanism in model.routing_modules():
            record = out.records[mechanism.placement.layer]["token_selective"]
            mechanism.advance((step + 1) / steps, mechanism.statistics(record))
            shares.append((record.weight_BT > 0).float().mean().item())
    return before, model, sum(shares[-20:]) / 20


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"kv": "kept"}, {"training": "straight_through", "guidance": False}])
def test_training_meets_the_capacity(more: dict[str, Any]) -> None:
    _, model, share = trained({**FULL, **more})
    assert share == pytest.approx(0.5, abs=0.05)
    assert all(mechanism.not_ready_reason() is None for mechanism in model.routing_modules())


@pytest.mark.parametrize(
    ("options", "oracle", "causal"),
    [
        ({}, (100, 100), (100, 100)),
        ({"capacity": 0.25}, (100, 100), (100, 25)),
        ({"capacity": 0.25, "training": "straight_through"}, (100, 100), (100, 25)),
        ({"capacity": 0.25, "training": "hard"}, (100, 25), (100, 25)),
        ({"capacity": 0.25, "training": "hard", "kv": "kept"}, (25, 25), (25, 25)),
        ({"capacity": 0.25, "execution": "soft"}, (100, 100), (100, 100)),
    ],
)
def test_what_a_capacity_promises(options: dict[str, Any], oracle: tuple[int, int], causal: tuple[int, int]) -> None:
    layer = TokenSelective(D, **options)
    for is_oracle, (given, asked) in ((True, oracle), (False, causal)):
        assert layer.counts_inside(TokenCounts(kv_tokens=100, query_tokens=100), oracle=is_oracle) == TokenCounts(
            kv_tokens=given, query_tokens=asked
        )


@pytest.mark.parametrize("training", ["soft", *PASSES])
def test_a_frozen_gate_stays_as_it_starts(training: str) -> None:
    before, after, _ = trained({**ENTRY, "learn": False, "training": training}, steps=3)
    moved = {n for (n, p), q in zip(after.named_parameters(), before.parameters(), strict=True) if not p.equal(q)}
    assert moved == {n for n, _ in after.named_parameters() if "router" not in n}


def test_a_gate_that_was_never_advanced_says_so() -> None:
    assert "never advanced" in (TokenSelective(D, capacity=0.5).not_ready_reason() or "")
    assert "capacity_warmup" in (TokenSelective(D, capacity=0.5, capacity_warmup=0.1).not_ready_reason() or "")
    for options in (
        {},
        {"capacity": 1.0},
        {"capacity": 0.5, "execution": "soft"},
        {"capacity": 0.5, "decision": "random"},
    ):
        assert TokenSelective(D, **options).not_ready_reason() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, r"capacity must be in \(0, 1\], got 0"),
        ({"capacity": []}, "capacity lists no number"),
        ({"guidance": True}, "guidance True needs a capacity, got none"),
        ({"decision": "random"}, "decision 'random' needs a capacity, got none"),
        ({"capacity_warmup": 0.5}, "capacity_warmup 0.5 needs a capacity, got none"),
        ({"capacity": 0.5, "capacity_warmup": 2}, r"capacity_warmup must be in \[0, 1\], got 2"),
        ({"capacity": 0.5, "decision": "topk"}, "unknown decision 'topk'"),
        ({"capacity": 0.5, "gate": "constant"}, "a constant gate ranks no tokens"),
        ({"capacity": 0.5, "guidance": True, "learn": False}, "guidance trains scores"),
        ({"capacity": 0.5, "guidance": True, "decision": "random"}, "guidance trains scores"),
        ({"auxiliary_weight": -1}, "auxiliary_weight must not be negative, got -1"),
        ({"training": "hard", "execution": "soft"}, "training 'hard' needs execution 'hard'"),
        ({"training": "straight_through", "kv": "kept"}, "kv 'kept' needs training 'hard', got 'straight_through'"),
        ({"training": "straight"}, "unknown training 'straight'; did you mean 'straight_through'"),
    ],
)
def test_wrong_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TokenSelective(D, **options)
    assert "\n" not in str(error.value)
