"""Mechanisms without a block: the equations of their papers, their options, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.core.records import Records
from skipstone.core.tokens import PassMode, Tokens
from skipstone.mechanisms import DEPTH, EarlyExit, MixtureOfDepths, Placement, PolyGLU, TokenSelective
from skipstone.mechanisms.polyglu import NUM_ACTIVATIONS
from skipstone.mechanisms.routers import LinearRouter, MLPRouter

D, T = 16, 12


def tokens(routing: str = "oracle", T: int = T, **more: Any) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(routing=routing), **more)


def double(x: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
    """An update that is easy to follow: twice the input, by the gain, for those that are wanted."""
    delta = 2 * x if tokens.gain_BT is None else 2 * x * tokens.gain_BT[..., None]
    return (delta if tokens.queries is None else tokens.queries.scatter(tokens.queries.gather(delta))), {}


@pytest.mark.parametrize("weight", ["raw", "sigmoid", "tanh", "none"])
def test_mixture_of_depths_weighs_the_update(weight: str) -> None:
    layer, x = (
        MixtureOfDepths(D, capacity=0.25, decision="topk", weight=weight, guidance=False, router_norm=False),
        torch.randn(2, T, D),
    )
    if weight == "tanh":
        torch.nn.init.constant_(layer.tanh_scale, 0.5)
    delta, records = layer(double, x, tokens())
    record = records["MixtureOfDepths"]
    r = x @ layer.router.weight[0]
    torch.testing.assert_close(record.score_BT, r)
    assert torch.equal(record.kept_BT, r >= r.topk(3).values[:, -1:])
    factor = {"raw": r, "sigmoid": r.sigmoid(), "tanh": 1 + 0.5 * r.tanh(), "none": torch.ones_like(r)}[weight]
    torch.testing.assert_close(delta, 2 * x * (factor * record.kept_BT)[..., None])


def test_token_selective_gates_by_one_minus_p() -> None:
    layer, x = TokenSelective(D, Placement(count=4, name="tsa"), depth_weight=0.2), torch.randn(2, T, D)
    hidden = torch.relu(x @ layer.router.hidden_weight.T + layer.router.hidden_bias)
    p = torch.sigmoid(hidden @ layer.router.weight[0] + layer.router.score_bias)
    delta, records = layer(double, x, tokens())
    torch.testing.assert_close(delta, 2 * x * (1 - p)[..., None])
    torch.testing.assert_close(records["tsa"].loss_BT, (1 - p) * 0.2 / 4)
    assert records["tsa"].kept_BT.all()


@pytest.mark.parametrize("hard_gain", ["gate", "one"])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_token_selective_executed_hard(hard_gain: str, threshold: float) -> None:
    layer = TokenSelective(D, start_bias=-0.5, threshold=threshold, hard_gain=hard_gain)
    x = torch.randn(2, T, D) * 3
    record = layer(double, x, tokens("oracle"))[1]["TokenSelective"]
    p = 1 - record.weight_BT
    delta, records = layer(double, x, tokens("causal"))
    kept = p < threshold
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(records["TokenSelective"].kept_BT, kept)
    gain = (1 - p) * kept if hard_gain == "gate" else kept.float()
    torch.testing.assert_close(delta, 2 * x * gain[..., None])
    torch.testing.assert_close(records["TokenSelective"].weight_BT, gain)


def test_early_exit_multiplies_survival() -> None:
    layer, x = EarlyExit(D, Placement(name="exit", count=2), threshold=0.4, depth_weight=0.1), torch.randn(2, T, D)
    assert (layer.initial_state(x)["exit"] == 1).all()
    before = torch.rand(2, T)
    s = before * torch.sigmoid(x @ layer.router.weight[0] + layer.router.score_bias)
    delta, records = layer(double, x, tokens("causal", state={"exit": before}))
    record = records["exit"]
    torch.testing.assert_close(record.carry["exit"], s)
    assert torch.equal(record.kept_BT, s > 0.4)
    torch.testing.assert_close(delta, 2 * x * (s * (s > 0.4))[..., None])
    torch.testing.assert_close(record.loss_BT, s * 0.1 / 2)
    delta, records = layer(double, x, tokens("oracle", state={"exit": before}))
    torch.testing.assert_close(delta, 2 * x * s[..., None])
    assert records["exit"].kept_BT.all()


@pytest.mark.parametrize("kind", [TokenSelective, EarlyExit])
def test_soft_execution_never_skips(kind: type[TokenSelective] | type[EarlyExit]) -> None:
    layer, x = kind(D, execution="soft", start_bias=0.0), torch.randn(2, T, D)
    results = [layer(double, x, tokens(routing))[0] for routing in ("oracle", "causal")]
    assert torch.equal(*results)


def test_papers_defaults() -> None:
    """Token-Selective Attention: hidden width max(d / 4, 16), last bias -1, lambda .001. MoD: capacity 1/8."""
    assert TokenSelective(128).router.hidden_weight.shape == (32, 128)
    assert TokenSelective(32).router.hidden_weight.shape == (16, 32)
    assert TokenSelective(256).router.flops(1) > 0
    assert sum(p.numel() for p in TokenSelective(256).parameters()) == 16_513
    assert TokenSelective(32).router.score_bias.item() == -1
    assert TokenSelective(32).config.depth_weight == 0.001
    assert MixtureOfDepths(32).config.capacity == 0.125
    assert EarlyExit(32).router.score_bias.item() == 3


@pytest.mark.parametrize("router", [LinearRouter(D, 0.0), MLPRouter(D, 8)], ids=["linear", "mlp"])
def test_routers_compute_in_fp32(router: LinearRouter | MLPRouter) -> None:
    x = torch.randn(2, T, D)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x), expected)
    low = router.bfloat16()(x.bfloat16())
    assert low.dtype == torch.float32
    assert (low - expected).abs().max() < 0.1
    assert not any(isinstance(m, torch.nn.Linear) for m in router.modules())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixture_of_depths", {"capacity": 0}, r"capacity must be in \(0, 1\], got 0"),
        ("mixture_of_depths", {"capacity": 1.5}, r"capacity must be in \(0, 1\], got 1.5"),
        ("mixture_of_depths", {"capacity": float("nan")}, r"capacity must be in \(0, 1\], got nan"),
        ("mixture_of_depths", {"decision": "treshold"}, "unknown decision 'treshold'; did you mean 'threshold'"),
        ("mixture_of_depths", {"weight": "rwa"}, "unknown weight 'rwa'; did you mean 'raw'"),
        ("mixture_of_depths", {"auxiliary_weight": -1}, "auxiliary_weight must not be negative, got -1"),
        ("token_selective", {"threshold": 1.0}, r"threshold must be in \(0, 1\), got 1.0"),
        ("token_selective", {"router_width": 0}, "router_width must be at least 1, got 0"),
        ("token_selective", {"execution": "hrad"}, "unknown execution 'hrad'; did you mean 'hard'"),
        ("token_selective", {"depth_weight": -0.1}, "depth_weight must not be negative, got -0.1"),
        ("early_exit", {"threshold": 0}, r"threshold must be in \(0, 1\), got 0"),
        ("early_exit", {"depth_weight": -0.1}, "depth_weight must not be negative, got -0.1"),
        ("early_exit", {"start_bais": 1}, "unknown key in EarlyExitConfig 'start_bais'; did you mean 'start_bias'"),
    ],
)
def test_wrong_options_are_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        DEPTH[name](D, **options)
    assert "\n" not in str(error.value)


def polyglu(**options: Any) -> PolyGLU:
    torch.manual_seed(0)
    layer = PolyGLU(D, 6, Placement(name="polyglu"), **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("context", ["running_mean", "sequence"])
def test_polyglu_is_its_equation(context: str) -> None:
    layer, gate, x = polyglu(context=context, tau_start=0.7), torch.randn(2, T, 6), torch.randn(2, T, D)
    mean = x.mean(1, keepdim=True) if context == "sequence" else x.cumsum(1) / torch.arange(1, T + 1)[:, None]
    hidden = torch.relu(mean @ layer.context_weight.T + layer.context_bias)
    dynamic = layer.scale * (hidden @ layer.mix_weight.T + layer.mix_bias)
    share = ((layer.preference_bias + dynamic[:, :, None]) / 0.7).softmax(-1)
    acts = torch.stack([gate.relu(), gate.tanh(), torch.nn.functional.silu(gate), torch.nn.functional.gelu(gate)], -1)
    y, records = layer(gate, x, tokens())
    torch.testing.assert_close(y, (share * acts).sum(-1))
    torch.testing.assert_close(records["polyglu"].logits_BTA, dynamic)
    torch.testing.assert_close(layer.shares(records["polyglu"]), share.mean(2))
    entropy = -(share * share.log()).sum(-1).mean(2) / torch.tensor(4.0).log()
    torch.testing.assert_close(layer.entropy(records["polyglu"]), entropy)


@pytest.mark.parametrize("context", ["running_mean", "sequence"])
def test_polyglu_means_stay_in_their_document_and_skip_padding(context: str) -> None:
    layer, gate, x = polyglu(context=context), torch.randn(1, T, 6), torch.randn(1, T, D)
    document, real = torch.tensor([[0] * 5 + [1] * 7]), torch.tensor([[False] * 2 + [True] * 10])
    y, _ = layer(gate, x, tokens(document_BT=document, real_BT=real))
    for a, b in [(2, 5), (5, 12)]:
        alone, _ = layer(gate[:, a:b], x[:, a:b], tokens(T=b - a))
        torch.testing.assert_close(y[:, a:b], alone)


def test_polyglu_noise_is_gumbel_of_each_row_and_neuron() -> None:
    layer = polyglu()
    torch.manual_seed(0)
    noise = layer._gumbel(500, tokens())
    assert noise.shape == (500, 6, NUM_ACTIVATIONS)
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(torch.pi**2 / 6, abs=0.1)
    gate, x = torch.randn(1, T, 6).expand(2, -1, -1), torch.randn(1, T, D).expand(2, -1, -1)
    noisy = Tokens(slot_BT=torch.arange(T)[None], position_BT=torch.arange(T)[None], mode=PassMode(noise=True))
    first, second = layer(gate, x, noisy)[0]
    assert not torch.allclose(first, second)
    quiet = polyglu(noise=False)
    assert torch.equal(quiet(gate, x, noisy)[0], quiet(gate, x, tokens())[0])


def test_polyglu_anneals_tau_in_a_straight_line() -> None:
    """max(0.1, 1 - 0.9 * step / total)."""
    layer, seen = PolyGLU(D, 6), []
    for progress in (-1, 0, 0.5, 1, 2):
        layer.advance(progress, None)
        seen.append(round(layer.tau.item(), 6))
    assert seen == [1, 1, 0.55, 0.1, 0.1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_end": 0}, r"tau_end must be in \(0, tau_start = 1.0\], got 0"),
        ({"tau_end": 2}, r"tau_end must be in \(0, tau_start = 1.0\], got 2"),
        ({"router_width": 0}, "router_width must be at least 1, got 0"),
        ({"context": "runing_mean"}, "unknown context 'runing_mean'; did you mean 'running_mean'"),
        ({"noies": True}, "unknown key in PolyGLUConfig 'noies'; did you mean 'noise'"),
    ],
)
def test_polyglu_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolyGLU(D, 6, **options)


def test_every_name_of_the_tables_says_where_it_comes_from() -> None:
    import sys

    for kind in DEPTH.values():
        assert "arXiv" in (sys.modules[kind.__module__].__doc__ or "")
        assert kind.Config.__doc__
