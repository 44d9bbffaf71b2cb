"""What a mix of activations shows: figures of a pass without noise, from its record.

`mix` is softmax_k((preference + dynamic) / tau), the share of each activation in each neuron.
Shape letters: B rows, T tokens, F neurons, A activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord
from skipstone.core.routing_module import RoutingModule


class MixFigures(RoutingModule):
    """Figures are [B, T], or [B, 1] where a row shares its context; NaN for tokens that were never asked."""

    tau: Tensor

    @property
    def preference_FA(self) -> Tensor:
        """fp32, what each neuron prefers whatever the context."""
        raise NotImplementedError

    def shares(self, record: ActivationRecord) -> Tensor:
        """Mean share of each activation over the neurons, [B, T or 1, A]."""
        return self._mix(record, self.tau).mean(2)

    def neurons(self, record: ActivationRecord) -> Tensor:
        """Share of the neurons in which each activation is the strongest, [B, T or 1, A]."""
        logits_BTFA = self._logits(record)
        best_BTFA = torch.nn.functional.one_hot(logits_BTFA.argmax(-1), logits_BTFA.shape[-1])
        known_BT11 = record.logits_BTA.isfinite().all(-1)[..., None]
        return best_BTFA.float().mean(2).where(known_BT11, float("nan"))

    def diversity(self, record: ActivationRecord) -> Tensor:
        """Share of the neurons whose strongest activation is not the one that most neurons have: 0 routes layers."""
        return 1 - self.neurons(record).amax(-1)

    def entropy(self, record: ActivationRecord) -> Tensor:
        """Entropy of the mix as a share of its maximum (ln A), mean over neurons."""
        mix_BTFA = self._mix(record, self.tau)
        return torch.special.entr(mix_BTFA).sum(-1).mean(2) / math.log(mix_BTFA.shape[-1])

    def dynamic_entropy(self, record: ActivationRecord) -> Tensor:
        """The paper's figure, in nats: of softmax(logits) without tau, so larger than what is executed."""
        return torch.special.entr(self._mix(record, 1.0)).sum(-1).mean(2)

    def static_entropy(self) -> Tensor:
        """The paper's other one, in nats, []: of softmax(preference) alone; ln A where no preference was learned."""
        return torch.special.entr(self.preference_FA.softmax(-1)).sum(-1).mean()

    def _mix(self, record: ActivationRecord, temperature: Tensor | float) -> Tensor:
        """Share of each activation in each neuron, [B, T or 1, F, A]."""
        return (self._logits(record) / temperature).softmax(-1)

    def _logits(self, record: ActivationRecord) -> Tensor:
        return self.preference_FA + record.logits_BTA[:, :, None]
