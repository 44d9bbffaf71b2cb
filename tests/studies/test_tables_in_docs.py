"""Tables of studies that stand in the documentation are those of the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipstone_studies.catalogue import STUDIES
from skipstone_studies.page import block, groups, heading
from studies.kept_records import read_all

ROOT = Path(__file__).resolve().parents[2]
SHOWN = {"decode_batches": "int8.md", "decode_drafts": "drafts.md"}


@pytest.mark.parametrize("name", SHOWN)
def test_the_documentation_shows_the_table_of_the_records(name: str) -> None:
    study, found, path = STUDIES[name], read_all(ROOT / "results", name), ROOT / "docs" / SHOWN[name]
    begin, end = f"<!-- {name}:begin -->\n", f"\n<!-- {name}:end -->"
    shown = path.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    tables = [f"**{heading(current)}**\n\n{block(study, current)}" for current in groups(study, found, "laptop")]
    assert shown == "".join(tables), f"run `skipstone reproduce {name} --render --out results --readme {path.name}`"
