"""Sums of weight rows, each times its factor, as LLVM operations inside numba's functions.

    y[o] += factor[j] * weight[row[j], o]        for the rows of a list, one after the other

A matrix whose inputs are neurons is stored neuron by neuron for this, so that only the rows of some of them are read.
Some outputs stay in registers while the list is read. Every output is summed in the order of the list, so rows whose
factor is 0 may be left out without any change of the result, to the last bit. Rows of int8 are read in pairs, whose
products are summed as integers, exactly.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skipstone.ops.int8_dot import ADDRESS, F32, I8, I16, I32, I64, _load, _prefetch

EIGHT = 8  # numbers of a register
LINE = 64  # bytes
SINGLES, SUMS, BYTES = ir.VectorType(F32, EIGHT), ir.VectorType(I32, EIGHT), ir.VectorType(I8, 2 * EIGHT)
HALVES = ir.VectorType(I16, 2 * EIGHT)


def _single_sums(tokens: int, width: int) -> Any:
    """Return a numba intrinsic that adds fp32 weight rows, times their factors, to `width` outputs of `tokens` tokens.

    The intrinsic takes seven int64: the address of the first of these outputs' weights in row 0; the address of the
    rows' offsets in bytes, int64; the number of rows; the address of their factors, fp32; the bytes from one token's
    factors to the next token's; the address of the outputs, fp32; and the bytes from one token's outputs to the next
    token's.
    """

    @intrinsic
    def add(context, weight, places, count, factor, apart, y, y_apart):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            weight, places, count, factor, apart, y, y_apart = given
            outs = _places(builder, y, y_apart, tokens, width)
            totals = [cgutils.alloca_once_value(builder, _load(builder, at, SINGLES, 4)) for at in outs]
            with cgutils.for_range(builder, count) as loop:
                place = _load(builder, builder.add(places, builder.mul(loop.index, I64(8))), I64, 8)
                here, own = builder.add(weight, place), builder.add(factor, builder.mul(loop.index, I64(4)))
                spread = [
                    _spread(builder, _load(builder, builder.add(own, builder.mul(apart, I64(n))), F32, 4))
                    for n in range(tokens)
                ]
                for i in range(width // EIGHT):
                    read = _load(builder, builder.add(here, I64(4 * EIGHT * i)), SINGLES, 4)
                    for total, by in zip(totals[i * tokens : (i + 1) * tokens], spread, strict=True):
                        more = builder.fmul(read, by, flags=("contract",))
                        builder.store(builder.fadd(builder.load(total), more, flags=("contract",)), total)
            for total, at in zip(totals, outs, strict=True):
                _store(builder, builder.load(total), at)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 7), generate

    return add


def _int8_sums(tokens: int, width: int) -> Any:
    """Return a numba intrinsic that adds pairs of int8 weight rows to `width` int32 sums of `tokens` tokens.

    It takes the arguments of `_single_sums`, except that it counts pairs of rows, that factors are pairs of int16, and
    that the outputs are int32.
    """

    @intrinsic
    def add(context, weight, places, count, factor, apart, y, y_apart):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            weight, places, count, factor, apart, y, y_apart = given
            outs = _places(builder, y, y_apart, tokens, width)
            totals = [cgutils.alloca_once_value(builder, _load(builder, at, SUMS, 4)) for at in outs]
            with cgutils.for_range(builder, count) as loop:
                at = builder.add(places, builder.mul(loop.index, I64(16)))
                pair = [builder.add(weight, _load(builder, builder.add(at, I64(8 * k)), I64, 8)) for k in (0, 1)]
                own = builder.add(factor, builder.mul(loop.index, I64(4)))
                spread = []
                for n in range(tokens):
                    both = _load(builder, builder.add(own, builder.mul(apart, I64(n))), I32, 4)
                    spread.append(builder.bitcast(_spread(builder, both), HALVES))
                for i in range(0, width // EIGHT, 2):
                    woven = _woven(builder, *(builder.add(row, I64(EIGHT * i)) for row in pair))
                    for half, read in enumerate(woven):
                        first = (i + half) * tokens
                        for total, by in zip(totals[first : first + tokens], spread, strict=True):
                            builder.store(builder.add(builder.load(total), _pairs(builder, read, by)), total)
            for total, at in zip(totals, outs, strict=True):
                _store(builder, builder.load(total), at)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 7), generate

    return add


def _places(builder: ir.IRBuilder, y: ir.Value, apart: ir.Value, tokens: int, width: int) -> list[ir.Value]:
    """Return the addresses of the outputs, eight outputs at a time, and for these one address for each token.

    y: address of the first token's outputs. apart: bytes from one token's outputs to the next token's. width: number of
    outputs.
    """
    starts = [builder.add(y, builder.mul(apart, I64(n))) for n in range(tokens)]
    return [builder.add(at, I64(4 * EIGHT * i)) for i in range(width // EIGHT) for at in starts]


def _store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    empty = ir.Constant(ir.VectorType(number.type, EIGHT), ir.Undefined)
    zeros = ir.Constant(SUMS, [0] * EIGHT)
    return builder.shuffle_vector(builder.insert_element(empty, number, I32(0)), empty, zeros)


def _woven(builder: ir.IRBuilder, one: ir.Value, other: ir.Value) -> list[ir.Value]:
    """Load 16 int8 numbers of each of two rows and return them alternating, as int16 in two vectors of 16."""
    a, b = (_load(builder, at, BYTES, 1) for at in (one, other))
    found = []
    for first in (0, EIGHT):
        order = [k for i in range(first, first + EIGHT) for k in (i, 2 * EIGHT + i)]
        turns = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 2 * EIGHT), order))
        found.append(builder.sext(turns, HALVES))
    return found


def _pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Multiply two vectors of int16 and add neighbouring products: an int32 vector of half as many numbers."""
    wide = ir.VectorType(I32, 2 * EIGHT)
    product, nothing = builder.mul(builder.sext(a, wide), builder.sext(b, wide), flags=("nsw",)), ir.Undefined
    even, odd = (
        builder.shuffle_vector(product, ir.Constant(wide, nothing), ir.Constant(SUMS, list(range(k, 2 * EIGHT, 2))))
        for k in (0, 1)
    )
    return builder.add(even, odd)


@intrinsic
def fetch(context, address, size):  # type: ignore[no-untyped-def]
    """Ask the processor to load `size` bytes at `address` into its cache; for code compiled by numba only.

    context: supplied by numba, not by the caller. address, size: int64.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        lines = builder.sdiv(builder.add(given[1], I64(LINE - 1)), I64(LINE))
        with cgutils.for_range(builder, lines) as loop:
            _prefetch(builder, builder.add(given[0], builder.mul(loop.index, I64(LINE))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


one_wide, one_narrow, four_narrow = _single_sums(1, 64), _single_sums(1, 16), _single_sums(4, 16)
int8_one_wide, int8_one_narrow, int8_four_narrow = _int8_sums(1, 64), _int8_sums(1, 16), _int8_sums(4, 16)
