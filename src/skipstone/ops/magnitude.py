"""Choose neurons by magnitude, and compute one token's MLP from the weights of the chosen neurons only.

With numba installed, on a CPU, weight rows are read in place (`magnitude_native.py`). Elsewhere they are copied first,
which costs no additional FLOPs, but as much time as multiplying all of them if memory bandwidth is the limit.

Shape letters: D width, F neurons, J neurons that are on, G groups, K groups that are on.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

_namespace = library.Library("skipstone", "FRAGMENT")  # torch operations, so that FLOP counters see them
_namespace.define(
    "magnitude_mlp(Tensor x_11D, Tensor a_11F, Tensor typical_F, Tensor up_FD, Tensor down_FD, int tried, int kept, "
    "int size) -> (Tensor y_11D, Tensor score_11G, Tensor tried_11G, Tensor kept_11G)"
)
_namespace.define("magnitude_largest(Tensor score, int count) -> Tensor")
library.register_fake(
    "skipstone::magnitude_largest", lambda score, count: score.new_empty(score.shape, dtype=torch.bool), lib=_namespace
)


@library.register_fake("skipstone::magnitude_mlp", lib=_namespace)
def _shapes(
    x: Tensor, a: Tensor, typical: Tensor, up: Tensor, down: Tensor, tried: int, kept: int, size: int
) -> tuple[Tensor, ...]:
    """Return empty tensors like the results, where torch computes shapes alone."""
    groups = (1, 1, up.shape[0] // size)
    score, on = (x.new_empty(groups, dtype=dtype) for dtype in (torch.float32, torch.bool))
    return x.new_empty(1, 1, x.shape[-1]), score, on, torch.empty_like(on)


NATIVE, NATIVE_LARGEST = torch.ops.skipstone.magnitude_mlp, torch.ops.skipstone.magnitude_largest


class MagnitudeWeights(NamedTuple):
    """The weights of one token's MLP, and how many of its groups of neurons are computed.

    typical_F: fp32, typical magnitude (root mean square) of the up projection's output for each of F neurons. up_FD:
    weight of the up projection for D inputs. down_FD: transposed weight of the down projection. tried: number of groups
    whose up projection is computed. kept: number of groups, at most `tried`, whose down projection is computed. size:
    number of adjacent neurons in a group.
    """

    typical_F: Tensor
    up_FD: Tensor
    down_FD: Tensor
    tried: int
    kept: int
    size: int

    def __deepcopy__(self, memo: object) -> MagnitudeWeights:
        """Return self, so that a copied cache shares the weights."""
        return self


class MagnitudeOutput(NamedTuple):
    """The output of one token's MLP, and the decisions about its G groups of neurons; B = T = 1 for one token.

    y_BTD: the MLP's output. score_BTG: fp32 scores, by which groups are tried. tried_BTG: bool, groups whose up
    projection was computed. kept_BTG: bool, groups whose down projection was computed.
    """

    y_BTD: Tensor
    score_BTG: Tensor
    tried_BTG: Tensor
    kept_BTG: Tensor


def sizes(value: Tensor, size: int, typical_F: Tensor | None = None) -> Tensor:
    """Return the mean absolute value of each group of neurons, fp32 [..., G].

    value: [..., F], a number for each neuron. size: number of adjacent neurons per group, F = G size. typical_F: a
    factor on each neuron's magnitude; None means 1.
    """
    magnitude = value.detach().float().abs()
    if typical_F is not None:
        magnitude = magnitude * typical_F.float()
    return magnitude if size == 1 else magnitude.unflatten(-1, (-1, size)).mean(-1)


def largest(score: Tensor, count: int) -> Tensor:
    """Return which values are the `count` largest of the last axis, bool in the shape of `score` [..., G].

    score: fp32, not negative. On a CPU with numba, the first of equal values are chosen; elsewhere `torch.topk` decides
    between them.
    """
    if score.is_cpu and not torch.compiler.is_compiling() and _kernels() is not None:
        return NATIVE_LARGEST(score, count)  # type: ignore[no-any-return]
    none = torch.zeros_like(score, dtype=torch.bool)
    return none.scatter_(-1, score.topk(count, dim=-1, sorted=False).indices, True)


def one_token(x_11D: Tensor, a_11F: Tensor, parts: MagnitudeWeights) -> MagnitudeOutput:
    """Compute one token's gated MLP from the neurons with the largest magnitudes only.

    x_11D: the MLP's input, [1, 1, D], of width D. a_11F: activations a of its gates, [1, 1, F], F neurons. parts: the
    weights, the typical magnitudes of the up projection, and how many groups are tried and kept. The groups with the
    largest mean of |a| times the typical magnitude are tried; of these, the groups with the largest mean of |a (up x)|
    are kept. With numba, on a CPU, contiguous fp32 or bf16 weights are read in place; otherwise the rows are copied.
    """
    typical_F, up_FD, down_FD, tried, kept, size = parts
    if up_FD.is_contiguous() and down_FD.is_contiguous() and reads_in_place(up_FD, down_FD):
        return MagnitudeOutput(*NATIVE(x_11D, a_11F, *parts))
    score_11G = sizes(a_11F, size, typical_F)
    kept_11G = tried_11G = largest(score_11G, tried)
    group_K = _listed(tried_11G, tried)
    on_J = _neurons(group_K, size)
    h_1J = a_11F[0, :, on_J] * F.linear(x_11D[0], up_FD.index_select(0, on_J))
    if kept < tried:
        at_K = _listed(largest(sizes(h_1J, size), kept)[None], kept)
        kept_11G = torch.zeros_like(tried_11G).scatter_(-1, group_K[at_K][None, None], True)
        at_J = _neurons(at_K, size)
        h_1J, on_J = h_1J[:, at_J], on_J[at_J]
    y_1D = F.linear(h_1J, down_FD.t().index_select(1, on_J))
    return MagnitudeOutput(y_1D[None], score_11G, tried_11G, kept_11G)


def reads_in_place(up: Tensor, down: Tensor) -> bool:
    """Return whether the numba kernel can read rows of these matrices without copying them: fp32 or bf16, on a CPU.

    The result is False without numba. Contiguity, which the kernel needs too, is not checked. up, down: weights of the
    up projection and of the down projection.
    """
    return up.dtype == down.dtype in (torch.float32, torch.bfloat16) and up.is_cpu and _kernels() is not None


def transposed(weight_DF: Tensor) -> Tensor:
    """Return the contiguous transpose [F, D] of weight_DF, a matrix that `reads_in_place` accepts."""
    kernels = _kernels()
    assert kernels is not None
    return kernels.transposed(weight_DF)  # type: ignore[no-any-return]


@cache
def _kernels() -> ModuleType | None:
    """Register the numba kernels as torch operations and return their module; None without numba."""
    try:
        kernels = import_module("skipstone.ops.magnitude_native")
    except ImportError:  # no numba, or one that does not support the installed numpy
        return None
    _namespace.impl("magnitude_mlp", kernels.one_token, "CPU")
    _namespace.impl("magnitude_largest", kernels.largest, "CPU")
    return kernels


def _listed(on_11G: Tensor, count: int) -> Tensor:
    """Return the indices of the groups that are on, int64 [K], ascending, which copies four times as fast as others.

    on_11G: bool. count: how many are on, K, which is known without waiting for the device.
    """
    return torch.nonzero_static(on_11G[0, 0], size=count)[:, 0]


def _neurons(group_K: Tensor, size: int) -> Tensor:
    """Return the indices of the neurons of some groups, int64 [J]. group_K: the groups. size: neurons of a group."""
    if size == 1:
        return group_K
    return (group_K[:, None] * size + torch.arange(size, device=group_K.device)).flatten()
