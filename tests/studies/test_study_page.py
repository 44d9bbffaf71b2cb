"""A study's page as HTML: text and tables of its Markdown page, columns and claims as pictures with their tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skipstone_studies import record as records
from skipstone_studies import study_page
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.page import figures_of, groups

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.mark.parametrize("name", ["demo", "tsa_mixed", "decode_rivals"])
def test_a_page_has_every_arm_a_picture_of_each_column_and_each_claim(name: str) -> None:
    study, found = STUDIES[name], records.read_all(RESULTS, name)
    page = study_page.render(study, found)
    parts = list(groups(study, found))
    assert page.count("<h2>") == len(parts)
    for current in parts:
        claims = [] if study.claims is None else list(study.claims(figures_of(study, current)))
        for text in {claim.text for claim in claims}:
            assert f"<figcaption>{text}</figcaption>" in page.replace("&#39;", "'")
        for record in current:
            assert record.arm in page
    pictures = page.count('<svg viewBox="')
    assert page.count('<details class="numbers">') == pictures - page.count('class="drawing"') > 3
    assert page.count("<script") == 1
    assert not re.search(r'(?:src|href)="(?!#)', page), "nothing is fetched"
    assert len(page) < 200_000


def test_text_of_a_study_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = study_page.html("a <b>word</b>, *told*\n\n| arm | loss |\n| --- | ---: |\n| `x` | **1** |\n\n![](x.png)")
    assert "&lt;b&gt;word&lt;/b&gt;, <em>told</em>" in shown
    assert "<td><code>x</code></td>" in shown
    assert "<strong>1</strong>" in shown
    assert "<img" not in shown
    assert 'role="region"' in shown


def test_the_command_writes_the_page_beside_the_table(tmp_path: Path) -> None:
    from shutil import copytree

    from skipstone_studies.run import reproduce

    copytree(RESULTS / "demo", tmp_path / "demo")
    table = reproduce("demo", out=tmp_path, render_only=True, html=True)
    assert table.with_suffix(".html").read_text(encoding="utf-8") == study_page.render(
        STUDIES["demo"], records.read_all(tmp_path, "demo")
    )
