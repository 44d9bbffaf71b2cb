"""Every study by name. A new one is a file in quality/ or speed/ and a line in the table there."""

from __future__ import annotations

from skipstone_studies.quality import QUALITY
from skipstone_studies.speed import TIMINGS
from skipstone_studies.study import Study

STUDIES: dict[str, Study] = {study.name: study for study in (*QUALITY, *TIMINGS)}
