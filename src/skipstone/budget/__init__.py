"""Floor 3.5: one trained model at many budgets. Its thresholds are set so that it executes a share of the dense FLOPs.

handles.py      threshold handles: the thresholds of a model that decide which tokens are kept, read and set alike
share.py        what causal passes over rows decide, and the share of the dense FLOPs that they need
calibration.py  `calibrate`: from rows to a budget table; `meet`: to one budget
table.py        `BudgetTable`: thresholds by budget; sets a model, and puts it back
"""

from __future__ import annotations

from skipstone.budget.calibration import calibrate
from skipstone.budget.table import BudgetTable

__all__ = ["BudgetTable", "calibrate"]
