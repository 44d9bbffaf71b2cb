"""Floor 3.5: one trained model at many budgets. Its thresholds are set so that it executes a share of the dense FLOPs.

handles.py      threshold handles: the thresholds of a model that decide which tokens are kept, read and set alike
calibration.py  `calibrate`: from rows to a budget table; `meet`: to one budget
budget_table.py `BudgetTable`: thresholds by budget; sets a model, and puts it back
"""

from __future__ import annotations

from skipstone.budget.budget_table import BudgetTable
from skipstone.budget.calibration import calibrate

__all__ = ["BudgetTable", "calibrate"]
