"""Studies of what models lose and learn. A new one is a file here and a line in the table."""

from __future__ import annotations

from skipstone_studies.quality.adapt_frontier import FRONTIERS
from skipstone_studies.quality.adapt_polyglu import ADAPT_POLYGLU
from skipstone_studies.quality.adapt_stories import ADAPT_STORIES
from skipstone_studies.quality.demo import DEMO
from skipstone_studies.quality.ffn_groups import FFN_GROUPS
from skipstone_studies.quality.mod_decisions import MOD_DECISIONS, MOD_DECISIONS_CODE
from skipstone_studies.quality.polyglu_routing import POLYGLU_ROUTING
from skipstone_studies.quality.quantised import QUANTISED_STUDIES
from skipstone_studies.quality.reset_s3 import RESET_S3
from skipstone_studies.quality.sft_stability import SFT_STABILITY
from skipstone_studies.quality.tsa.copy_sort import TSA_COPY_SORT
from skipstone_studies.quality.tsa.known_depth import TSA_SWITCHED_S3
from skipstone_studies.quality.tsa.large import TSA_ENWIK8, TSA_FRONTIER
from skipstone_studies.quality.tsa.mixed import TSA_MIXED
from skipstone_studies.quality.tsa.shakespeare import TSA_CONTROLS, TSA_SHAKESPEARE

PAPER = (TSA_SHAKESPEARE, TSA_CONTROLS, TSA_ENWIK8, TSA_COPY_SORT)
BEYOND = (TSA_FRONTIER, TSA_SWITCHED_S3, TSA_MIXED)
TRAINED = (DEMO, MOD_DECISIONS, MOD_DECISIONS_CODE, RESET_S3, POLYGLU_ROUTING, FFN_GROUPS)
PRETRAINED = (ADAPT_STORIES, ADAPT_POLYGLU, *FRONTIERS, *QUANTISED_STUDIES, SFT_STABILITY)
QUALITY = (*TRAINED, *PAPER, *BEYOND, *PRETRAINED)
