"""PolyGLU's causal contexts agree with their definitions, and preferences have a scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mechanisms.test_mechanisms import D, T, polyglu, tokens
from skipstone import SkipstoneConfig
from skipstone.mechanisms.contexts import Memory, chunk_mean, exponential_mean, running_mean


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "exponental_mean"}, "unknown context 'exponental_mean'; did you mean 'exponential_mean'"),
        ({"context": "exponential_mean", "decay": 1.0}, r"decay must be in \(0, 1\), got 1.0"),
        ({"context": "chunk", "chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"decay": 0.5}, "decay applies to context 'exponential_mean' only, got context 'running_mean'"),
        ({"context": "token", "chunk_size": 8}, "chunk_size applies to context 'chunk' only"),
        ({"preference_scale": 0}, "preference_scale must be above 0, got 0"),
        ({"price": -0.5}, "price must not be negative, got -0.5"),
    ],
)
def test_wrong_options_of_polyglu_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        polyglu(**options)
    assert "\n" not in str(error.value)


def naive_mean(x_TD: Tensor, context: str) -> Tensor:
    """Of decay .8 and chunks of 5, token by token."""
    means = []
    for t in range(len(x_TD)):
        if context == "chunk":
            seen, weight = x_TD[: t // 5 * 5], torch.ones(t // 5 * 5)
        else:
            seen, weight = (
                x_TD[: t + 1],
                0.8 ** torch.arange(t, -1, -1) if context != "token" else torch.arange(t + 1) == t,
            )
        means.append((weight[:, None] * seen).sum(0) / weight.sum().clamp(min=1))
    return torch.stack(means)


CONTEXTS = {"exponential_mean": {"decay": 0.8}, "token": {}, "chunk": {"chunk_size": 5}}


@pytest.mark.parametrize("context", CONTEXTS)
def test_causal_contexts_are_their_definition_in_documents_and_padding(context: str) -> None:
    layer, gate, x = polyglu(context=context, **CONTEXTS[context]), torch.randn(1, 31, 6), torch.randn(1, 31, D)
    document, real = torch.tensor([[0] * 12 + [1] * 19]), torch.rand(1, 31) < 0.7
    real[0, [0, 12]] = False
    _, records = layer(gate, x, tokens(T=31, document_BT=document, real_BT=real))
    for a, b in [(0, 12), (12, 31)]:
        kept = real[0, a:b]
        hidden = torch.relu(naive_mean(x[0, a:b][kept], context) @ layer.context_weight.T + layer.context_bias)
        expected = layer.scale * (hidden @ layer.mix_weight.T + layer.mix_bias)
        torch.testing.assert_close(records["polyglu"].logits_BTA[0, a:b][kept], expected)


@pytest.mark.parametrize("context", ["running_mean", *CONTEXTS])
def test_causal_contexts_are_exact_over_long_rows(context: str) -> None:
    """In fp32, beside the same in fp64."""
    x = torch.randn(1, 3000, D) + 1
    seen = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        past = {"running_mean": running_mean, "token": lambda z, *_: z}
        means = {**past, "exponential_mean": exponential_mean, "chunk": chunk_mean}
        options = list(CONTEXTS.get(context, {}).values())
        one = tokens(T=3000)
        seen.append(means[context](x.to(dtype), one, Memory(one, None, ""), *options))
    torch.testing.assert_close(seen[0].double(), seen[1], rtol=1e-5, atol=1e-5)


def test_a_preference_scale_multiplies_preferences_and_their_gradients() -> None:
    plain, scaled = polyglu(), polyglu(preference_scale=4.0)
    scaled.preference_bias.data /= 4
    gate, x, gradients = torch.randn(2, T, 6), torch.randn(2, T, D), []
    for layer in (plain, scaled):
        y, _ = layer(gate, x, tokens())
        y.square().sum().backward()
        gradients.append(layer.preference_bias.grad)
    torch.testing.assert_close(plain(gate, x, tokens())[0], scaled(gate, x, tokens())[0])
    torch.testing.assert_close(4 * gradients[0], gradients[1])
    scaled.set_identity()
    assert scaled(gate, x, tokens())[1]["polyglu"].logits_BTA.abs().max() == 0
    torch.testing.assert_close(
        scaled.shares(scaled(gate, x, tokens())[1]["polyglu"])[..., 2].min().item(), 1.0, atol=1e-3, rtol=0
    )


def test_the_price_is_the_expected_share_of_neurons_that_are_on() -> None:
    layer, gate, x = polyglu(price=0.3, tau_start=0.8, noise=False), torch.randn(2, T, 6), torch.randn(2, T, D)
    real = torch.rand(2, T) < 0.7
    _, records = layer(gate, x, tokens(real_BT=real))
    record = records["polyglu"]
    off = torch.stack([(gate[..., f][real] <= 0).float().mean() for f in range(6)])
    relu = ((layer.preference_bias + record.logits_BTA[real].mean(0)) / 0.8).softmax(-1)[:, 0]
    expected = 0.3 * (1 - relu * off).mean()
    torch.testing.assert_close(record.loss_BT, torch.where(real, expected, torch.zeros(())))
    assert layer.has_auxiliary_loss
    assert layer.eval()(gate, x, tokens(real_BT=real))[1]["polyglu"].loss_BT is None
    assert polyglu()(gate, x, tokens())[1]["polyglu"].loss_BT is None


def test_the_price_moves_neurons_with_negative_gates_to_relu_most() -> None:
    layer, x = polyglu(price=1.0, noise=False), torch.randn(1, T, D)
    layer.set_identity()
    gate = torch.linspace(-1, 1, 6).expand(1, T, 6) + 0.0  # the first three are never positive
    layer(gate, x, tokens())[1]["polyglu"].loss_BT.mean().backward()
    towards_relu = -layer.preference_bias.grad[:, 0]
    assert (towards_relu[:3] > 0).all()
    assert towards_relu[3:].abs().max() == 0


def test_a_price_is_refused_with_neuron_groups() -> None:
    with pytest.raises(ValueError, match=r"activation.price .* cannot be combined with neuron_groups, got 0.1"):
        SkipstoneConfig(activation={"name": "polyglu", "price": 0.1}, neuron_groups={"capacity": 0.5})
