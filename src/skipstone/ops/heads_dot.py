"""Products of a few query heads with the keys and values that they share, as LLVM operations inside numba's functions.

Keys and values are fp32 or fp16. A key that several heads read is loaded and widened once for all of them, and the sums
of four keys are folded into each other: loops that LLVM vectorises by itself spend most of their time on adding up the
numbers of a vector. Sums are fp32 and in the same order for both dtypes.

Shape letters: H heads, E head size.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skipstone.ops.int8_dot import ADDRESS, F32, I16, I32, I64, _load, _load_halves, _prefetch
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import inner

ONE = np.float32(0)  # a number of the kind to read
SINGLE, HALF = 4, 2  # bytes of a stored number, which tell its dtype
MOST_HEADS = 4  # at once; more would not fit the registers of a processor
KEYS = 4  # at once
STEP = 16  # features of a step
AHEAD = 1 << 13  # bytes
LARGEST = 65504.0  # of fp16


def _lanes(context: Any) -> int:
    """Return how many numbers a vector should have. context: numba's description of the machine."""
    return 16 if "+avx512f" in context.codegen().magic_tuple()[2] else 8


def _read_ahead(
    context: Any, builder: ir.IRBuilder, starts: list[ir.Value], feature: ir.Value, size: int, lanes: int
) -> list[ir.Value]:
    """Load `lanes` numbers of each of four keys or values, as fp32, and prefetch what lies behind them.

    starts: addresses of the keys or values. feature: index of the first number. size: bytes of a stored number.
    """
    places = [builder.add(start, builder.mul(feature, I64(size))) for start in starts]
    for place in places:
        _prefetch(builder, builder.add(place, I64(AHEAD)))
    if size == HALF:
        return [_load_halves(context, builder, place, lanes) for place in places]
    return [_load(builder, place, ir.VectorType(F32, lanes), 4) for place in places]


def _scores(heads: int, size: int) -> Any:
    """Return a numba intrinsic that writes the inner products of `heads` queries with four keys.

    size: bytes of a stored number. The intrinsic takes seven int64: the address of the first query, the bytes from one
    query to the next, the address of the first key, the bytes from one key to the next, the number of steps of 16
    features, the address where the first query's four fp32 products are written, and the bytes from there to those of
    the next query.
    """

    @intrinsic
    def scores(context, query, each, key, step, steps, out, row):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            query, each, key, step, steps, out, row = given
            lanes = _lanes(context)
            single = ir.VectorType(F32, lanes)
            zeros = ir.Constant(single, [0.0] * lanes)
            totals = [[cgutils.alloca_once_value(builder, zeros) for _ in range(KEYS)] for _ in range(heads)]
            keys = [builder.add(key, builder.mul(step, I64(n))) for n in range(KEYS)]
            queries = [builder.add(query, builder.mul(each, I64(n))) for n in range(heads)]
            with cgutils.for_range(builder, steps) as loop:
                for first in range(0, STEP, lanes):
                    feature = builder.add(builder.mul(loop.index, I64(STEP)), I64(first))
                    read = _read_ahead(context, builder, keys, feature, size, lanes)
                    for start, sums in zip(queries, totals, strict=True):
                        place = builder.add(start, builder.mul(feature, I64(SINGLE)))
                        asked = _load(builder, place, single, 4)
                        for k, total in zip(read, sums, strict=True):
                            more = builder.fmul(asked, k, flags=("contract",))
                            builder.store(builder.fadd(builder.load(total), more, flags=("contract",)), total)
            for n, sums in enumerate(totals):
                found = _folded(builder, [builder.load(total) for total in sums], lanes)
                place = builder.inttoptr(builder.add(out, builder.mul(row, I64(n))), found.type.as_pointer())
                builder.store(found, place).align = 4
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 7), generate

    return scores


def _folded(builder: ir.IRBuilder, sums: list[ir.Value], lanes: int) -> ir.Value:
    """Return a vector of the sums of the numbers of four vectors."""
    piece = lanes  # neighbouring numbers that belong to the same sum
    while len(sums) > 1:
        sums = [_halved(builder, a, b, lanes, piece, lanes) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        piece //= 2
    whole, width = sums[0], lanes
    while piece > 1:
        width //= 2
        whole = _halved(builder, whole, whole, width, piece, lanes)
        piece //= 2
    return whole


def _halved(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, width: int, piece: int, lanes: int) -> ir.Value:
    """Return `width` numbers: the two halves of each piece added, first those of a's pieces, then those of b's."""
    starts = [at + i for at in range(0, 2 * lanes, piece) for i in range(piece // 2)][:width]
    low, high = (
        builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, width), [at + shift for at in starts]))
        for shift in (0, piece // 2)
    )
    return builder.fadd(low, high)


def _weighted(heads: int, size: int) -> Any:
    """Return a numba intrinsic that adds four values times their weights to the outputs of `heads` heads.

    size: bytes of a stored number. The intrinsic takes seven int64: the address of the first value, the bytes from one
    value to the next, the number of steps of 16 features, the address of the first head's four fp32 weights, the bytes
    from there to those of the next head, the address of the first head's fp32 output, and the bytes from there to the
    next.
    """

    @intrinsic
    def weighted(context, value, step, steps, weight, row, out, each):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            value, step, steps, weight, row, out, each = given
            lanes = _lanes(context)
            single = ir.VectorType(F32, lanes)
            values = [builder.add(value, builder.mul(step, I64(n))) for n in range(KEYS)]
            outs = [builder.add(out, builder.mul(each, I64(n))) for n in range(heads)]
            factors = [
                [
                    _spread(builder, _load(builder, builder.add(weight, place), F32, 4), lanes)
                    for place in (builder.add(builder.mul(row, I64(n)), I64(SINGLE * k)) for k in range(KEYS))
                ]
                for n in range(heads)
            ]
            with cgutils.for_range(builder, steps) as loop:
                for first in range(0, STEP, lanes):
                    feature = builder.add(builder.mul(loop.index, I64(STEP)), I64(first))
                    read = _read_ahead(context, builder, values, feature, size, lanes)
                    for start, weights in zip(outs, factors, strict=True):
                        place = builder.add(start, builder.mul(feature, I64(SINGLE)))
                        total = _load(builder, place, single, 4)
                        for stored, factor in zip(read, weights, strict=True):
                            more = builder.fmul(factor, stored, flags=("contract",))
                            total = builder.fadd(total, more, flags=("contract",))
                        builder.store(total, builder.inttoptr(place, single.as_pointer())).align = 4
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 7), generate

    return weighted


def _spread(builder: ir.IRBuilder, number: ir.Value, lanes: int) -> ir.Value:
    empty = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
    first = builder.insert_element(empty, number, I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


@intrinsic
def half(context, address):  # type: ignore[no-untyped-def]
    """Return the fp16 number at `address`, an int64, as fp32; for code compiled by numba only.

    context: supplied by numba, not by the caller.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        return builder.extract_element(_load_halves(context, builder, given[0], 1), I32(0))

    return types.float32(types.int64), generate


@intrinsic
def store_half(context, address, number):  # type: ignore[no-untyped-def]
    """Store an fp32 number in fp16, rounded to nearest, ties to even; beyond the range it becomes 65,504 or -65,504.

    For code compiled by numba only. NaN stays NaN. context: supplied by numba, not by the caller. address: where to.
    number: the fp32 number.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        address, x = given
        most, least = F32(LARGEST), F32(-LARGEST)
        x = builder.select(builder.fcmp_ordered(">", x, most), most, x)
        x = builder.select(builder.fcmp_ordered("<", x, least), least, x)
        half = _narrowed(context, builder, x)
        builder.store(half, builder.inttoptr(address, half.type.as_pointer())).align = 2
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


def _narrowed(context: Any, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return the 16 bits of the fp16 number nearest to an fp32 one of at most 65,504.

    An x86 processor without F16C has no instruction for this, and LLVM would call a function of libgcc that a process
    may lack, so integers do it there. context: numba's description of the machine for which it compiles.
    """
    triple, _, features = context.codegen().magic_tuple()
    if "+f16c" in features or not triple.startswith(("x86", "i386", "i686", "amd64")):
        return builder.bitcast(builder.fptrunc(x, ir.HalfType()), I16)
    bits = builder.bitcast(x, I32)
    size = builder.and_(bits, I32(0x7FFFFFFF))
    even = builder.and_(builder.lshr(size, I32(13)), I32(1))
    usual = builder.lshr(builder.add(builder.add(size, even), I32(0x0FFF - (112 << 23))), I32(13))
    # of a sum with 1/2, the last bit is worth 2^-24, as that of fp16 below 2^-14, and the sum is rounded to it
    sum_ = builder.bitcast(builder.fadd(builder.bitcast(size, F32), F32(0.5)), I32)
    tiny = builder.sub(sum_, I32(0x3F000000))
    found = builder.select(builder.icmp_unsigned("<", size, I32(113 << 23)), tiny, usual)
    found = builder.select(builder.icmp_unsigned(">", size, I32(0x7F800000)), I32(0x7E00), found)
    sign = builder.and_(builder.lshr(bits, I32(16)), I32(0x8000))
    return builder.trunc(builder.or_(found, sign), I16)


one_single, two_singles, three_singles, four_singles = (_scores(heads, SINGLE) for heads in (1, 2, 3, 4))
one_half, two_halves, three_halves, four_halves = (_scores(heads, HALF) for heads in (1, 2, 3, 4))
add_one_single, add_two_singles, add_three_singles, add_four_singles = (
    _weighted(heads, SINGLE) for heads in (1, 2, 3, 4)
)
add_one_half, add_two_halves, add_three_halves, add_four_halves = (_weighted(heads, HALF) for heads in (1, 2, 3, 4))


@inner
def scores(heads: int, count: int, width: int, keys: Array, places: Array) -> None:
    """Write the fp32 inner products of one to four fp32 queries with one to four keys; compiled by numba.

    heads: the number of queries. count: the number of keys. width: the head size. keys: the address of the first key,
    the bytes from one to the next, and the bytes of a number, SINGLE or HALF. places: the address of the first query,
    behind which the others lie; that of its products; and the bytes from there to those of the next query.
    """
    (key_at, step, size), (query_at, out_at, row) = keys, places
    each, steps = SINGLE * width, width // STEP if count == KEYS else 0
    if steps == 0:
        for h in range(heads):
            _lying(out_at + h * row, (count,), ONE)[:] = 0
    elif size == HALF:
        if heads == 4:
            four_halves(query_at, each, key_at, step, steps, out_at, row)
        elif heads == 3:
            three_halves(query_at, each, key_at, step, steps, out_at, row)
        elif heads == 2:
            two_halves(query_at, each, key_at, step, steps, out_at, row)
        else:
            one_half(query_at, each, key_at, step, steps, out_at, row)
    elif heads == 4:
        four_singles(query_at, each, key_at, step, steps, out_at, row)
    elif heads == 3:
        three_singles(query_at, each, key_at, step, steps, out_at, row)
    elif heads == 2:
        two_singles(query_at, each, key_at, step, steps, out_at, row)
    else:
        one_single(query_at, each, key_at, step, steps, out_at, row)
    rest, first = width - STEP * steps, STEP * steps
    for h in range(heads if rest else 0):
        query, out = _lying(query_at + h * each, (width,), ONE), _lying(out_at + h * row, (count,), ONE)
        for n in range(count):
            key, total = key_at + n * step, ONE
            if size == HALF:
                for e in range(first, width):
                    total += query[e] * half(key + HALF * e)
            else:
                stored = _lying(key, (width,), ONE)
                for e in range(first, width):
                    total += query[e] * stored[e]
            out[n] += total


@inner
def add_values(heads: int, count: int, width: int, values: Array, places: Array) -> None:
    """Add one to four values, times weights, to the outputs of one to four heads; compiled by numba.

    heads: the number of heads, each with one output. count: the number of values. width: the head size, the numbers of
    a value. values: the address of the first value, the bytes from one value to the next, and the bytes of a number:
    SINGLE (fp32) or HALF (fp16). places: the address of the outputs, fp32 [heads, width] without gaps; the address of
    the weights, fp32, one for each head and value; and the bytes from one head's weights to the next head's.
    """
    (value_at, step, size), (out_at, weight_at, row) = values, places
    each, steps = SINGLE * width, width // STEP if count == KEYS else 0
    if steps and size == HALF:
        if heads == 4:
            add_four_halves(value_at, step, steps, weight_at, row, out_at, each)
        elif heads == 3:
            add_three_halves(value_at, step, steps, weight_at, row, out_at, each)
        elif heads == 2:
            add_two_halves(value_at, step, steps, weight_at, row, out_at, each)
        else:
            add_one_half(value_at, step, steps, weight_at, row, out_at, each)
    elif steps:
        if heads == 4:
            add_four_singles(value_at, step, steps, weight_at, row, out_at, each)
        elif heads == 3:
            add_three_singles(value_at, step, steps, weight_at, row, out_at, each)
        elif heads == 2:
            add_two_singles(value_at, step, steps, weight_at, row, out_at, each)
        else:
            add_one_single(value_at, step, steps, weight_at, row, out_at, each)
    first = STEP * steps
    for h in range(heads if first < width else 0):
        out, weight = _lying(out_at + h * each, (width,), ONE), _lying(weight_at + h * row, (count,), ONE)
        for n in range(count):
            value, factor = value_at + n * step, weight[n]
            if size == HALF:
                for e in range(first, width):
                    out[e] += factor * half(value + HALF * e)
            else:
                stored = _lying(value, (width,), ONE)
                for e in range(first, width):
                    out[e] += factor * stored[e]
