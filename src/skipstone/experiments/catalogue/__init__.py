"""The experiments by name. A new one is a file here and a line in the table."""

from __future__ import annotations

from skipstone.experiments.catalogue.demo import DEMO
from skipstone.experiments.catalogue.mod_decisions import MOD_DECISIONS, MOD_DECISIONS_CODE
from skipstone.experiments.catalogue.reset_s3 import RESET_S3
from skipstone.experiments.registry import Experiment

ALL = (DEMO, MOD_DECISIONS, MOD_DECISIONS_CODE, RESET_S3)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in ALL}
