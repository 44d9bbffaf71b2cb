"""Floor 3.5: one trained model at many budgets. Its thresholds are turned to the share of the dense FLOPs asked for.

knobs.py        the thresholds of a model that say who is kept, how to read and to turn them
share.py        what causal passes over rows decide, and the share of the dense FLOPs that they need
calibration.py  `calibrate`: from rows to a dial; `meet`: to one budget
dial.py         `Dial`: thresholds by budget; sets a model, and puts it back
"""

from __future__ import annotations

from skipstone.dial.calibration import calibrate
from skipstone.dial.dial import Dial

__all__ = ["Dial", "calibrate"]
