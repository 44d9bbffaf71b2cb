"""A gated MLP whose neurons are left out by the size of what they compute, token by token.

The gate's matrix is multiplied in full; what it gives says which neurons are worth trying, and their products which are
worth keeping. A call of one token, as in decoding one row, reads and multiplies only these parts of the other two
matrices (the gathered executor). More tokens, each with neurons of its own, have no smaller product, and parts for each
of them would be more to read than the whole: all are multiplied and those that are off taken by 0, which is the
specification, too.

Shape letters: B rows, T tokens, D width, F neurons, J neurons that are on, G groups, K groups that are on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import Records
from skipstone.core.tokens import Tokens
from skipstone.nn.grouped_mlp import GroupedMLP, whole_weight
from skipstone.nn.mlp import activated, autocast
from skipstone.ops import rows
from skipstone.ops.reference import dropped


class MagnitudeMLP(GroupedMLP):
    """`router` tells which groups are worth trying and keeping, as `mechanisms/magnitude.py` does."""

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        x_BTD = autocast(x_BTD)
        a_BTF, records = activated(self.activation, self.gate_proj(x_BTD), x_BTD, tokens, cache)
        score_BTG, tried_BTG = self.router.worth_trying(tokens.unpack(a_BTF))
        gathers = tokens.mode.lone and tokens.mode.executor == "gathered" and not torch.compiler.is_compiling()
        if gathers and self.router.kept < self.total:
            y_BTD, kept_BTG = self._in_part(x_BTD, a_BTF, tried_BTG, cache)
        else:
            y_BTD, kept_BTG = self._in_full(x_BTD, a_BTF, tried_BTG, tokens)
        record = self.router.record(score_BTG, tried_BTG, kept_BTG, tokens)
        return dropped(y_BTD, self.dropout, self.training), {**records, self.router.place.name: record}

    def _in_full(self, x_BTD: Tensor, a_BTF: Tensor, tried_BTG: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        h_BTF, kept_BTG = a_BTF * self.up_proj(x_BTD), tried_BTG
        if self.router.tried < self.total:
            h_BTF = _without(h_BTF, tokens.pack(tried_BTG))
        if self.router.kept < self.router.tried:
            kept_BTG = self.router.worth_keeping(tokens.unpack(h_BTF))
            h_BTF = _without(h_BTF, tokens.pack(kept_BTG))
        return self.down_proj(h_BTF), kept_BTG

    def _in_part(
        self, x_11D: Tensor, a_11F: Tensor, tried_11G: Tensor, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Tensor]:
        tried, kept, size = self.router.tried, self.router.kept, self.router.config.group_size
        group_K, kept_11G = _listed(tried_11G, tried), tried_11G
        on_J = _neurons(group_K, size)
        h_J = a_11F[0, 0, on_J] * rows.products(x_11D[0, 0], whole_weight(self.up_proj), on_J)
        if kept < tried:
            at_K = _listed(self.router.worth_keeping(h_J[None, None]), kept)
            at_J, group_K = _neurons(at_K, size), group_K[at_K]
            h_J, on_J = h_J[at_J], on_J[at_J]
            kept_11G = torch.zeros_like(tried_11G).scatter_(-1, group_K[None, None], True)
        return rows.total(h_J, self._down(cache), on_J)[None, None], kept_11G

    def _down(self, cache: SkipstoneCacheLayer | None) -> Tensor:
        """[F, D], the last matrix by neuron; where rows are read in place, a copy that lasts as long as the cache."""
        weight_FD = whole_weight(self.down_proj).t()
        if cache is None or not rows.serves(weight_FD):
            return weight_FD
        held: Tensor | None = cache.held.get(self.router.place.name)
        if held is None:
            held = cache.held[self.router.place.name] = weight_FD.contiguous()
        return held


def _without(h: Tensor, on: Tensor) -> Tensor:
    """h, 0 where a group is not on."""
    return h.unflatten(-1, (on.shape[-1], -1)).mul(on[..., None]).flatten(-2)


def _listed(on_11G: Tensor, count: int) -> Tensor:
    """int64 [K] groups, ascending: where rows are copied, columns in their order are copied four times as fast."""
    return torch.nonzero_static(on_11G[0, 0], size=count)[:, 0]


def _neurons(group_K: Tensor, size: int) -> Tensor:
    """int64 [J], those of these groups."""
    if size == 1:
        return group_K
    return (group_K[:, None] * size + torch.arange(size, device=group_K.device)).flatten()
