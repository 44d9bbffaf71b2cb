"""Inner products of a row of fp32, bf16 or fp16 weights with a few fp32 tokens, as LLVM operations for numba.

Weights of 16 bits are widened in registers, which changes no value: bf16 is the upper half of an fp32 number, and
processors have an instruction for fp16. A loop over four tokens that LLVM vectorises by itself takes a sixth more time.
Asking for memory ahead, which helps with int8 weights, makes fp32 ones slower, and so do two rows at once.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from skipstone.ops.decode_stack import FLOATS
from skipstone.ops.int8_dot import ADDRESS, F32, I16, I32, I64, _load, _load_halves
from skipstone.ops.workers import inner

WIDTH = 16  # numbers that are multiplied together
STEP = 2 * WIDTH  # numbers of a step, in two sums
SINGLES = ir.VectorType(F32, WIDTH)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of a weight
FLOAT32, BFLOAT16, FLOAT16 = FLOATS.values()


def _dots(tokens: int, kind: str = "float32") -> Any:
    """Return a numba intrinsic that computes the inner products of one row of weights with `tokens` tokens.

    kind: the dtype of the weights, one of `BYTES`. The intrinsic takes four int64: the address of the weights, the
    address of the fp32 tokens, the bytes from one token to the next, and the number of steps of 32 inputs. It returns a
    tuple of fp32, one for each token, summed in an order that does not depend on the number of tokens or on the dtype.
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
                    first = builder.add(builder.mul(loop.index, I64(STEP)), I64(WIDTH * half))
                    read = _read(context, builder, builder.add(weight, builder.mul(first, I64(BYTES[kind]))), kind)
                    at = builder.mul(first, I64(4))
                    for start, total in zip(starts, totals, strict=True):
                        token = _load(builder, builder.add(start, at), SINGLES, 4)
                        more = builder.fmul(read, token, flags=("contract",))
                        whole = builder.fadd(builder.load(total[half]), more, flags=("contract",))
                        builder.store(whole, total[half])
            found = [_total(builder, builder.fadd(*(builder.load(half) for half in total))) for total in totals]
            return context.make_tuple(builder, signature.return_type, found)

        return types.UniTuple(types.float32, tokens)(*[ADDRESS] * 4), generate

    return dots


def _read(context: Any, builder: ir.IRBuilder, address: ir.Value, kind: str) -> ir.Value:
    """Load 16 weights of this dtype from an address, as fp32. context: as in `_load_halves`."""
    if kind == "float32":
        return _load(builder, address, SINGLES, 4)
    if kind == "float16":
        return _load_halves(context, builder, address, WIDTH)
    wide = ir.VectorType(I32, WIDTH)
    bits = builder.zext(_load(builder, address, ir.VectorType(I16, WIDTH), 2), wide)
    return builder.bitcast(builder.shl(bits, ir.Constant(wide, [16] * WIDTH)), SINGLES)


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
one_bfloat, two_bfloats, four_bfloats = (_dots(tokens, "bfloat16") for tokens in (1, 2, 4))
one_half, two_halves, four_halves = (_dots(tokens, "float16") for tokens in (1, 2, 4))


@inner
def one_float(kind: int, weight: int, x: int, row: int, steps: int) -> tuple[float]:
    """Return the inner product of one row of weights with one token, a tuple of fp32; compiled by numba.

    kind: the dtype of the weights, FLOAT32, BFLOAT16 or FLOAT16. weight, x: addresses of the weights and of the fp32
    token. row: bytes from one token to the next, not used for one. steps: number of steps of 32 inputs.
    """
    if kind == BFLOAT16:
        return one_bfloat(weight, x, row, steps)  # type: ignore[no-any-return]
    if kind == FLOAT16:
        return one_half(weight, x, row, steps)  # type: ignore[no-any-return]
    return one_single(weight, x, row, steps)  # type: ignore[no-any-return]


@inner
def two_floats(kind: int, weight: int, x: int, row: int, steps: int) -> tuple[float, float]:
    """Return the inner products of one row of weights with two tokens, a tuple of fp32; compiled by numba.

    kind: the dtype of the weights, FLOAT32, BFLOAT16 or FLOAT16. weight, x: addresses of the weights and of the fp32
    tokens. row: bytes from one token to the next. steps: number of steps of 32 inputs.
    """
    if kind == BFLOAT16:
        return two_bfloats(weight, x, row, steps)  # type: ignore[no-any-return]
    if kind == FLOAT16:
        return two_halves(weight, x, row, steps)  # type: ignore[no-any-return]
    return two_singles(weight, x, row, steps)  # type: ignore[no-any-return]


@inner
def four_floats(kind: int, weight: int, x: int, row: int, steps: int) -> tuple[float, float, float, float]:
    """Return the inner products of one row of weights with four tokens, a tuple of fp32; compiled by numba.

    kind: the dtype of the weights, FLOAT32, BFLOAT16 or FLOAT16. weight, x: addresses of the weights and of the fp32
    tokens. row: bytes from one token to the next. steps: number of steps of 32 inputs.
    """
    if kind == BFLOAT16:
        return four_bfloats(weight, x, row, steps)  # type: ignore[no-any-return]
    if kind == FLOAT16:
        return four_halves(weight, x, row, steps)  # type: ignore[no-any-return]
    return four_singles(weight, x, row, steps)  # type: ignore[no-any-return]
