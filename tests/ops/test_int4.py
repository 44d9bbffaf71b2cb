"""Four-bit weights: packed and restored exactly, and multiplied as they are stored like the restored ones."""

from __future__ import annotations

import pytest
import torch

from skipstone.ops import int4


def packed(outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """Any numbers, with scales and offsets of either sign."""
    made = torch.Generator().manual_seed(seed)
    number = torch.randint(0, 16, (outputs, inputs), generator=made)
    scale, offset = (torch.randn(outputs, inputs // 32, generator=made).half() for _ in range(2))
    return int4.pack(number, scale, offset)


def test_what_is_packed_is_unpacked_and_restored_exactly() -> None:
    made = torch.Generator().manual_seed(0)
    number = torch.randint(0, 16, (3, 192), generator=made).to(torch.uint8)
    scale, offset = (torch.randn(3, 6, generator=made).half() for _ in range(2))
    weight = int4.pack(number, scale, offset)
    assert weight.shape == (3, int4.row_bytes(192)) == (3, 120)
    assert int4.inputs_of(weight) == 192
    for got, given in zip(int4.unpack(weight), (number, scale, offset), strict=True):
        assert torch.equal(got, given)
    by = scale.float().repeat_interleave(32, 1)
    assert torch.equal(int4.restore(weight), number.float() * by + offset.float().repeat_interleave(32, 1))


@pytest.mark.parametrize("outputs", [1, 7, 24])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 9, 65, 128, 259])
@pytest.mark.parametrize("inputs", [64, 192, 576])
def test_few_and_many_tokens_equal_the_restored_weights(tokens: int, outputs: int, inputs: int) -> None:
    weight, x = packed(outputs, inputs), torch.randn(tokens, inputs)
    want = x.double() @ int4.restore(weight, torch.float64).T
    with torch.no_grad():
        error = (int4.linear(x, weight).double() - want).abs().max()
        half = int4.linear(x.bfloat16(), weight)
    # rounding of tokens to int16 and of sums of |x| |w|
    assert error < 2e-5 * (x.double().norm(dim=-1).max() * int4.restore(weight).double().norm(dim=-1).max())
    assert half.dtype == torch.bfloat16
    of_half = x.bfloat16().double() @ int4.restore(weight, torch.float64).T
    assert torch.allclose(half.double(), of_half, rtol=0.02, atol=0.02 * float(of_half.abs().max()))


def test_gradients_reach_the_tokens() -> None:
    weight, x = packed(5, 64), torch.randn(3, 64, requires_grad=True)
    int4.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, int4.restore(weight).sum(0).expand(3, -1), atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tokens_of_any_size(size: float) -> None:
    weight, x = packed(5, 128), torch.randn(2, 128)
    x[0, 3] *= 1e4  # a single large input, as the residual streams of real models have
    with torch.no_grad():
        got = int4.linear(x * size, weight).double() / size
    want = x.double() @ int4.restore(weight, torch.float64).T
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [1, 3])
def test_what_is_not_finite_is_not_hidden_by_rounding(wrong: float, tokens: int) -> None:
    weight, x = packed(5, 128), torch.randn(tokens, 128)
    x[-1, 77] = wrong
    with torch.no_grad():
        y = int4.linear(x, weight)
        nothing = int4.linear(torch.zeros(tokens, 128), weight)
    assert not y[-1].isfinite().any()
    assert y[:-1].isfinite().all()
    assert torch.equal(nothing, torch.zeros(tokens, 5))


def test_any_range_of_rows_is_computed_alone() -> None:
    native = pytest.importorskip("skipstone.ops.int4_native")
    from skipstone.ops.int8_native import round_tokens

    weight, x = packed(13, 192), torch.randn(3, 192)
    rounded, unit = torch.empty(3, 192, dtype=torch.int16), torch.empty(3)
    round_tokens.ctypes(x.data_ptr(), rounded.data_ptr(), unit.data_ptr(), 3, 192)
    bias, shared = torch.randn(13), torch.full((3, 13), float("nan"))
    places = (rounded.data_ptr(), unit.data_ptr(), shared.data_ptr())
    for first, last in ((0, 4), (4, 4), (4, 9), (9, 13)):
        native.four_bit_rows.ctypes(weight.data_ptr(), 0, bias.data_ptr(), 0, *places, 3, 13, 192, first, last)
    assert torch.equal(shared, native.linear(x, weight) + bias)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("tokens", [1, 8, 131])
def test_several_threads_share_the_rows(tokens: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large enough to be shared, with a number of rows that they cannot share evenly."""
    pytest.importorskip("skipstone.ops.int4_native")
    from skipstone.ops import int8_linear_native as native

    weight, x = packed(1537, 128), torch.randn(tokens, 128)
    asked, share = [], native.share
    with torch.no_grad():
        alone = int4.linear(x, weight)
        monkeypatch.setattr(native, "threads", lambda: threads)
        monkeypatch.setattr(native, "share", lambda run, given, parts: asked.append(parts) or share(run, given, parts))
        assert torch.equal(int4.linear(x, weight), alone)
    assert asked == [threads] * -(-tokens // native.PIECE)


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("inputs", [64, 576])
def test_any_number_of_tokens_equals_them_one_by_one(tokens: int, inputs: int) -> None:
    native = pytest.importorskip("skipstone.ops.int4_native")
    weight, x = packed(5, inputs), torch.randn(tokens, inputs)
    alone = torch.cat([native.linear(each[None], weight) for each in x])
    torch.testing.assert_close(native.linear(x, weight), alone, rtol=1e-5, atol=1e-3)


@pytest.mark.slow  # two seconds of compiling; the eight-bit products of `tests/model/test_quantise.py` are quick
def test_integers_are_multiplied_in_pairs() -> None:
    """Products that are not recognised would be computed at a fraction of the speed."""
    native = pytest.importorskip("skipstone.ops.int4_native")
    binding = pytest.importorskip("llvmlite.binding")
    if not binding.get_host_cpu_features().get("avx2"):
        pytest.skip("the names of the instructions are x86's")
    fresh = pytest.importorskip("numba").njit(native.four_bit_rows.function)  # one from the cache has no text
    fresh.compile("(" + ", ".join(["int64"] * 12) + ")")
    text = "".join(fresh.inspect_asm().values())
    assert "vpdpwssd" in text or "vpmaddwd" in text
    assert "vcvtph2ps" in text


def test_rounding_is_no_worse_than_by_the_ends_of_each_group() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    groups = weight.unflatten(1, (-1, 32))
    low, by = groups.amin(2, keepdim=True), (groups.amax(2, keepdim=True) - groups.amin(2, keepdim=True)) / 15
    ends = ((groups - low) / by).round() * by + low
    errors = (int4.restore(int4.quantise(weight)).unflatten(1, (-1, 32)) - groups).square().sum(-1)
    assert (errors.mean() / (ends - groups).square().sum(-1).mean()) < 0.9


def test_weights_of_four_bits_are_found_again() -> None:
    """What lies on sixteen steps between the ends of each group is not changed by rounding."""
    number = torch.randint(0, 16, (9, 64), generator=torch.Generator().manual_seed(0))
    number[:, ::32], number[:, 1::32] = 0, 15
    weight = int4.restore(int4.pack(number, torch.full((9, 2), 0.25).half(), torch.full((9, 2), -1.5).half()))
    assert torch.equal(int4.restore(int4.quantise(weight)), weight)


def test_rows_of_zeros_and_of_one_number_stay() -> None:
    for number in (0.0, -0.375):
        weight = torch.full((2, 64), number)
        assert torch.equal(int4.restore(int4.quantise(weight)), weight)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (1e5, r"between 2\^-12 and 65504"),
        (1e-7, r"between 2\^-12 and 65504"),
    ],
)
def test_what_fp16_cannot_hold_is_refused(wrong: float, line: str) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 5] = wrong
    with pytest.raises(ValueError, match=line):
        int4.quantise(weight)
