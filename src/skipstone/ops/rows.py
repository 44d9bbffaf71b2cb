"""Products of one vector with some rows of a matrix, for the numbers that are rows times width, and no more.

With numba at hand, on a CPU, rows are read where they lie (`rows_native.py`). Elsewhere their part is copied and
multiplied, which costs no more FLOPs, but as much time as multiplying all of them where memory is the limit.

Shape letters: I inputs, O outputs, F rows of a matrix, J of them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("skipstone", "FRAGMENT")  # operations of torch, so that a counter sees them
_library.define("row_products(Tensor x_I, Tensor weight_FI, Tensor row_J) -> Tensor")
_library.define("row_total(Tensor h_J, Tensor weight_FO, Tensor row_J) -> Tensor")

PRODUCTS, TOTAL = torch.ops.skipstone.row_products, torch.ops.skipstone.row_total


def products(x_I: Tensor, weight_FI: Tensor, row_J: Tensor) -> Tensor:
    """[J]: weight[row] x. row_J: int64."""
    if native(weight_FI):
        return PRODUCTS(x_I, weight_FI, row_J)  # type: ignore[no-any-return]
    return F.linear(x_I[None], weight_FI.index_select(0, row_J))[0]


def total(h_J: Tensor, weight_FO: Tensor, row_J: Tensor) -> Tensor:
    """[O]: h weight[row]. row_J: int64."""
    if native(weight_FO):
        return TOTAL(h_J, weight_FO, row_J)  # type: ignore[no-any-return]
    return F.linear(h_J[None], weight_FO.t().index_select(1, row_J))[0]


def native(weight_FI: Tensor) -> bool:
    """Whether rows of this matrix are read where they lie."""
    return serves(weight_FI) and weight_FI.stride(1) == 1


def serves(weight: Tensor) -> bool:
    """The same, once its rows are contiguous."""
    known = type(weight) in (Tensor, torch.nn.Parameter) and weight.dtype in (torch.float32, torch.bfloat16)
    return known and weight.device.type == "cpu" and _compiler()


@cache
def _compiler() -> bool:
    if find_spec("numba") is None:
        return False
    kernels = import_module("skipstone.ops.rows_native")
    _library.impl("row_products", kernels.products, "CPU")
    _library.impl("row_total", kernels.total, "CPU")
    return True
