"""Access to a gate's threshold that is a configuration option, shared by all blocks of an entry of `mechanisms`.

It is shared because gains, unlike scores, can be compared between blocks: each is the factor on an update. And with a
threshold of its own in each block, a token that has exited early could come back in a later one.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

from skipstone.core.routing_module import RoutingModule
from skipstone.core.threshold import ScoreThreshold, State

LARGEST_LOGIT = 30.0  # a gain of 1 - 1e-13: closer to 1 than any fp32 number below 1


class OptionThreshold(ScoreThreshold):
    """Reads and sets the option `threshold` of a gate, converted to the score (a logit) above which a token is kept.

    All blocks of an entry of `mechanisms` share the option. mechanism: the gate; its `config.threshold` is a
    probability in (0, 1). keeps_above: True if a token is kept where its gain (the factor on its update,
    sigmoid(score)) exceeds the option; False if it is kept where its skip probability, 1 - gain, is below the option.
    """

    option = "threshold"

    def __init__(self, mechanism: RoutingModule, keeps_above: bool) -> None:
        self._mechanism, self._sign = mechanism, 1 if keeps_above else -1

    def get(self) -> float:
        threshold = self._mechanism.config.threshold
        return self._sign * math.log(threshold / (1 - threshold))

    def set(self, threshold: float) -> None:
        logit = min(max(threshold, -LARGEST_LOGIT), LARGEST_LOGIT)
        self.restore([1 / (1 + math.exp(-self._sign * logit))])

    def state(self) -> State:
        return [self._mechanism.config.threshold]

    def restore(self, state: State) -> None:
        self._mechanism.config = replace(self._mechanism.config, threshold=state[0])
