"""A gated MLP that leaves out neurons by the magnitude of their activations, token by token.

The gate matrix is multiplied in full. Neurons with large gate activations are tried: their rows of the up projection
are multiplied. Of these, neurons with a large product of activation and up projection are kept for the down projection.
A call of one token, as in decoding one row, reads and multiplies only these rows of the two matrices. Several tokens,
each with its own neurons, would read more than the whole matrices, so everything is multiplied and the others are set
to 0, with the same result.

Shape letters: B rows, T tokens, D width, F neurons, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import Records
from skipstone.core.tokens import Tokens
from skipstone.core.weights import is_quantised, weight_marks
from skipstone.core.width import Activation, ActivationGroupRouter
from skipstone.nn.grouped_mlp import DivisibleMLP
from skipstone.nn.mlp import activated, autocast
from skipstone.ops.magnitude import MagnitudeOutput, MagnitudeWeights, one_token, reads_in_place, transposed
from skipstone.ops.reference import dropped


class MagnitudeMLP(DivisibleMLP):
    """A gated MLP that leaves out neurons by the magnitude of their activations, token by token.

    Groups of neurons are tried (multiplied by the up projection) if their gate activations are large, and kept
    (multiplied by the down projection) if gate activation times up projection is large. A call of one token without
    gradients reads only these groups' weights; calls of several tokens multiply all weights and zero the groups that
    are off. width: width of the residual stream. neurons: number of neurons in the MLP. activation: activation applied
    to the gates. router: the module that chooses the groups, such as `MagnitudeGroups`. dropout: dropout probability
    for the output.
    """

    router: ActivationGroupRouter

    def __init__(
        self, width: int, neurons: int, activation: Activation, router: ActivationGroupRouter, dropout: float = 0.0
    ) -> None:
        super().__init__(width, neurons, activation, router, dropout)
        self.skips = True  # False: compiled steps read all weights, because too many neurons are on (NeuronShares)

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        x_BTD = autocast(x_BTD)
        a_BTF, records = activated(self.activation, self.gate_proj(x_BTD), x_BTD, tokens, cache)
        parts = self._parts(cache) if tokens.mode.single_token and tokens.mode.executor == "gathered" else None
        if parts is None:
            out = self._in_full(x_BTD, a_BTF, tokens)
        else:
            tried, kept = self.router.counts(a_BTF)
            out = one_token(x_BTD, a_BTF, parts._replace(typical_F=self.router.typical_F, tried=tried, kept=kept))
        y_BTD, score_BTG, tried_BTG, kept_BTG = out
        record = self.router.record(score_BTG, tried_BTG, kept_BTG, tokens)
        if (price_BT := self.router.price(a_BTF)) is not None:
            record = record._replace(loss_BT=torch.where(record.reached_BT, tokens.pad(price_BT), 0.0))
        return dropped(y_BTD, self.dropout, self.training), {**records, self.router.placement.name: record}

    def train(self, mode: bool = True) -> MagnitudeMLP:
        """Set training mode, or evaluation mode if `mode` is False, and return the module.

        Training mode also lets decoding steps leave out neurons again, after `NeuronShares` has found that it does not
        pay: training may change that.
        """
        if mode:
            self.skips = True
        super().train(mode)
        return self

    def _in_full(self, x_BTD: Tensor, a_BTF: Tensor, tokens: Tokens) -> MagnitudeOutput:
        """Return the output and which groups were on; all neurons are multiplied, and those that are off set to 0.

        x_BTD: the MLP's input. a_BTF: activations of all neurons.
        """
        score_BTG, tried_BTG = self.router.worth_trying(tokens.pad(a_BTF))
        h_BTF, kept_BTG = a_BTF * self.up_proj(x_BTD), tried_BTG
        if self.router.tried < self.total:
            h_BTF = _without(h_BTF, tokens.unpad(tried_BTG))
        if self.router.kept < self.router.tried:
            kept_BTG = self.router.worth_keeping(tokens.pad(h_BTF))
            h_BTF = _without(h_BTF, tokens.unpad(kept_BTG))
        return MagnitudeOutput(self.down_proj(h_BTF), score_BTG, tried_BTG, kept_BTG)

    @property
    def divisible(self) -> bool:
        """Whether slices of the weight matrices can be multiplied directly, without calling the linear layers.

        Slices of matrices that torchao has quantised cannot: the matrices would be dequantised for every token.
        """
        return super().divisible and not any(map(is_quantised, self.matrices()))

    def _parts(self, cache: SkipstoneCacheLayer | None) -> MagnitudeWeights | None:
        """Return the up and down weights as `one_token` reads them, or None if all neurons have to be multiplied.

        If weights are read in place, they are kept in `cache`, with a transposed copy of the down projection.
        """
        if torch.compiler.is_compiling():
            return None
        name = self.router.placement.name
        if not self.divisible:
            return None
        marks, held = weight_marks(self.up_proj, self.down_proj), None if cache is None else cache.scratch.get(name)
        if isinstance(held, tuple) and held[0] == marks:
            weights: MagnitudeWeights = held[1]
            return weights
        up_FD, down_DF = self.up_proj.weight.detach(), self.down_proj.weight.detach()
        if cache is None or not reads_in_place(up_FD, down_DF):
            return self._with(up_FD, down_DF.t())
        down_FD = down_DF.t() if down_DF.t().is_contiguous() else transposed(down_DF)  # compiled steps store it so
        kept = self._with(up_FD.contiguous(), down_FD)
        cache.scratch[name] = marks, kept
        return kept

    def _with(self, up_FD: Tensor, down_FD: Tensor) -> MagnitudeWeights:
        router = self.router
        return MagnitudeWeights(router.typical_F, up_FD, down_FD, router.tried, router.kept, router.group_size)


def _without(h: Tensor, on: Tensor) -> Tensor:
    """Return h [..., F] with the neurons of groups that are off set to 0. on: bool [..., G]."""
    return h.unflatten(-1, (on.shape[-1], -1)).mul(on[..., None]).flatten(-2)
