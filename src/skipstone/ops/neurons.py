"""Matrix products of tokens with some groups of neurons only; the others are not multiplied, nor in the backward pass.

Groups of neurons have equal sizes and are contiguous. Consecutive tokens that keep the same groups form a run; adjacent
groups of a run form a block. A block's weights are multiplied in place, without copies.

Shape letters: N tokens in sequence, M runs, G groups, K kept groups of a token, S neurons of a group, F = G S neurons,
J = K S neurons that are on, I and O inputs and outputs of a product, A activations, B rows. Neurons are the outputs of
gate and up (axis 0 of the weight) and the inputs of down (axis 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipstone.ops import mix_activations
from skipstone.ops.reference import add_matmul

Block = tuple[slice, slice]  # range of neurons among those that are on, and among all


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of a batch: sequences of consecutive tokens that keep the same groups of neurons.

    group_MK: int64, the K groups that each of M runs keeps, ascending. bounds: index of the first token of each run,
    and last the number of tokens; a list on the host. blocks: for each run, its blocks (adjacent groups) as pairs of
    slices: the neurons among those that are on, and among all. total: the number of all groups.
    """

    group_MK: Tensor
    bounds: list[int]
    blocks: list[list[Block]]
    total: int

    @classmethod
    def of(cls, group_NK: Tensor, begins_N: Tensor, total: int, size: int) -> Runs:
        """Return the runs of N tokens, given the tokens at which they begin.

        All tokens of a run have to keep the same groups of neurons, which is not checked. The host waits once for the
        device. group_NK: int64, the groups that each token keeps, ascending. begins_N: bool, tokens at which a run
        begins, including the first. total: number of all groups. size: neurons per group.
        """
        start_M = begins_N.nonzero()[:, 0]
        group_MK = group_NK.index_select(0, start_M)
        bounds, *kept = torch.cat((start_M[None], group_MK.t())).tolist()
        blocks = [blocks_of(groups, size) for groups in zip(*kept, strict=True)]
        return cls(group_MK=group_MK, bounds=[*bounds, len(group_NK)], blocks=blocks, total=total)

    def __iter__(self) -> Iterator[tuple[slice, list[Block]]]:
        """Yield the token range of each run with its blocks."""
        for (start, end), blocks in zip(pairwise(self.bounds), self.blocks, strict=True):
            yield slice(start, end), blocks


def blocks_of(groups: tuple[int, ...] | list[int], size: int) -> list[Block]:
    """Return for each block of adjacent groups its slice of the neurons that are on, and its slice of all neurons.

    groups: indices of the groups that are on, ascending. size: neurons per group.
    """
    starts = [k for k, group in enumerate(groups) if not k or groups[k - 1] != group - 1]
    return [
        (slice(a * size, b * size), slice(groups[a] * size, (groups[b - 1] + 1) * size))
        for a, b in pairwise([*starts, len(groups)])
    ]


def kept_linear(x_NI: Tensor, weight_OI: Tensor, runs: Runs, axis: int) -> Tensor:
    """Return torch's `linear` for N tokens with only the neurons that are on, J for each token; it follows autocast.

    weight_OI: the whole weight, for O outputs and I inputs. runs: which neurons are on for which tokens. axis: 0 if
    neurons are the outputs: x_NI is [N, I] and the result [N, J]; 1 if they are the inputs: x_NI is [N, J] and the
    result [N, O].
    """
    device, dtype = weight_OI.device.type, weight_OI.dtype
    if torch.is_autocast_enabled(device):  # autocast does not cover custom functions
        dtype = torch.get_autocast_dtype(device)
    product: Any = (_IntoNeurons, _OutOfNeurons)[axis]
    return product.apply(x_NI.to(dtype), weight_OI.to(dtype), runs)  # type: ignore[no-any-return]


def kept_part(weight_OI: Tensor, group_K: Tensor, total: int, axis: int) -> Tensor:
    """Return a copy of the weights of some neuron groups, [J, I] or [O, J] for the J neurons of these groups.

    weight_OI: the whole weight, for O outputs and I inputs. group_K: int64, indices of the groups. total: number of all
    groups. axis: the axis of the weight along which the neurons lie, 0 or 1.
    """
    return weight_OI.unflatten(axis, (total, -1)).index_select(axis, group_K).flatten(axis, axis + 1)


def mix_kept(
    gate_NJ: Tensor, static_BFA: Tensor, dynamic_NA: Tensor, temperature: Tensor | float, runs: Runs, row_N: Tensor
) -> Tensor:
    """Mix PolyGLU's activation functions for the neurons that are on, J for each token, and return [N, J].

    The result is sum_k softmax_k((static + dynamic) / temperature) act_k(gate), with act = ReLU, tanh, SiLU, GELU.
    gate_NJ: pre-activations of N tokens. static_BFA: preferences of all F neurons for the A functions, [1 or B, F, A].
    dynamic_NA: logits of the tokens. temperature: a positive number. runs: which neurons are on for which tokens.
    row_N: int64, row of each token, used if B is not 1.
    """
    static_BGSA, parts = static_BFA.unflatten(1, (runs.total, -1)), []
    for (start, end), group_K in zip(pairwise(runs.bounds), runs.group_MK, strict=True):
        at = slice(start, end)
        rows = static_BGSA if len(static_BGSA) == 1 else static_BGSA.index_select(0, row_N[at][:1])
        static_1JA = rows.index_select(1, group_K).flatten(1, 2)
        parts.append(mix_activations(gate_NJ[at][None], static_1JA, dynamic_NA[at][None], temperature)[0])
    return torch.cat(parts)


class _IntoNeurons(torch.autograd.Function):
    """The product of tokens with a weight whose outputs are neurons (gate or up), for the neurons that are on."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_FI: Tensor, runs: Runs) -> Tensor:
        ctx.save_for_backward(x_NI, weight_FI)
        ctx.runs = runs
        y_NJ = x_NI.new_empty(len(x_NI), runs.group_MK.shape[1] * (len(weight_FI) // runs.total))
        for at, blocks in runs:
            for on, among in blocks:
                torch.mm(x_NI[at], weight_FI[among].t(), out=y_NJ[at, on])
        return y_NJ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NJ: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NI, weight_FI = ctx.saved_tensors
        d_x, d_weight = _zeros(x_NI), _zeros(weight_FI)
        for at, blocks in ctx.runs:
            for on, among in blocks:
                add_matmul(d_x[at], grad_NJ[at, on], weight_FI[among])
                add_matmul(d_weight[among], grad_NJ[at, on].t(), x_NI[at])
        return d_x.to(x_NI.dtype), d_weight.to(weight_FI.dtype), None


class _OutOfNeurons(torch.autograd.Function):
    """The product of neurons with a weight whose inputs are neurons (down), for the neurons that are on."""

    @staticmethod
    def forward(ctx: Any, x_NJ: Tensor, weight_OF: Tensor, runs: Runs) -> Tensor:
        ctx.save_for_backward(x_NJ, weight_OF)
        ctx.runs = runs
        y_NO = _zeros(x_NJ.new_empty(len(x_NJ), len(weight_OF)))
        for at, blocks in runs:
            for on, among in blocks:
                add_matmul(y_NO[at], x_NJ[at, on], weight_OF[:, among].t())
        return y_NO.to(x_NJ.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NJ, weight_OF = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x_NJ), _zeros(weight_OF)
        for at, blocks in ctx.runs:
            for on, among in blocks:
                torch.mm(grad_NO[at], weight_OF[:, among], out=d_x[at, on])
                add_matmul(d_weight[:, among], grad_NO[at].t(), x_NJ[at, on])
        return d_x, d_weight.to(weight_OF.dtype), None


def _zeros(like: Tensor) -> Tensor:
    """Return zeros shaped as `like`, in fp32 at least, so that a sum over many runs is not rounded after each."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
