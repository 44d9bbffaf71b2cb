"""The parity study's own measurements: tests and table measure with the same code."""

from __future__ import annotations

from skipstone_studies.speed import parity as parity
