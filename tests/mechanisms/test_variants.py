"""Variants of Mixture-of-Depths from later papers, one option each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.records import Records
from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms import GateSkip, MixtureOfDepths, Placement
from skipstone.mechanisms.decisions import build_decision
from skipstone.mechanisms.routers import LinearRouter, MLPRouter

D, T, NAME = 16, 12, "MixtureOfDepths"


def tokens(routing: Any = "oracle", **more: Any) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(routing=routing), **more)


def triple(x: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
    """Three times the input, by the gain, for those that are wanted."""
    delta = 3 * x if tokens.gain_BT is None else 3 * x * tokens.gain_BT[..., None]
    return (delta if tokens.queries is None else tokens.queries.scatter(tokens.queries.gather(delta))), {}


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("form", ["oracle", "causal"])
def test_threshold_p_is_the_same_in_training_and_inference(form: str, threshold: float) -> None:
    decision, score = build_decision("threshold_p", 0.25, D, threshold=threshold), torch.randn(3, T) * 2
    kept = getattr(decision, form)(score, torch.randn(3, T, D), tokens())
    assert torch.equal(kept, score.sigmoid() > threshold)
    assert not decision.static


def test_threshold_p_is_pulled_to_its_capacity() -> None:
    """The loss is the squared distance of each row's load; its gradient moves scores until the load is right."""
    decision, asked = build_decision("threshold_p", 0.25, D), torch.ones(4, 64, dtype=torch.bool)
    asked[0, 32:] = False
    score = torch.randn(4, 64).requires_grad_()
    x, far = torch.randn(4, 64, D), []
    optimizer = torch.optim.SGD([score], lr=1.0)
    for _ in range(60):
        kept = decision.oracle(score, x, tokens()) & asked
        loss = decision.loss(score, kept, x, asked)
        load = kept.sum(1) / asked.sum(1)
        torch.testing.assert_close(loss[:, 0], (load - 0.25).square())
        far.append((load - 0.25).abs().max().item())
        optimizer.zero_grad()
        torch.where(asked, loss, 0.0).sum().backward()
        assert (score.grad[0, 32:] == 0).all()
        optimizer.step()
    assert far[0] > 0.15
    assert far[-1] <= 1 / 32


def test_z_loss_is_the_squared_score() -> None:
    layer, x = MixtureOfDepths(D, decision="topk", weight="raw", z_loss=0.5), torch.randn(2, T, D)
    real = torch.arange(T)[None] < torch.tensor([[T], [7]])
    record = layer(triple, x, tokens(real_BT=real))[1][NAME]
    torch.testing.assert_close(record.loss_BT, torch.where(real, 0.5 * (x @ layer.router.weight[0]) ** 2, 0.0))
    both = MixtureOfDepths(D, decision="threshold", weight="raw", z_loss=0.5, auxiliary_weight=0.1)
    record = both(triple, x, tokens())[1][NAME]
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    expected = 0.1 * bce(record.score_BT, record.kept_BT.float(), reduction="none") + 0.5 * record.score_BT**2
    torch.testing.assert_close(record.loss_BT, expected)
    assert layer(triple, x, tokens(real_BT=real, forced_BT=real))[1][NAME].loss_BT is None


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_router_norm_makes_scores_blind_to_size(router: str) -> None:
    layer, x = MixtureOfDepths(D, decision="topk", router=router, router_norm=True), torch.randn(2, T, D)
    assert isinstance(layer.router, LinearRouter if router == "linear" else MLPRouter)
    scores = [layer(triple, scale * x, tokens())[1][NAME].score_BT for scale in (1.0, 50.0)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    plain = MixtureOfDepths(D, decision="topk", router=router, guidance=True, router_norm=False)
    plain.load_state_dict(layer.state_dict())
    rms = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(scores[0], plain.router(x / rms), rtol=1e-4, atol=1e-4)
    assert plain.router(50 * x).abs().max() > 2 * plain.router(x).abs().max()


@pytest.mark.parametrize("routing", ["oracle", "causal"])
def test_full_kv_gives_the_update_every_token_and_asks_for_the_kept_ones(routing: str) -> None:
    layer, x, seen = MixtureOfDepths(D, capacity=0.5, decision="positional", kv="full"), torch.randn(2, T, D), []

    def update(x: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        seen.append((x, tokens))
        return triple(x, tokens)

    delta, records = layer(update, x, tokens(routing))
    record = records[NAME]
    (given, inner), kept = seen[0], record.kept_BT
    assert given is x
    assert torch.equal(inner.queries.mask(), kept)
    assert inner.query_tokens().length == 6
    torch.testing.assert_close(delta, 3 * x * record.weight_BT[..., None])
    assert (record.weight_BT != 0).equal(kept)


def test_attention_or_mlp_alone_saves_its_own_half() -> None:
    """Router-Tuning and SkipGPT: the site decides; with both, each has a router of its own."""
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    routed = {"name": "mixture_of_depths", "layers": [1], "capacity": 0.25}
    on = {site: {**routed, "on": site} for site in ("attention", "mlp")}
    shares, caches = {}, {}
    for name, entries in {**{site: [entry] for site, entry in on.items()}, "both": list(on.values())}.items():
        model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, mechanisms=entries))
        cost = model.cost(64, routing="oracle")
        kinds = ("attention_linear", "attention_score", "mlp")
        shares[name] = [getattr(cost.forward, kind) / getattr(cost.dense.forward, kind) for kind in kinds]
        caches[name] = cost.kv_bytes_per_token / cost.dense.kv_bytes_per_token
        assert len({id(m.router.weight) for m in model.routing_modules()}) == len(entries)
    assert shares == {
        "attention": [0.625, (1 + 0.25**2) / 2, 1],
        "mlp": [1, 1, 0.625],
        "both": [0.625, (1 + 0.25**2) / 2, 0.625],
    }
    assert caches == {"attention": 0.625, "mlp": 1, "both": 0.625}


def test_full_kv_keeps_the_cache_and_saves_queries_and_mlp() -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    routed = {"name": "mixture_of_depths", "layers": [0], "capacity": 0.25, "kv": "full"}
    cost = SkipstoneForCausalLM(SkipstoneConfig(**sizes, mechanisms=[routed])).cost(64)
    shares = {
        kind: getattr(cost.forward, kind) / getattr(cost.dense.forward, kind) for kind in ("mlp", "attention_score")
    }
    assert shares == {"mlp": 0.25, "attention_score": 0.25}
    assert cost.forward.attention_linear / cost.dense.forward.attention_linear == (1 + 0.25) / 2
    assert cost.kv_bytes_per_token == cost.dense.kv_bytes_per_token


def test_the_low_rank_skip_path_serves_skipped_tokens_only() -> None:
    layer, x = (
        MixtureOfDepths(D, capacity=0.5, decision="positional", skip="low_rank", skip_rank=3),
        torch.randn(2, T, D),
    )
    real = torch.arange(T)[None] >= torch.tensor([[0], [5]])
    plain = MixtureOfDepths(D, capacity=0.5, decision="positional")
    plain.load_state_dict(layer.state_dict(), strict=False)
    given = tokens(real_BT=real)
    assert torch.equal(layer(triple, x, given)[0], plain(triple, x, given)[0])  # neutral at the start
    torch.nn.init.normal_(layer.skip.up_weight)
    delta, records = layer(triple, x, given)
    skipped = real & ~records[NAME].kept_BT
    guess = x @ layer.skip.down_weight.T @ layer.skip.up_weight.T
    expected = plain(triple, x, given)[0] + torch.where(skipped[..., None], guess, 0.0)
    torch.testing.assert_close(delta, expected)
    assert (delta[~real] == 0).all()
    assert layer.skip.down_weight.shape == (3, D)
    assert layer.flops(10, "causal") == plain.flops(10, "causal") + 2 * 10 * 2 * 3 * D


def test_the_skip_path_obeys_outer_gates() -> None:
    """A gate around it scales and skips what it says, as it does everything inside."""
    layer, x = MixtureOfDepths(D, capacity=0.5, decision="positional", skip="low_rank"), torch.randn(2, T, D)
    torch.nn.init.normal_(layer.skip.up_weight)
    gain, wanted = torch.rand(2, T), torch.rand(2, T) < 0.5
    whole = layer(triple, x, tokens("causal"))[0]
    scaled = layer(triple, x, tokens("causal").scaled(gain))[0]
    torch.testing.assert_close(scaled, whole * gain[..., None])
    asked = layer(triple, x, tokens("causal").restrict_queries(wanted))[0]
    torch.testing.assert_close(asked, torch.where(wanted[..., None], whole, 0.0))


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_gate_skip_is_its_equation(kind: Any) -> None:
    layer, x = GateSkip(D, Placement(count=4, name="gate"), gate=kind, sparsity_weight=0.2), torch.randn(2, T, D)
    g = torch.sigmoid(x @ layer.router.weight.T + layer.router.score_bias)
    assert g.shape[-1] == (D if kind == "channel" else 1)
    delta, records = layer(triple, x, tokens())
    record = records["gate"]
    torch.testing.assert_close(delta, 3 * x * g)
    torch.testing.assert_close(record.loss_BT, g.mean(-1) * 0.2 / 4)
    torch.testing.assert_close(record.score_BT.sigmoid(), g.mean(-1))
    assert record.kept_BT.all()
    assert g.min() > 0.95  # gates start open


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_gate_skip_leaves_out_its_budget_of_the_lowest_gates(kind: Any) -> None:
    layer, x = GateSkip(D, capacity=0.75, gate=kind, start_bias=0.0), torch.randn(50, T, D)
    assert "never advanced" in layer.not_ready_reason()
    record = layer(triple, x, tokens())[1]["GateSkip"]
    layer.advance(0.5, layer.statistics(record))
    assert layer.not_ready_reason() is None
    delta, records = layer(triple, x, tokens("causal"))
    kept = records["GateSkip"].kept_BT
    assert kept.float().mean() == pytest.approx(0.75, abs=0.01)
    assert record.weight_BT[kept].min() > record.weight_BT[~kept].max()
    assert (delta[~kept] == 0).all()
    soft = GateSkip(D, capacity=0.75, gate=kind, execution="soft")
    assert soft(triple, x, tokens("causal"))[1]["GateSkip"].kept_BT.all()
    assert soft.not_ready_reason() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, r"capacity must be in \(0, 1\], got 0"),
        ({"gate": "chanel"}, "unknown gate 'chanel'; did you mean 'channel'"),
        ({"sparsity_weight": -1}, "sparsity_weight must not be negative, got -1"),
    ],
)
def test_wrong_gates_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateSkip(D, **options)
