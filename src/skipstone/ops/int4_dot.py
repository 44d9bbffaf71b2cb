"""Inner products of unsigned four-bit weights with a token in int16, as an LLVM operation inside numba's functions.

Half a group of 64 weights lies in the low halves of 32 bytes, the other half in their high halves. The sum over a whole
row is exact in int32 up to `MOST` weights.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skipstone.ops.int8_dot import ADDRESS, GROUP, HALF, I8, I16, I32, I64, SUMS, _dots, _load, _pairs, _prefetch

MOST = 4096  # weights of a row: 15 * 32767 * 4096 is below 2^31
LINE = 64  # bytes that a processor fetches together

lone_row = _dots(1, ahead=0)


@intrinsic
def nibbles(context, weight, x, groups):  # type: ignore[no-untyped-def]
    """Return the inner product of a row of four-bit weights and an int16 token, int32; for code compiled by numba only.

    context: supplied by numba, not by the caller. weight: address of the packed weights, unsigned. x: address of the
    token. groups: number of groups of 64 weights.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        weight, x, groups = given
        bytes32, half = ir.VectorType(I8, HALF), ir.VectorType(I16, HALF)
        total = cgutils.alloca_once_value(builder, ir.Constant(SUMS, [0] * SUMS.count))
        low, four = (ir.Constant(bytes32, [number] * HALF) for number in (15, 4))
        with cgutils.for_range(builder, groups) as loop:
            packed = _load(builder, builder.add(weight, builder.mul(loop.index, I64(HALF))), bytes32, 1)
            here = builder.add(x, builder.mul(loop.index, I64(2 * GROUP)))
            for part, numbers in enumerate((builder.and_(packed, low), builder.lshr(packed, four))):
                token = _load(builder, builder.add(here, I64(2 * HALF * part)), half, 2)
                product = _pairs(builder, builder.zext(numbers, half), token)
                builder.store(builder.add(builder.load(total), product), total)
        kind = ir.FunctionType(I32, [SUMS])
        name = f"llvm.vector.reduce.add.v{SUMS.count}i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [builder.load(total)])

    return types.int32(ADDRESS, ADDRESS, types.int64), generate


@intrinsic
def prefetch(context, address, size):  # type: ignore[no-untyped-def]
    """Ask the processor to load `size` bytes at `address` into its cache; for code compiled by numba only.

    context: supplied by numba, not by the caller.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        lines = builder.udiv(builder.add(given[1], I64(LINE - 1)), I64(LINE))
        with cgutils.for_range(builder, lines) as loop:
            _prefetch(builder, builder.add(given[0], builder.mul(loop.index, I64(LINE))))
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64), generate
