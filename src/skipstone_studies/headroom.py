"""Headroom: whether a deeper model has a lower loss, without which a router that skips blocks has nothing to win.

Routing is judged only if the full model's loss is at least 0.02 nats (`LEAST`) below the best shallower model's.
Otherwise the verdict is refused, whatever the losses of the routed arms (compared recipes).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from skipstone_studies.claims import ByArm, mean, paired_differences
from skipstone_studies.intervals import Interval, paired

LEAST = 0.02  # nats
REFUSED = "No headroom: nothing to route."


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The headroom of a model: by how much its loss is lower than the best shallower model's.

    Routing, which lets tokens skip blocks, could win no more than this. full: name of the full model in the study.
    rival: name of the best shallower model. gain: mean loss of the shallower one minus the mean loss of the full one,
    in nats. interval: confidence interval of this difference over seeds; None for one seed.
    """

    full: str
    rival: str
    gain: float
    interval: Interval | None

    @property
    def there(self) -> bool:
        """Whether the gain is at least 0.02 nats, the least at which routing is judged."""
        return self.gain >= LEAST

    def sentence(self) -> str:
        """Return a sentence about the headroom, for the page of a study."""
        shown = f"{self.gain:+.3f}" if self.interval is None else self.interval.shown()
        rival = f"{self.rival}, the best model with fewer blocks"
        found = f"the loss of {rival}, differs from that of {self.full} by {shown} nats"
        if self.there:
            return f"Headroom: {found}; routing is judged if this is at least +{LEAST}."
        return f"**{REFUSED}** {found[0].upper()}{found[1:]}; below +{LEAST}, a router has too little to gain."


def headroom(figures: ByArm, full: str, shallower: Sequence[str], key: str) -> Headroom | None:
    """Return the headroom: by how much the full model's loss is below that of the best shallower one.

    The best shallower model is the one with the lowest mean loss. figures: the figures of every run, {arm (compared
    recipe): {seed: nested dict}}. full: name of the full model's arm. shallower: names of the arms with fewer blocks.
    key: dotted path of a loss in nats. The result is None if the full model and the best shallower one have no seed in
    common.
    """
    losses = {arm: loss for arm in shallower if (loss := mean(figures, arm, key)) is not None}
    if not losses or mean(figures, full, key) is None:
        return None
    rival = min(losses, key=losses.__getitem__)
    gains = paired_differences(figures, rival, full, key)
    if not gains:
        return None
    return Headroom(full=full, rival=rival, gain=statistics.fmean(gains), interval=paired(gains))
