"""Inner products of int8 weights with tokens in int16, as LLVM operations inside numba's functions.

Numba multiplies small integers as int64, so the sums are written for LLVM directly: neighbouring products are added in
pairs, which LLVM recognises and turns into one instruction (vpdpwssd with AVX512-VNNI, vpmaddwd with AVX2, smlal on
ARM). Sums of 64 products (`GROUP`) are exact in int32; they are scaled and added in fp32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

GROUP = 64  # inputs whose products are summed as integers
FINE = 32  # the same where each has a scale of its own
HALF = GROUP // 2
AHEAD = 1 << 13  # bytes
NEAR = 2  # into the second of a processor's caches: the first one holds the tokens
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
SUMS, SINGLES = ir.VectorType(I32, HALF // 2), ir.VectorType(F32, HALF // 2)
ADDRESS = types.int64


def _dots(tokens: int, ahead: int = AHEAD, fine: bool = False) -> Any:
    """Return a numba intrinsic that computes the inner products of one row of int8 weights with `tokens` int16 tokens.

    The intrinsic takes six int64: the address of the weights; the address of their fp32 scales; the bytes from one
    group's scale to the next (0 if the row has one scale); the address of the tokens; the bytes from one token to the
    next; and the number of groups of 64 inputs. It returns a tuple of fp32, one for each token. ahead: how many bytes
    beyond the weights in use memory is prefetched; 0 means no prefetching, for rows that are not read one after the
    other. fine: whether groups have 32 inputs instead.
    """

    @intrinsic
    def dots(context, weight, scale, stride, x, row, groups):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            weight, scale, stride, x, row, groups = given
            zeros = ir.Constant(SINGLES, [0.0] * SINGLES.count)
            totals = [cgutils.alloca_once_value(builder, zeros) for _ in range(tokens)]
            starts = [builder.add(x, builder.mul(row, I64(n))) for n in range(tokens)]
            parts = (0,) if fine else (0, HALF)
            with cgutils.for_range(builder, groups) as loop:
                at = builder.mul(loop.index, I64(HALF * len(parts)))
                if ahead:
                    _prefetch(builder, builder.add(weight, builder.add(at, I64(ahead))))
                halves = [_weights(builder, builder.add(weight, builder.add(at, I64(part)))) for part in parts]
                factor = _spread(builder, _load(builder, builder.add(scale, builder.mul(loop.index, stride)), F32, 4))
                for start, total in zip(starts, totals, strict=True):
                    here = builder.add(start, builder.mul(at, I64(2)))
                    products = [
                        _pairs(builder, half, _load(builder, builder.add(here, I64(2 * part)), half.type, 2))
                        for half, part in zip(halves, parts, strict=True)
                    ]
                    exact = builder.sitofp(products[0] if fine else builder.add(*products), SINGLES)
                    more = builder.fmul(exact, factor, flags=("contract",))
                    builder.store(builder.fadd(builder.load(total), more, flags=("contract",)), total)
            found = _totals(builder, [builder.load(total) for total in totals])
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.float32, tokens)(*[ADDRESS] * 6), generate

    return dots


def _load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type, alignment: int) -> ir.Value:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = alignment
    return value


def _load_halves(context: Any, builder: ir.IRBuilder, address: ir.Value, count: int) -> ir.Value:
    """Load fp16 numbers from an address and widen them to fp32, exactly.

    An x86 processor without F16C has no instruction for this, and LLVM would call a function of libgcc that a process
    may lack, so integers do it there. context: numba's description of the machine for which it compiles.
    """
    triple, _, features = context.codegen().magic_tuple()
    if "+f16c" in features or not triple.startswith(("x86", "i386", "i686", "amd64")):
        return builder.fpext(_load(builder, address, ir.VectorType(ir.HalfType(), count), 2), ir.VectorType(F32, count))
    whole, single = ir.VectorType(I32, count), ir.VectorType(F32, count)

    def every(number: int) -> ir.Value:
        return ir.Constant(whole, [number] * count)

    bits = builder.zext(_load(builder, address, ir.VectorType(I16, count), 2), whole)
    size = builder.and_(bits, every(0x7FFF))
    moved = builder.shl(size, every(13))  # exponent and fraction, where fp32 has them
    tiny = builder.fmul(builder.sitofp(size, single), ir.Constant(single, [2.0**-24] * count))  # of exponent 0
    usual, special = builder.add(moved, every(112 << 23)), builder.or_(moved, every(0x7F800000))
    found = builder.select(builder.icmp_unsigned("<", size, every(0x7C00)), usual, special)  # infinity and NaN
    found = builder.select(builder.icmp_unsigned("<", size, every(0x0400)), builder.bitcast(tiny, whole), found)
    sign = builder.shl(builder.and_(bits, every(0x8000)), every(16))
    return builder.bitcast(builder.or_(found, sign), single)


def _weights(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """Load 32 int8 weights from an address and widen them to int16."""
    return builder.sext(_load(builder, address, ir.VectorType(I8, HALF), 1), ir.VectorType(I16, HALF))


def _pairs(builder: ir.IRBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    """Multiply two vectors of int16 and add neighbouring products: an int32 vector of half as many numbers."""
    wide = ir.VectorType(I32, HALF)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide), flags=("nsw",))
    even, odd = (
        builder.shuffle_vector(product, ir.Constant(wide, ir.Undefined), ir.Constant(SUMS, list(range(first, HALF, 2))))
        for first in (0, 1)
    )
    return builder.add(even, odd)


def _spread(builder: ir.IRBuilder, number: ir.Value) -> ir.Value:
    empty = ir.Constant(SINGLES, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(empty, number, I32(0)), empty, ir.Constant(SUMS, [0] * SUMS.count)
    )


def _totals(builder: ir.IRBuilder, sums: list[ir.Value]) -> list[ir.Value]:
    """Return the sum of the numbers of each vector.

    Vectors are folded into each other in pairs, so that several sums cost little more than one.
    """
    tokens, width = len(sums), SINGLES.count
    piece = width  # neighbouring numbers of a vector that belong to the same sum
    while len(sums) > 1:
        sums = [_folded(builder, a, b, width, piece) for a, b in zip(sums[::2], sums[1::2], strict=True)]
        piece //= 2
    whole = sums[0]
    while piece > 1:
        width //= 2
        whole = _folded(builder, whole, whole, width, piece)
        piece //= 2
    return [builder.extract_element(whole, I32(n)) for n in range(tokens)]


def _folded(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, width: int, piece: int) -> ir.Value:
    """Return a vector of `width` numbers: the two halves of each piece added, first those of a's pieces, then of b's.

    piece: how many neighbouring numbers of a vector belong to one sum.
    """
    starts = [at + i for at in range(0, 2 * SINGLES.count, piece) for i in range(piece // 2)][:width]
    low, high = (
        builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, width), [at + shift for at in starts]))
        for shift in (0, piece // 2)
    )
    return builder.fadd(low, high, flags=("contract",))


def _prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Prefetch the memory at an address: with several tokens, the processor alone does not look ahead far enough."""
    kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.inttoptr(address, I8.as_pointer()), I32(0), I32(NEAR), I32(1)])


one_token, two_tokens, four_tokens, eight_tokens = (_dots(tokens) for tokens in (1, 2, 4, 8))
one_fine, two_fine, four_fine, eight_fine = (_dots(tokens, fine=True) for tokens in (1, 2, 4, 8))
