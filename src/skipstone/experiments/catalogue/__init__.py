"""The experiments by name. A new one is a file here and a line in the table."""

from __future__ import annotations

from skipstone.experiments.catalogue.demo import DEMO
from skipstone.experiments.catalogue.ffn_groups import FFN_GROUPS
from skipstone.experiments.catalogue.mod_decisions import MOD_DECISIONS, MOD_DECISIONS_CODE
from skipstone.experiments.catalogue.polyglu_routing import POLYGLU_ROUTING
from skipstone.experiments.catalogue.reset_s3 import RESET_S3
from skipstone.experiments.catalogue.tsa.copy_sort import TSA_COPY_SORT
from skipstone.experiments.catalogue.tsa.known_depth import TSA_SWITCHED_S3
from skipstone.experiments.catalogue.tsa.large import TSA_ENWIK8, TSA_FRONTIER
from skipstone.experiments.catalogue.tsa.mixed import TSA_MIXED
from skipstone.experiments.catalogue.tsa.shakespeare import TSA_CONTROLS, TSA_SHAKESPEARE
from skipstone.experiments.registry import Experiment

PAPER = (TSA_SHAKESPEARE, TSA_CONTROLS, TSA_ENWIK8, TSA_COPY_SORT)
BEYOND = (TSA_FRONTIER, TSA_SWITCHED_S3, TSA_MIXED)
ALL = (DEMO, MOD_DECISIONS, MOD_DECISIONS_CODE, RESET_S3, POLYGLU_ROUTING, FFN_GROUPS, *PAPER, *BEYOND)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in ALL}
