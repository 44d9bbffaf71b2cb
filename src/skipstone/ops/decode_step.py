"""Small operations of a decoding step on a CPU, each compiled to one call instead of several of torch's.

In a small model, a step of one token spends as much time in calls around the matrix products as in the products. With
numba installed, fp32 tensors use the compiled form (`decode_step_native.py`) where `takes` allows it.

Shape letters: B rows, T tokens, D width, C columns of the cache, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

MOST_ROWS = 8  # rows of a norm; torch is as fast with more
PLAIN = (Tensor, nn.Parameter)  # no subclass: its data may lie elsewhere


def takes(*tensors: Tensor) -> bool:
    """Return whether the compiled operations of this module can be used for these tensors now.

    They need numba, plain fp32 tensors in a CPU's memory, and gradients and autocast switched off. PyTorch does not see
    them, so they are not used while a compiler, a tracer or a FLOP counter observes its operations.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not _installed():
        return False
    if torch.is_autocast_enabled("cpu"):  # products would be bf16
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    return all(type(x) in PLAIN and x.is_cpu and x.dtype == torch.float32 for x in tensors)


def extends(stored: Tensor) -> bool:
    """Return whether the compiled attention can read and extend stored keys or values: fp32 or fp16, on a CPU."""
    usual = type(stored) in PLAIN and stored.is_cpu and not stored.requires_grad
    return usual and stored.dtype in (torch.float32, torch.float16)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight by one compiled call, shaped as x.

    x: fp32 [..., D], with the mean over D. weight_D: the weight, fp32. eps: added to the mean square. Both tensors must
    be such that `takes` accepts them; with more than eight rows, torch is as fast.
    """
    x = x.contiguous()
    y, width = torch.empty_like(x), x.shape[-1]
    _native().rms_norm(x.data_ptr(), weight_D.data_ptr(), y.data_ptr(), x.numel() // width, width, eps)
    return y


def attend_newest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    stored: dict[str, Tensor],
    slot: Tensor,
    column: int,
    scaling: float,
) -> Tensor:
    """Rotate one token's query and key, store key, value and slot, and attend to all stored keys, by one compiled call.

    query: [1, 1, H E] for H heads of size E. key, value: [1, 1, G E] for G key/value heads. rotary: cos and sin of the
    rotary angles, [1, 1, E], the first half of sin negated; None means no rotation. stored: the cache, with "key" and
    "value", [1, C, G, E] for C columns, fp32 or fp16, and "slot", int64 [1, C]; it is changed in place. column: where
    key, value and slot are written; this column and all before it are read. slot: int64 [1, 1], the token's index in
    the row. scaling: factor on scores. Returns [1, 1, H E]. `takes` must accept query, key and value, and `extends` the
    stored keys and values.
    """
    query, key, value = (x.float().contiguous() for x in (query, key, value))
    y = torch.empty_like(query)
    _, C, G, E = stored["key"].shape
    cos, sin = (0, 0) if rotary is None else (rotary[0].data_ptr(), rotary[1].data_ptr())
    addresses = (query.data_ptr(), key.data_ptr(), value.data_ptr(), cos, sin, slot.data_ptr())
    memory = (stored["key"].data_ptr(), stored["value"].data_ptr(), stored["slot"].data_ptr(), y.data_ptr())
    sizes = (query.numel() // E, G, E, C, column, stored["key"].element_size())
    _native().attend_newest((*addresses, *memory), sizes, scaling)
    return y


@cache
def _installed() -> bool:
    """Return whether numba can be imported, which refuses if it does not support the installed numpy."""
    try:
        return find_spec("numba") is not None and import_module("numba") is not None
    except ImportError:
        return False


@cache
def _native() -> Any:
    return import_module("skipstone.ops.decode_step_native")
