"""A report in a real browser: it opens from the disk, says nothing on the console, and saves its pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from browser import chromium, findings, opened
from skipstone.report.rendering import write_report

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ledger", "isoflop"])
def test_a_page_of_results_has_tables_and_saves_its_pictures(name: str, tmp_path: Path) -> None:
    with chromium() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, (RESULTS / f"{name}.html").as_uri(), color_scheme=scheme) as page:
                buttons = page.get_by_role("button", name="Save as SVG")
                assert buttons.count() == page.locator("details.numbers").count() > 3
                with page.expect_download() as download:
                    buttons.first.click()
                download.value.save_as(tmp_path / "a.svg")
                assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<svg")
                page.locator("details.numbers summary").first.click()
                assert page.locator("details.numbers td").first.is_visible()
                assert findings(page) == []


@pytest.mark.slow
def test_a_report_opens_from_the_disk_and_saves_its_pictures(runs: dict[str, Path], tmp_path: Path) -> None:
    out = write_report(list(runs.values()), tmp_path / "report.html", samples={"dense": [("<b>bold</b>", 0.5)]})
    assert out.stat().st_size < 1_000_000
    with chromium() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, out.as_uri(), color_scheme=scheme) as page:
                buttons = page.get_by_role("button", name="Save as SVG")
                assert buttons.count() == page.locator("details.numbers").count() > 12
                with page.expect_download() as download:
                    buttons.first.click()
                download.value.save_as(tmp_path / "a.svg")
                assert (tmp_path / "a.svg").read_text(encoding="utf-8").startswith("<svg")
                page.locator("details.numbers summary").first.click()
                assert page.locator("details.numbers td").first.is_visible()
                assert page.locator("pre b").count() == 0
                assert findings(page) == []
                red, *_ = re.findall(r"\d+", page.locator("body").evaluate("b => getComputedStyle(b).backgroundColor"))
                assert (int(red) < 60) == (scheme == "dark")
