"""The allocation of compute to tokens: by kind, frequency and position, and its correlation with their difficulty.

A token's difficulty is the loss of the prediction that the model makes at it. Compute may correlate with it only
because both depend on the token's position or id; the correlation that is left when the means by position and by id are
subtracted is what the router has learned beyond that.

Shape letters: B rows, T tokens, N tokens of all rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from skipstone.measure.token_trace import CATEGORIES, Allocation, TokenGroup

POSITIONS = 8  # groups of positions of equal size
FREQUENCIES = ("most frequent quarter", "second quarter", "third quarter", "rarest quarter")  # of the text's tokens
ROUNDS = 30  # of removing means in turns; far more than they need to settle
LEAST = 1e-9  # variance below which there is nothing to correlate


def measure_allocation(
    compute_BT: Tensor, loss_BT: Tensor, ids_BT: Tensor, real_BT: Tensor, category_BT: Tensor | None
) -> Allocation:
    """Measure how much compute groups of tokens received, and whether compute correlates with the loss of a token.

    All tensors are [B, T] (rows, tokens), on the CPU. compute_BT: for each token, the executed share of the blocks'
    computation, from 0 to 1. loss_BT: cross-entropy in nats of predicting the next token, NaN where there is no target.
    ids_BT: token ids, int64. real_BT: bool, False for padding, which is left out. category_BT: int64, the kind of each
    token's text as an index in `CATEGORIES` (letters, digits, signs, white space); None if it is unknown, and the
    result then has no groups by kind. Groups by frequency are quarters of the tokens, from those with the most frequent
    ids to those with the rarest. Groups by position are eighths of the row. A group without tokens is left out.
    """
    position_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    compute_N, loss_N = compute_BT.double()[real_BT], loss_BT.double()[real_BT]
    ids_N, position_N = ids_BT[real_BT], position_BT[real_BT]
    bin_N = position_N * POSITIONS // max(ids_BT.shape[1], 1)
    quarter_N = _quarters(ids_N)
    edges = [-(-i * ids_BT.shape[1] // POSITIONS) for i in range(POSITIONS + 1)]
    spans = [f"{a} to {b - 1}" for a, b in pairwise(edges)]
    known_N = loss_N.isfinite()
    pair = compute_N[known_N], loss_N[known_N]
    which, where = ids_N[known_N], bin_N[known_N]
    return Allocation(
        by_kind=[] if category_BT is None else _groups(CATEGORIES, category_BT[real_BT], compute_N, loss_N),
        by_frequency=_groups(FREQUENCIES, quarter_N, compute_N, loss_N),
        by_position=_groups(spans, bin_N, compute_N, loss_N),
        correlation=_correlation(*pair),
        without_position=_correlation(*(_without(x, [where]) for x in pair)),
        without_token=_correlation(*(_without(x, [which]) for x in pair)),
        without_both=_correlation(*(_without(x, [where, which]) for x in pair)),
    )


def _groups(names: list[str] | tuple[str, ...], group_N: Tensor, compute_N: Tensor, loss_N: Tensor) -> list[TokenGroup]:
    found = []
    for k, name in enumerate(names):
        inside_N = group_N == k
        if inside_N.any():
            loss = loss_N[inside_N].nanmean().item()
            found.append(
                TokenGroup(
                    name=name,
                    tokens=int(inside_N.sum()),
                    compute=compute_N[inside_N].mean().item(),
                    loss=loss if loss == loss else None,
                )
            )
    return found


def _quarters(ids_N: Tensor) -> Tensor:
    """Return for each token a quarter of the text, int64 [N] from 0 (the most frequent token ids) to 3 (the rarest).

    ids_N: token ids. All tokens of an id are in the same quarter.
    """
    _, at_N, count_V = ids_N.unique(return_inverse=True, return_counts=True)
    order_V = count_V.argsort(descending=True, stable=True)
    middle_V = torch.empty_like(count_V, dtype=torch.double)
    sorted_V = count_V[order_V].double()
    middle_V[order_V] = sorted_V.cumsum(0) - sorted_V / 2  # the middle of a token's share decides
    return (middle_V[at_N] / len(ids_N) * len(FREQUENCIES)).long().clamp(max=len(FREQUENCIES) - 1)


def _without(x_N: Tensor, groups: list[Tensor]) -> Tensor:
    """Return the values x_N minus the mean of their group, for each grouping in turn.

    groups: groupings of the N values, each an integer tensor [N] with the group of each value. Of several groupings,
    the subtraction is repeated, so that in the end the groups of all have a mean of nearly 0.
    """
    if not len(x_N):
        return x_N
    for _ in range(ROUNDS if len(groups) > 1 else 1):
        for group_N in groups:
            _, at_N = group_N.unique(return_inverse=True)
            sums = torch.zeros(int(at_N.max()) + 1, dtype=x_N.dtype).index_add_(0, at_N, x_N)
            x_N = x_N - (sums / at_N.bincount())[at_N]
    return x_N


def _correlation(x_N: Tensor, y_N: Tensor) -> float | None:
    """Return Pearson's correlation of two tensors [N]; None for fewer than three values or if one is constant."""
    if len(x_N) < 3:
        return None
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    if min(x_N.square().mean(), y_N.square().mean()) < LEAST:
        return None
    return float((x_N * y_N).sum() / (x_N.square().sum() * y_N.square().sum()).sqrt())
