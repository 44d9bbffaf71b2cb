"""The four-bit blocks of a GGUF file, found by the values that a loaded model has from them.

Between the file and our names, rows are permuted, split and joined, differently for each architecture. So rows are
looked up by their restored values instead of by name: what is found is certain to be what the file holds.

Shape letters: O outputs, I inputs, G groups of 32 inputs, P bytes of a four-bit row (`ops/int4.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from skipstone.ops import int4

Parts: TypeAlias = tuple[Any, Any, Any]  # numpy: numbers [O, I], scales and offsets [O, G]
BLOCK = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144}  # bytes
OF_K = 256  # weights of a block of Q4_K


class FourBitRows:
    """An index of the rows of a GGUF file with four-bit blocks; `find` returns a loaded matrix as stored there.

    Rows are looked up by their values, because loading renames and permutes them. path: the file. any: whether the file
    has four-bit rows. Formats are Q4_0 and Q4_1, whose values are kept exactly, and Q4_K, whose scales are products of
    two numbers and are rounded to fp16 here.
    """

    def __init__(self, path: Path) -> None:
        """Read the tensors of the file `path`; raises what the package `gguf` raises for a damaged one."""
        from gguf import GGUFReader, dequantize

        self._tensors: list[Tensor] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for tensor in GGUFReader(str(path)).tensors:
            kind = tensor.tensor_type.name
            if kind not in BLOCK or len(tensor.shape) != 2 or not int4.serves(int(tensor.shape[0])):
                continue
            values = dequantize(tensor.data, tensor.tensor_type)
            number, scale, offset = PARTS[kind](tensor.data.reshape(len(values), -1, BLOCK[kind]))
            if not (np.isfinite(scale).all() and np.isfinite(offset).all()):
                continue  # beyond fp16
            for row, value in enumerate(_rows(values)):
                self._places[value] = len(self._tensors), row
            self._tensors.append(int4.pack(*map(torch.from_numpy, (number, scale, offset))))
        self.any = bool(self._tensors)

    def find(self, weight_OI: Tensor) -> Tensor | None:
        """Return a matrix in four bits, as the GGUF file has it, or None if not all of its rows have four bits there.

        weight_OI: the matrix as loaded from the file, fp32. Returns uint8 [O, P], where P is the number of bytes of a
        row in our four-bit format (`ops/int4.py`).
        """
        places = [self._places.get(value) for value in _rows(weight_OI.detach().float().numpy())]
        if None in places or not places:
            return None
        return torch.stack([self._tensors[tensor][row] for tensor, row in places])  # type: ignore[misc]


def _rows(values: Any) -> list[bytes]:
    """Return the bytes of each row, with 0 for -0."""
    return [row.tobytes() for row in np.ascontiguousarray(values, np.float32) + np.float32(0)]


def _halves(data: Any) -> Any:
    """Return fp16 numbers that lie in the last axis of bytes, without that axis if there is one."""
    return np.ascontiguousarray(data).view(np.float16)


def _numbers(data: Any) -> Any:
    """Return two numbers for each byte of the last axis: first the low halves of all, then the high ones."""
    return np.concatenate((data & 15, data >> 4), -1)


def _q4_0(data: Any) -> Parts:
    scale = _halves(data[..., :2])[..., 0]
    return _numbers(data[..., 2:]).reshape(len(data), -1), scale, scale * np.float16(-8)


def _q4_1(data: Any) -> Parts:
    scale, offset = (_halves(data[..., at : at + 2])[..., 0] for at in (0, 2))
    return _numbers(data[..., 4:]).reshape(len(data), -1), scale, offset


def _q4_k(data: Any) -> Parts:
    from gguf.quants import Q4_K

    scales, mins = Q4_K.get_scale_min(data[..., 4:16].reshape(-1, 12))
    whole, least = (_halves(data[..., at : at + 2]).astype(np.float32) for at in (0, 2))
    shape = (*data.shape[:2], 8)
    scale, offset = whole * scales.reshape(shape), -least * mins.reshape(shape)
    number = _numbers(data[..., 16:].reshape(*data.shape[:2], 4, 32))
    with np.errstate(over="ignore"):
        parts = (part.astype(np.float16).reshape(len(data), -1) for part in (scale, offset))
        return number.reshape(len(data), -1), *parts


PARTS: dict[str, Callable[[Any], Parts]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}
