"""Statistics of a mix of activations in a pass without noise, computed from the logits that it recorded.

The mix is softmax_k((preference + dynamic) / tau), the share of each activation k in each neuron; preference is learned
for the neuron, dynamic are the recorded logits of the token. Shape letters: B rows, T tokens, F neurons, A activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord
from skipstone.core.routing_module import RoutingModule
from skipstone.core.weights import whole


class MixFigures(RoutingModule):
    """The base class of activation mechanisms that mix several functions in each neuron, with statistics of the mix.

    The mix of a neuron is softmax((preference + dynamic logits) / tau) over A activation functions: preference is
    learned for the neuron, the dynamic logits depend on the token. tau: the temperature, fp32 []. Statistics are
    computed from an `ActivationRecord` of a pass without noise; they are [B, T], or [B, 1] if all tokens of a row share
    their logits, and NaN for padding and tokens that an outer mechanism skipped.
    """

    tau: Tensor

    @property
    def preference_FA(self) -> Tensor:
        """The learned logits of F neurons for A activation functions, fp32 [F, A], the same for every token."""
        raise NotImplementedError

    def shares(self, record: ActivationRecord) -> Tensor:
        """Return the weight of each of A activation functions, averaged over the neurons, fp32 [B, T or 1, A].

        A neuron mixes the functions with weights that add up to 1. record: this module's recorded logits of a forward
        pass without noise. The second axis has size 1 if all tokens of a row share their logits.
        """
        return self._mix(record, self.tau).mean(2)

    def neurons(self, record: ActivationRecord) -> Tensor:
        """Return for each of A activation functions the share of neurons that prefer it, fp32 [B, T or 1, A].

        A neuron mixes the functions and prefers the one with the largest weight. record: this module's recorded logits
        of a forward pass without noise. The second axis has size 1 if all tokens of a row share their logits.
        """
        logits_BTFA = self._logits(record)
        best_BTFA = torch.nn.functional.one_hot(logits_BTFA.argmax(-1), logits_BTFA.shape[-1])
        known_BT11 = record.logits_BTA.isfinite().all(-1)[..., None]
        return best_BTFA.float().mean(2).where(known_BT11, float("nan"))

    def diversity(self, record: ActivationRecord) -> Tensor:
        """Return at each token the share of neurons that do not prefer the most preferred function, fp32 [B, T or 1].

        A neuron mixes activation functions and prefers the one with the largest weight; the most preferred function is
        that of most neurons of the layer at the token. The result is 0 if all neurons prefer the same one. record: this
        module's recorded logits of a forward pass without noise. The second axis has size 1 if all tokens of a row
        share their logits.
        """
        return 1 - self.neurons(record).amax(-1)

    def entropy(self, record: ActivationRecord) -> Tensor:
        """Return the mean entropy of the neurons' mixes, divided by its largest value, ln A, fp32 [B, T or 1].

        A neuron's mix is its distribution over A activation functions. record: this module's recorded logits of a
        forward pass without noise. The second axis has size 1 if all tokens of a row share their logits.
        """
        mix_BTFA = self._mix(record, self.tau)
        return torch.special.entr(mix_BTFA).sum(-1).mean(2) / math.log(mix_BTFA.shape[-1])

    def dynamic_entropy(self, record: ActivationRecord) -> Tensor:
        """Return the "dynamic entropy" of the PolyGLU paper (arXiv 2603.13347) in nats, fp32 [B, T or 1].

        It is the mean entropy over neurons of softmax(preference + dynamic logits) over activation functions, without
        division by the temperature tau, and therefore larger than the entropy of the mix at tau < 1. record: this
        module's recorded logits of a forward pass without noise. The second axis has size 1 if all tokens of a row
        share their logits.
        """
        return torch.special.entr(self._mix(record, 1.0)).sum(-1).mean(2)

    def static_entropy(self) -> Tensor:
        """Return the "static entropy" of the PolyGLU paper (arXiv 2603.13347) in nats, fp32 [].

        It is the mean entropy over neurons of softmax(preference), preference being a neuron's learned logits for the A
        activation functions; ln A if no preference was learned.
        """
        return torch.special.entr(whole(self.preference_FA).softmax(-1)).sum(-1).mean()

    def _mix(self, record: ActivationRecord, temperature: Tensor | float) -> Tensor:
        """Return the share of each function in each neuron, fp32 [B, T or 1, F, A].

        record: this module's record of a pass. temperature: what the logits are divided by before the softmax.
        """
        return (self._logits(record) / temperature).softmax(-1)

    def _logits(self, record: ActivationRecord) -> Tensor:
        return whole(self.preference_FA) + record.logits_BTA[:, :, None]
