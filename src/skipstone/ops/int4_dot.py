"""Inner products of unsigned four-bit weights with tokens in int16, as LLVM operations inside numba's functions.

64 weights lie in 32 bytes: one half of them in the low four bits of each byte, the other half in the high four bits. A
row of a head's preview (`ops/head_preview.py`) has one scale, and its sum is exact in int32 up to `MOST` weights
(`nibbles`). In rows with a scale for each 32 inputs (`ops/int4.py`), weights alternate between two groups, and so do
the entries of a vector of sums.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skipstone.ops.int8_dot import (
    ADDRESS,
    F32,
    GROUP,
    HALF,
    I8,
    I16,
    I32,
    I64,
    SINGLES,
    SUMS,
    _dots,
    _load,
    _load_halves,
    _pairs,
    _prefetch,
    _totals,
)

MOST = 4096  # weights of a row: 15 * 32767 * 4096 is below 2^31
LINE = 64  # bytes that a processor fetches together

SCALES = ir.VectorType(F32, 2)  # of two neighbouring groups
lone_row, lone_fine = _dots(1, ahead=0), _dots(1, ahead=0, fine=True)


def _two_halves(builder: ir.IRBuilder, address: ir.Value) -> list[ir.Value]:
    """Load a block of 64 weights; return both halves of it, int16."""
    packed = _load(builder, address, ir.VectorType(I8, HALF), 1)
    numbers = builder.zext(packed, ir.VectorType(I16, HALF))
    low, four = (ir.Constant(numbers.type, [number] * HALF) for number in (15, 4))
    return [builder.and_(numbers, low), builder.lshr(numbers, four)]


def _grouped(tokens: int) -> Any:
    """Return an intrinsic that multiplies one row of four-bit weights with so many tokens, a scale for 32 inputs.

    Its arguments are addresses and counts: of the packed numbers; of the row's offsets and of its scales, fp32; of the
    tokens, int16 in the order of the numbers, and bytes from one token to the next; of the tokens' sums over groups,
    fp32, zeros behind the last one, and bytes from one token's to the next's; the number of groups rounded up to 16,
    and that of blocks of 64. It returns a tuple of fp32.
    """

    @intrinsic
    def dots(context, weight, offset, scale, x, row, sums, pitch, groups, blocks):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            weight, offset, scale, x, row, sums, pitch, groups, blocks = given
            zeros = ir.Constant(SINGLES, [0.0] * SINGLES.count)
            totals = [cgutils.alloca_once_value(builder, zeros) for _ in range(tokens)]
            starts, means = ([builder.add(at, builder.mul(each, I64(n))) for n in range(tokens)]
                             for at, each in ((x, row), (sums, pitch)))  # fmt: skip
            with cgutils.for_range(builder, builder.udiv(groups, I64(SINGLES.count))) as loop:
                at = builder.mul(loop.index, I64(4 * SINGLES.count))
                offsets = _load(builder, builder.add(offset, at), SINGLES, 4)
                for mean, total in zip(means, totals, strict=True):
                    _add_scaled(builder, total, _load(builder, builder.add(mean, at), SINGLES, 4), offsets)
            with cgutils.for_range(builder, blocks) as loop:
                halves = _two_halves(builder, builder.add(weight, builder.mul(loop.index, I64(HALF))))
                both = _load(builder, builder.add(scale, builder.mul(loop.index, I64(8))), SCALES, 4)
                turns = ir.Constant(SUMS, [0, 1] * (SUMS.count // 2))
                factors = builder.shuffle_vector(both, ir.Constant(SCALES, ir.Undefined), turns)
                for start, total in zip(starts, totals, strict=True):
                    here = builder.add(start, builder.mul(loop.index, I64(2 * GROUP)))
                    products = [
                        _pairs(builder, half, _load(builder, builder.add(here, I64(2 * HALF * part)), half.type, 2))
                        for part, half in enumerate(halves)
                    ]
                    _add_scaled(builder, total, builder.sitofp(builder.add(*products), SINGLES), factors)
            found = _totals(builder, [builder.load(total) for total in totals])
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.float32, tokens)(*[ADDRESS] * 9), generate

    return dots


def _add_scaled(builder: ir.IRBuilder, total: ir.Value, number: ir.Value, factor: ir.Value) -> None:
    more = builder.fmul(number, factor, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), more, flags=("contract",)), total)


@intrinsic
def widen(context, source, target, count):  # type: ignore[no-untyped-def]
    """Convert fp16 numbers to fp32, 16 at a time; for code compiled by numba only.

    context: supplied by numba, not by the caller. source: address of the fp16 numbers. target: address of the fp32
    results. count: how many are converted, rounded up to a multiple of 16, for which both memories need room.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        source, target, count = given
        steps = builder.udiv(builder.add(count, I64(SINGLES.count - 1)), I64(SINGLES.count))
        with cgutils.for_range(builder, steps) as loop:
            at = builder.mul(loop.index, I64(2 * SINGLES.count))
            wide = _load_halves(context, builder, builder.add(source, at), SINGLES.count)
            to = builder.add(target, builder.mul(at, I64(2)))
            builder.store(wide, builder.inttoptr(to, SINGLES.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.int64), generate


one_row, two_rows, four_rows, eight_rows = (_grouped(tokens) for tokens in (1, 2, 4, 8))


@intrinsic
def nibbles(context, weight, x, groups):  # type: ignore[no-untyped-def]
    """Return the inner product of a row of four-bit weights and an int16 token, int32; for code compiled by numba only.

    context: supplied by numba, not by the caller. weight: address of the weights, 0 to 15, two in a byte. x: address of
    the int16 token. groups: number of groups of 64 weights.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        weight, x, groups = given
        total = cgutils.alloca_once_value(builder, ir.Constant(SUMS, [0] * SUMS.count))
        with cgutils.for_range(builder, groups) as loop:
            halves = _two_halves(builder, builder.add(weight, builder.mul(loop.index, I64(HALF))))
            here = builder.add(x, builder.mul(loop.index, I64(2 * GROUP)))
            for part, half in enumerate(halves):
                token = _load(builder, builder.add(here, I64(2 * HALF * part)), half.type, 2)
                product = _pairs(builder, half, token)
                builder.store(builder.add(builder.load(total), product), total)
        kind = ir.FunctionType(I32, [SUMS])
        name = f"llvm.vector.reduce.add.v{SUMS.count}i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [builder.load(total)])

    return types.int32(ADDRESS, ADDRESS, types.int64), generate


@intrinsic
def prefetch(context, address, size):  # type: ignore[no-untyped-def]
    """Ask the processor to load `size` bytes at `address` into its cache; for code compiled by numba only.

    context: supplied by numba, not by the caller. address, size: int64.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        lines = builder.udiv(builder.add(given[1], I64(LINE - 1)), I64(LINE))
        with cgutils.for_range(builder, lines) as loop:
            _prefetch(builder, builder.add(given[0], builder.mul(loop.index, I64(LINE))))
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64), generate
