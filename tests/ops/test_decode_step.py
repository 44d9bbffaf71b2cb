"""The compiled operations of a decoding step equal torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.nn.positions import Rotary
from skipstone.ops import decode_stack, decode_step, reference

pytest.importorskip("numba")


def test_a_numba_that_refuses_numpy_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("Numba needs NumPy 2.3 or less")

    monkeypatch.setattr(decode_step, "import_module", refuse)
    assert not decode_step._installed.__wrapped__()
    monkeypatch.undo()
    assert decode_step._installed.__wrapped__()


@torch.no_grad()
def test_norm_equals_torch() -> None:
    x, weight = torch.randn(2, 3, 20) * 4, torch.randn(20)
    assert decode_step.takes(x, weight)
    torch.testing.assert_close(decode_step.rms_norm(x, weight, 1e-5), F.rms_norm(x, (20,), weight, 1e-5))


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize(
    ("column", "H", "G", "E"), [(0, 6, 2, 8), (1, 6, 2, 24), (37, 6, 2, 8), (38, 5, 1, 40), (40, 4, 4, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_attention_equals_torch(column: int, H: int, G: int, E: int, rotated: bool, dtype: torch.dtype) -> None:
    """Grouped heads; columns behind the newest hold NaN and must not be read."""
    query, key, value = torch.randn(1, 1, H * E) * 5, torch.randn(1, 1, G * E) * 5, torch.randn(1, 1, G * E)
    config = SkipstoneConfig(vocab_size=8, hidden_size=H * E, num_attention_heads=H, num_hidden_layers=1)
    rotary = Rotary(config)(torch.tensor([[column + 3]]), torch.float32) if rotated else None
    stored = {name: torch.full((1, column + 2, G, E), torch.nan, dtype=dtype) for name in ("key", "value")}
    for x in stored.values():
        x[:, :column] = torch.randn(1, column, G, E) * 3
    stored["slot"] = torch.zeros(1, column + 2, dtype=torch.long)
    assert decode_step.extends(stored["key"])
    y = decode_step.attend_newest(query, key, value, rotary, stored, torch.tensor([[9]]), column, 0.3)

    def heads(x: Tensor) -> Tensor:
        x_BHTE = x.unflatten(-1, (-1, E)).transpose(1, 2)
        return x_BHTE if rotary is None else reference.rotate(x_BHTE, *rotary)

    seen = {name: x[:, : column + 1].transpose(1, 2) for name, x in stored.items() if name != "slot"}
    torch.testing.assert_close(seen["key"][:, :, -1:], heads(key).to(dtype))
    assert torch.equal(seen["value"][:, :, -1].flatten(), value.flatten().to(dtype))
    assert stored["slot"][0].tolist() == [0] * column + [9, 0]
    q, k, v = (x.double() for x in (heads(query), seen["key"], seen["value"]))  # torch's own sums in fp32 lose more
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True).float()
    torch.testing.assert_close(y, expected.transpose(1, 2).flatten(2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_halves_are_rounded_as_torch_does() -> None:
    """Ties to even, numbers below 2^-14, and what fp16 cannot hold, which becomes its largest number; NaN stays NaN."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()].float()
    between = (every.sort().values[1:] + every.sort().values[:-1]) / 2
    large = torch.tensor([65504.0, 65519.0, 65520.0, 1e6, 3e38, torch.inf, 1e-9, 2.0**-25, 0.0, torch.nan])
    numbers = torch.cat([every, between, between * (1 + 1e-6), between * (1 - 1e-6), large, -large])
    numbers = F.pad(numbers, (0, -len(numbers) % 2))
    stored = {name: torch.zeros(1, 1, 2, len(numbers) // 2, dtype=torch.float16) for name in ("key", "value")}
    stored["slot"] = torch.zeros(1, 1, dtype=torch.long)
    given = numbers[None, None]
    decode_step.attend_newest(given, given, given, None, stored, torch.tensor([[0]]), 0, 1.0)
    want = reference.to_half(numbers)
    for name in ("key", "value"):
        got = stored[name].flatten()
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert torch.equal(got.isnan(), numbers.isnan())
    assert bool((want.abs() <= 65504)[~numbers.isnan()].all())
    small = numbers.abs() < 65504
    assert torch.equal(want[small], numbers[small].half())


@torch.no_grad()
def test_a_nan_stays_a_nan() -> None:
    stored = {"key": torch.ones(1, 2, 1, 4), "value": torch.ones(1, 2, 1, 4), "slot": torch.zeros(1, 2).long()}
    query = torch.tensor([[[1.0, torch.nan, 1.0, 1.0]]])
    y = decode_step.attend_newest(query, query * 0 + 1, query * 0 + 1, None, stored, torch.tensor([[1]]), 1, 1.0)
    assert y.isnan().all()


@pytest.mark.parametrize("inputs", [5, 48, 70, 1100])
def test_products_with_several_tokens_equal_torch(inputs: int) -> None:
    """Rows are read once for 4, 2 or 1 tokens, 32 numbers at a time, the rest one by one, and wide ones in pieces."""
    native = pytest.importorskip("skipstone.ops.decode_products_native")
    weight = torch.randn(7, inputs)
    for tokens in range(1, 10):
        x, y = torch.randn(tokens, inputs), torch.full((tokens, 7), torch.nan)
        places = (weight.data_ptr(), 0, 0, 1, x.data_ptr(), 0, y.data_ptr())
        native.single_rows.ctypes(*places, tokens, 7, inputs, 0, 6)
        torch.testing.assert_close(y[:, :6], x @ weight[:6].T, rtol=1e-5, atol=1e-5)
        assert y[:, 6].isnan().all()


def test_not_taken_where_torch_has_to_see_the_operations() -> None:
    x = torch.ones(4)
    assert not decode_step.takes(x)  # gradients are on
    with torch.no_grad():
        assert decode_step.takes(x)
        assert not decode_step.takes(x, x.bfloat16())
        assert not decode_step.takes(x, x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert not decode_step.takes(x)
        with FlopCounterMode(display=False):
            assert not decode_step.takes(x)


@pytest.mark.parametrize("family", [{"qk_norm": True}, {"positions": "learned", "norm": "layernorm"}, {}])
def test_steps_equal_the_pass_over_the_whole_row(family: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, past the memory that the cache first has, and with as many calls as blocks and steps."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, num_key_value_heads=2, **family)).eval()
    monkeypatch.setattr(decode_stack, "MOST_TOKENS", 0)  # one call for all blocks would take its place
    calls, attend = [], decode_step.attend_newest
    monkeypatch.setattr(decode_step, "attend_newest", lambda *args: calls.append(0) or attend(*args))
    ids, cache = torch.randint(0, 31, (1, 70)), DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(ids).logits[:, 2:]
        model(ids[:, :3], past_key_values=cache)
        steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(3, 70)], dim=1)
    torch.testing.assert_close(steps, whole[:, 1:], rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * 67


@torch.no_grad()
def test_a_part_of_each_head_is_rotated_in_steps_as_in_the_whole_row() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.2}
    model = SkipstoneForCausalLM(SkipstoneConfig(**sizes, rope_parameters=rope)).eval()
    ids, cache = torch.randint(0, 31, (1, 12)), DynamicCache(config=model.config)
    steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(12)], 1)
    torch.testing.assert_close(steps, model(ids).logits, rtol=1e-4, atol=1e-4)
