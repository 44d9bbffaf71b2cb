"""A linear layer with int8 weights for few tokens, by kernels that numba compiles.

Weights are usually stored output by output (`int8_native.py`). Those of a down projection whose neurons are chosen in a
compiled step of all blocks are stored input by input (`neuron_rows_native.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from skipstone.ops.int8_dot import FINE, GROUP
from skipstone.ops.int8_native import crew, grouped_rows, round_tokens, single_rows
from skipstone.ops.neuron_rows_native import summed_int8
from skipstone.ops.workers import Unit, share, threads

LEAST = 1 << 17  # weights below which a second thread costs more than it saves
PIECE = 128  # tokens that are multiplied at a time: so many stay in a processor's second cache


def linear(x: Tensor, weight_OI: Tensor, scale: Tensor) -> Tensor:
    """Return x (scale * weight)^T, [..., O] in the dtype of x, reading each int8 weight from memory once.

    x: [..., I], meant for few tokens of I inputs, with no limit. weight_OI: int8, for O outputs. scale: fp32 [O], [O, I
    / 64] or [O, I / 32].
    """
    outputs, inputs = weight_OI.shape
    fine = scale.numel() * FINE == outputs * inputs
    if (
        outputs % 16 == inputs % GROUP == 0
        and not fine
        and scale.dtype == torch.float32
        and _by_input(weight_OI, scale)
    ):
        given, y = _plain(x), torch.empty((*x.shape[:-1], outputs), dtype=torch.float32)
        _summed(given, weight_OI, scale, y)
        return y if x.dtype == torch.float32 else y.to(x.dtype)
    if not weight_OI.is_contiguous() or scale.dtype != torch.float32 or not scale.is_contiguous():
        weight_OI, scale = weight_OI.contiguous(), scale.float().contiguous()
    matrix = (weight_OI.data_ptr(), scale.data_ptr(), 0, scale.numel() // outputs)
    grouped = fine or inputs % GROUP == 0
    return multiplied(x, grouped_rows if grouped else single_rows, matrix, (outputs, inputs), rounded=grouped)


def multiplied(
    x: Tensor, rows: Unit, matrix: tuple[int, int, int, int], sizes: tuple[int, int], rounded: bool = True
) -> Tensor:
    """Return the product of few tokens x [..., I] with a stored matrix, [..., O] in the dtype of x.

    One thread or several compute it, 128 tokens at a time. rows: the kernel that computes a range of the outputs, such
    as `grouped_rows`. matrix: the kernel's first arguments, which are the addresses of weights, scales and biases, and
    the number of scales per output. sizes: O and I, the numbers of outputs and inputs. rounded: whether the kernel
    takes the tokens in int16; if not, in fp32.
    """
    (outputs, inputs), given = sizes, _plain(x)
    y = torch.empty((*x.shape[:-1], outputs), dtype=torch.float32)
    tokens, places = x.numel() // inputs, (given.data_ptr(), 0)
    if rounded:
        numbers, factor = np.empty((tokens, inputs), np.int16), np.empty(tokens, np.float32)
        places = (numbers.ctypes.data, factor.ctypes.data)
        round_tokens.ctypes(given.data_ptr(), *places, tokens, inputs)
    parts = threads() if outputs * inputs >= LEAST else 1
    for n in range(0, tokens, PIECE):
        x_at, unit_at = places[0] + n * inputs * (2 if rounded else 4), places[1] + 4 * n
        given_there = (x_at, unit_at, y.data_ptr() + 4 * n * outputs, min(PIECE, tokens - n), outputs, inputs)
        if parts == 1:
            rows.ctypes(*matrix, *given_there, 0, outputs)
        else:
            share(crew, ((*matrix, *given_there, rows.address),), parts)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _plain(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()


def _by_input(weight_OI: Tensor, scale: Tensor) -> bool:
    """Return whether an int8 weight [O, I] and its scales are stored input by input, as contiguous transposes.

    scale: [O], for which only the weight counts, or [O, I / 64].
    """
    scales_lie = scale.dim() == 1 or scale.t().is_contiguous()
    return not weight_OI.is_contiguous() and weight_OI.t().is_contiguous() and scales_lie


def _summed(x: Tensor, weight_OI: Tensor, scale: Tensor, y: Tensor) -> None:
    """Write x (scale * weight)^T to y for a weight that is stored input by input (`_by_input`).

    x: fp32 [..., I], contiguous, few tokens. y: fp32 [..., O].
    """
    (outputs, inputs), tokens, rows = weight_OI.shape, y.numel() // weight_OI.shape[0], np.arange(weight_OI.shape[1])
    rounded, factor = np.empty((tokens, inputs), np.int16), np.empty(tokens, np.float32)
    places = (rounded.ctypes.data, factor.ctypes.data)
    round_tokens.ctypes(x.data_ptr(), *places, tokens, inputs)
    matrix = (weight_OI.data_ptr(), scale.data_ptr(), scale.numel() // outputs)
    listed = (rows.ctypes.data, len(rows))
    summed_int8.ctypes(*matrix, x.data_ptr(), *places, tokens, inputs, outputs, *listed, y.data_ptr(), 0, outputs)
