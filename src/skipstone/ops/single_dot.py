"""Inner products of a row of fp32 weights with a few tokens, as LLVM operations inside numba's functions.

A loop over four tokens that LLVM vectorises by itself takes a sixth more time. Asking for memory ahead, which helps
with int8 weights, makes fp32 ones slower, and so do two rows at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skipstone.ops.int8_dot import ADDRESS, F32, I32, I64, _load

WIDTH = 16  # numbers that are multiplied together
STEP = 2 * WIDTH  # numbers of a step, in two sums
SINGLES = ir.VectorType(F32, WIDTH)


def _dots(tokens: int) -> Any:
    """Return a numba intrinsic that computes the inner products of one row of fp32 weights with `tokens` tokens.

    The intrinsic takes four int64: the address of the weights, the address of the fp32 tokens, the bytes from one token
    to the next, and the number of steps of 32 inputs. It returns a tuple of fp32, one for each token, summed in an
    order that does not depend on the number of tokens.
    """

    @intrinsic
    def dots(context, weight, x, row, steps):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
            weight, x, row, steps = given
            zeros = ir.Constant(SINGLES, [0.0] * WIDTH)
            totals = [[cgutils.alloca_once_value(builder, zeros) for _ in range(2)] for _ in range(tokens)]
            starts = [builder.add(x, builder.mul(row, I64(n))) for n in range(tokens)]
            with cgutils.for_range(builder, steps) as loop:
                for half in range(2):
                    at = builder.add(builder.mul(loop.index, I64(4 * STEP)), I64(4 * WIDTH * half))
                    read = _load(builder, builder.add(weight, at), SINGLES, 4)
                    for start, total in zip(starts, totals, strict=True):
                        token = _load(builder, builder.add(start, at), SINGLES, 4)
                        more = builder.fmul(read, token, flags=("contract",))
                        whole = builder.fadd(builder.load(total[half]), more, flags=("contract",))
                        builder.store(whole, total[half])
            found = [_total(builder, builder.fadd(*(builder.load(half) for half in total))) for total in totals]
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.float32, tokens)(*[ADDRESS] * 4), generate

    return dots


def _total(builder: ir.IRBuilder, sums: ir.Value) -> ir.Value:
    """Return the sum of the numbers of a vector, by adding its halves until one number is left."""
    width = WIDTH
    while width > 1:
        width //= 2
        low, high = (
            builder.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(I32, width), list(range(k, k + width))))
            for k in (0, width)
        )
        sums = builder.fadd(low, high)
    return builder.extract_element(sums, I32(0))


one_single, two_singles, four_singles = _dots(1), _dots(2), _dots(4)
