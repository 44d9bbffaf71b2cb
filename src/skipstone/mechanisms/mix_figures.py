"""Statistics of a mix of activations in a pass without noise, computed from its record.

The mix is softmax_k((preference + dynamic) / tau), the share of each activation in each neuron. Shape letters: B rows,
T tokens, F neurons, A activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord
from skipstone.core.routing_module import RoutingModule
from skipstone.core.weights import whole


class MixFigures(RoutingModule):
    """The base class of activation mechanisms, with statistics of their mix.

    Statistics are [B, T], or [B, 1] if a row shares its context; NaN for tokens that did not reach the mechanism. tau:
    the temperature, fp32 [].
    """

    tau: Tensor

    @property
    def preference_FA(self) -> Tensor:
        """The learned preference of each neuron for each activation, fp32 logits [F, A], independent of the context."""
        raise NotImplementedError

    def shares(self, record: ActivationRecord) -> Tensor:
        """Return the mean share of each activation over the neurons, [B, T or 1, A]."""
        return self._mix(record, self.tau).mean(2)

    def neurons(self, record: ActivationRecord) -> Tensor:
        """Return the share of neurons in which each activation is the strongest, [B, T or 1, A]."""
        logits_BTFA = self._logits(record)
        best_BTFA = torch.nn.functional.one_hot(logits_BTFA.argmax(-1), logits_BTFA.shape[-1])
        known_BT11 = record.logits_BTA.isfinite().all(-1)[..., None]
        return best_BTFA.float().mean(2).where(known_BT11, float("nan"))

    def diversity(self, record: ActivationRecord) -> Tensor:
        """Return the share of neurons whose strongest activation is not the layer's most common one.

        0 means that a layer routes as a whole.
        """
        return 1 - self.neurons(record).amax(-1)

    def entropy(self, record: ActivationRecord) -> Tensor:
        """Return the entropy of the mix as a share of its maximum (ln A), averaged over neurons."""
        mix_BTFA = self._mix(record, self.tau)
        return torch.special.entr(mix_BTFA).sum(-1).mean(2) / math.log(mix_BTFA.shape[-1])

    def dynamic_entropy(self, record: ActivationRecord) -> Tensor:
        """Return the paper's dynamic entropy in nats: of softmax(logits) without tau, so larger than `entropy`."""
        return torch.special.entr(self._mix(record, 1.0)).sum(-1).mean(2)

    def static_entropy(self) -> Tensor:
        """Return the paper's static entropy in nats, []: of softmax(preference); ln A if no preference was learned."""
        return torch.special.entr(whole(self.preference_FA).softmax(-1)).sum(-1).mean()

    def _mix(self, record: ActivationRecord, temperature: Tensor | float) -> Tensor:
        """Return the share of each activation in each neuron, [B, T or 1, F, A]."""
        return (self._logits(record) / temperature).softmax(-1)

    def _logits(self, record: ActivationRecord) -> Tensor:
        return whole(self.preference_FA) + record.logits_BTA[:, :, None]
