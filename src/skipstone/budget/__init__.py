"""Thresholds with which a trained model executes a chosen share of the dense model's FLOPs (its budget).

handles.py      threshold handles: one interface to the thresholds that decide which tokens are kept
calibration.py  `calibrate`: from rows to a budget table; `meet`: to one budget
budget_table.py `BudgetTable`: thresholds by budget; sets a model, and restores it
"""

from __future__ import annotations

from skipstone.budget.budget_table import BudgetTable
from skipstone.budget.calibration import calibrate

__all__ = ["BudgetTable", "calibrate"]
