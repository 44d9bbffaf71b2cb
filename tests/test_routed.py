"""`Routed` around foreign blocks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from skipstone import EarlyExit, MixtureOfDepths, Routed, TokenSelective


class NanoBlock(nn.Module):
    """A residual block as people write it: causal attention and an MLP, no word of routing."""

    def __init__(self, width: int, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("causal", [True, False], ids=["nanogpt", "vit"])
def test_block_computes_only_what_is_kept(causal: bool) -> None:
    routed = Routed(NanoBlock(16, causal), MixtureOfDepths(16, capacity=0.25, decision="topk"))
    x = torch.randn(3, 20, 16)
    y, records = routed(x, return_records=True)
    kept = records["MixtureOfDepths"].kept_BT
    assert routed.block.seen == [5]
    assert kept.sum(1).tolist() == [5, 5, 5]
    assert torch.equal(y[~kept], x[~kept])
    expected = torch.stack([row[keep] for row, keep in zip(x, kept, strict=True)])
    weight = torch.stack([w[keep] for w, keep in zip(records["MixtureOfDepths"].weight_BT, kept, strict=True)])
    delta = (routed.block(expected) - expected) * weight[..., None]
    torch.testing.assert_close(y[kept], (expected + delta).flatten(0, 1))


def test_neutral_mechanisms_leave_the_block_as_it_is() -> None:
    block = NanoBlock(16)
    mechanisms = [MixtureOfDepths(16), TokenSelective(16), EarlyExit(16)]
    for mechanism in mechanisms:
        mechanism.set_identity()
    x = torch.randn(2, 9, 16)
    for routing in ("oracle", "causal"):
        torch.testing.assert_close(Routed(block, *mechanisms)(x, routing=routing), block(x), rtol=1e-3, atol=1e-3)


def test_causal_routing_does_not_look_ahead() -> None:
    routed = Routed(NanoBlock(16), MixtureOfDepths(16, capacity=0.5, decision="threshold")).eval()
    x = torch.randn(2, 11, 16)
    other = x.clone()
    other[:, 7:] = torch.randn(2, 4, 16)
    y, records = routed(x, return_records=True)
    assert 0 < records["MixtureOfDepths"].kept_BT[:, :7].float().mean() < 1
    torch.testing.assert_close(routed(other)[:, :7], y[:, :7])


def test_gradients_reach_router_and_block() -> None:
    routed = Routed(
        NanoBlock(16), MixtureOfDepths(16, capacity=0.5, decision="predictor", weight="raw"), TokenSelective(16)
    )
    routed(torch.randn(2, 8, 16)).square().sum().backward()
    silent = [n for n, p in routed.named_parameters() if p.grad is None or not p.grad.norm() > 0]
    assert all(".decision." in name for name in silent)  # the predictor learns from its own loss only


def test_mistyped_option_and_routing_are_one_line() -> None:
    with pytest.raises(ValueError, match="did you mean 'capacity'"):
        MixtureOfDepths(16, capcity=0.5)
    with pytest.raises(ValueError, match="unknown routing 'orcale'; did you mean 'oracle'"):
        Routed(NanoBlock(16), MixtureOfDepths(16))(torch.randn(1, 4, 16), routing="orcale")
    with pytest.raises(ValueError, match=r"takes a stream of shape \[rows, tokens, width\], got \[4, 16\]"):
        Routed(NanoBlock(16), MixtureOfDepths(16))(torch.randn(4, 16))


class Positioned(nn.Module):
    """A block that takes an argument of every token, a table in a tuple, and one that is no token's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, position: Tensor, *, table: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
        return x + self.linear(x) * position[..., None] + table[0] * scale - table[1]


MECHANISMS = {
    "top-k": lambda: MixtureOfDepths(16, capacity=0.5, decision="topk", weight="none"),
    "threshold": lambda: MixtureOfDepths(16, capacity=0.5, decision="threshold", weight="none"),
    "gate": lambda: TokenSelective(16, start_bias=0.0),
    "exit": lambda: EarlyExit(16),
}


ROUTING = {"top-k": "oracle"}  # the others decide causally


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("rows", [1, 3], ids=["shared table", "a table a row"])
def test_arguments_of_every_token_follow_the_tokens(name: str, rows: int) -> None:
    block, mechanism = Positioned(16), MECHANISMS[name]()
    x, position, scale = torch.randn(3, 12, 16), torch.rand(3, 12), torch.tensor(2.0)
    table = (torch.randn(rows, 12, 16), torch.randn(rows, 12, 16))
    routed = Routed(block, mechanism).eval()
    y, records = routed(x, position, table=table, scale=scale, routing=ROUTING.get(name), return_records=True)
    record = next(iter(records.values()))
    whole = block(x, position, table=table, scale=scale) - x
    factor = record.weight_BT if record.weight_BT is not None else torch.ones(3, 12)
    expected = torch.where(record.kept_BT[..., None], x + whole * factor[..., None], x)
    assert 0 < record.kept_BT.sum() <= record.kept_BT.numel()
    torch.testing.assert_close(y, expected)


def test_a_mask_of_pairs_is_gathered_on_both_sides() -> None:
    from skipstone.nn.routed import arguments_of

    index_BK = torch.tensor([[0, 2, 5], [1, 3, 4]])
    mask = torch.randn(2, 1, 6, 6)
    (found,) = arguments_of(index_BK, torch.Size([2, 6]), (mask,))
    for b in range(2):
        assert torch.equal(found[b, 0], mask[b, 0][index_BK[b]][:, index_BK[b]])


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_layer_of_transformers_computes_inside_what_it_computes_outside(name: str) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    layer, x = LlamaDecoderLayer(config, 0).eval(), torch.randn(2, 10, 16)
    table = LlamaRotaryEmbedding(config)(x, torch.arange(10)[None])
    routed = Routed(layer, MECHANISMS[name]()).eval()
    y, records = routed(x, position_embeddings=table, routing=ROUTING.get(name), return_records=True)
    record = next(iter(records.values()))
    for b in range(2):
        kept = record.kept_BT[b]
        part = tuple(t[:, kept] for t in table)
        inside = layer(x[b : b + 1, kept], position_embeddings=part) - x[b : b + 1, kept]
        factor = 1.0 if record.weight_BT is None else record.weight_BT[b, kept][:, None]
        torch.testing.assert_close(y[b, kept], x[b, kept] + inside[0] * factor)
        assert torch.equal(y[b, ~kept], x[b, ~kept])


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_causal_mask_says_what_is_causal_without_one(additive: bool) -> None:
    """Rows keep different numbers of tokens, so that some are filled up by tokens that no query may see."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    routed = Routed(LlamaDecoderLayer(config, 0), MixtureOfDepths(16, capacity=0.5, decision="threshold")).eval()
    x = torch.randn(3, 12, 16)
    table = LlamaRotaryEmbedding(config)(x, torch.arange(12)[None])
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    given = torch.zeros(1, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    y, records = routed(x, position_embeddings=table, return_records=True)
    assert len(set(records["MixtureOfDepths"].kept_BT.sum(1).tolist())) > 1
    torch.testing.assert_close(routed(x, position_embeddings=table, attention_mask=given), y)


def test_a_block_that_returns_a_tuple_keeps_the_rest() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x * 2, "kept"

    y, word = Routed(Pair(), MixtureOfDepths(16, capacity=0.5, decision="topk"))(torch.randn(2, 8, 16))
    assert y.shape == (2, 8, 16)
    assert word == "kept"


class Scaled(nn.Module):
    """A block that multiplies its update by numbers of its tokens, [B, K], which it finds in its arguments."""

    def __init__(self, found: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.found = nn.Linear(16, 16), found

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.linear(x) * self.found(*args, **kwargs)[..., None]


class Pair(NamedTuple):
    first: Tensor
    second: int


T = 12
BY_TOKEN: dict[str, tuple[Callable[..., Tensor], Callable[[], Any]]] = {
    "[B, T]": (lambda a: a, lambda: torch.rand(2, T)),
    "[1, T]": (lambda a: a, lambda: torch.rand(1, T)),
    "[B, T, H, E]": (lambda a: a.mean((2, 3)), lambda: torch.rand(2, T, 4, 8)),
    "[B, H, T, E]": (lambda a: a.mean((1, 3)), lambda: torch.rand(2, 4, T, 8)),
    "[1, 1, T, E]": (lambda a: a.mean((1, 3)), lambda: torch.rand(1, 1, T, 8)),
    "[3, B, T]": (lambda a: a.mean(0), lambda: torch.rand(3, 2, T)),
    "[3, 1, T, E]": (lambda a: a.mean((0, 3)), lambda: torch.rand(3, 1, T, 8)),
    "complex [1, T, E]": (lambda a: a.real.mean(2), lambda: torch.polar(torch.ones(1, T, 8), torch.rand(1, T, 8))),
    "named tuple": (lambda a: a.first * a.second, lambda: Pair(torch.rand(2, T), 3)),
    "list in dict": (lambda a: a["x"][0], lambda: {"x": [torch.rand(2, T), None]}),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("form", BY_TOKEN)
def test_tensors_by_token_are_gathered_in_every_form(form: str, named: bool) -> None:
    found, made = BY_TOKEN[form]
    block, given = Scaled(found), made()
    routed = Routed(block, MixtureOfDepths(16, capacity=0.5, decision="topk", weight="none"))
    x, args, kwargs = torch.randn(2, T, 16), () if named else (given,), {"a": given} if named else {}
    y, records = routed(x, *args, return_records=True, **kwargs)
    kept = records["MixtureOfDepths"].kept_BT
    torch.testing.assert_close(y[kept], block(x, *args, **kwargs)[kept])
    assert torch.equal(y[~kept], x[~kept])


@pytest.mark.parametrize(
    "given", [torch.rand(T, 16), torch.rand(T), SimpleNamespace(a=torch.rand(2, T))], ids=["[T, D]", "[T]", "object"]
)
def test_what_cannot_be_gathered_is_one_line(given: Any) -> None:
    block = Scaled(lambda a: a.a if isinstance(a, SimpleNamespace) else a.reshape(1, T, -1).mean(2))
    routed = Routed(block, MixtureOfDepths(16, capacity=0.5, decision="topk"))
    with pytest.raises(ValueError, match=r"the block failed for some of 12 tokens, .* shape \[.*12.*\] that was not"):
        routed(torch.randn(2, T, 16), given)


def test_a_block_of_another_shape_is_one_line() -> None:
    routed = Routed(nn.Linear(16, 8), MixtureOfDepths(16, capacity=0.5, decision="topk"))
    with pytest.raises(ValueError, match=r"must return a stream of its input's shape \[2, 4, 16\].* got \[2, 4, 8\]"):
        routed(torch.randn(2, 8, 16))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Routed(3, MixtureOfDepths(16)), "wraps a block that maps a stream to a stream, got int"),
        (lambda: Routed(nn.Linear(16, 16), None), r"takes depth mechanisms such as .*, got NoneType"),
        (lambda: Routed(nn.Linear(16, 16), nn.Linear(16, 16)), "takes depth mechanisms such as .*, got Linear"),
        (lambda: MixtureOfDepths(0), "hidden_size must be a whole number of at least 1, got 0"),
        (lambda: MixtureOfDepths("16"), "hidden_size must be a whole number of at least 1, got '16'"),
        (
            lambda: Routed(nn.Linear(16, 16), MixtureOfDepths(15))(torch.randn(2, 8, 16)),
            "has hidden_size 15, but .* 16",
        ),
        (lambda: Routed(nn.Linear(16, 16), MixtureOfDepths(16))(torch.ones(2, 8, 16).long()), "floating-point numbers"),
        (lambda: Routed(nn.Linear(16, 16), MixtureOfDepths(16))("x"), r"shape \[rows, tokens, width\], got str"),
    ],
)
def test_mistakes_are_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
