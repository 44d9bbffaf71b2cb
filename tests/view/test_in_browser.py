"""The live page in a real browser, served by the real command.

SKIPSTONE_SCREENSHOTS=FOLDER keeps the pictures that the documentation shows; SKIPSTONE_VIEW_RUNS=RUN:RUN2 makes them
of these runs (`make screenshots`), and SKIPSTONE_VIEW_PROMPT=TEXT of a text in the language that they know.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import chromium, findings, opened

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # decoding is compiled once for an installation
PATIENCE = 240_000  # milliseconds, on a machine that is busy
SRC = Path(__file__).resolve().parents[2] / "src"
SHOTS = (("light", "light", 1180, 1120), ("dark", "dark", 1180, 1120), ("narrow", "light", 390, 1250))
HTML = "<b>bold</b> & <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def serve(*runs: Path) -> tuple[subprocess.Popen[str], str]:
    words = [sys.executable, "-m", "skipstone", "view", *map(str, runs), "--no-browser", "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(SRC)})
    assert process.stdout is not None
    return process, process.stdout.readline().split()[0]


def stop(process: subprocess.Popen[str]) -> float:
    """Ctrl-C; return the seconds that it takes."""
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
    return time.monotonic() - began


@pytest.fixture(scope="module")
def address(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    other = shutil.copytree(saved, tmp_path_factory.mktemp("other") / "other")
    (other / "budget.json").unlink()
    process, found = serve(saved, other)
    yield found
    stop(process)


def run(page: Any, prompt: str = HTML, tokens: int = 12) -> None:
    page.locator(".panel").first.wait_for()
    page.fill("#prompt", prompt)
    page.fill("#new-tokens", str(tokens))
    page.click("#run")


def ran(page: Any, **options: Any) -> None:
    run(page, **options)
    page.get_by_text("done", exact=True).wait_for(timeout=PATIENCE)


def tokens_of(page: Any, panel: int = 0) -> Any:
    return page.locator(".panel").nth(panel).locator(".stream .token")


def test_both_models_answer_with_pictures_and_text_stays_text(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ran(page)
        for panel in (0, 1):
            assert tokens_of(page, panel).count() == len(HTML) + 12
            assert (page.locator(".stream").nth(panel).text_content() or "").startswith(HTML)
            assert page.locator(".map svg").nth(panel).locator("rect.column").count() == len(HTML) + 11
            assert page.locator(".neurons svg").nth(panel).locator("rect").count() >= 1
        assert page.locator(".stream b, .stream img").count() == 0
        assert page.locator(".panel h2").first.text_content() == "small-<model>"
        assert re.fullmatch(r"[\d.]+ [kM] \(\d+ %\)", page.locator(".meter b").first.text_content())
        assert [page.locator(".meter b").nth(i).text_content() for i in (2, 3)] != ["–", "–"]


def test_hover_tells_and_a_click_keeps(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ran(page)
        details = page.locator(".details").first
        tokens_of(page).nth(3).hover()
        assert "token 3" in details.text_content()
        for told in (
            "of the blocks' work",
            "entropy of the next token",
            "loss of the next token",
            "mod: score",
            "nats",
        ):
            assert told in details.text_content()
        assert details.locator("svg path.path").count() == 1
        tokens_of(page).nth(5).click()
        assert tokens_of(page).nth(5).get_attribute("aria-pressed") == "true"
        picture = page.locator(".attention svg").first
        picture.wait_for()
        blocks = page.locator(".attention tbody tr").count()
        assert picture.locator("rect.attended").count() == 6 * blocks, "six tokens, itself included"
        assert picture.locator("text", has_text="skipped: attends to nothing").count() == 3 - blocks
        assert "What token 5 attends to" in page.locator(".attention").first.text_content()
        tokens_of(page).nth(7).hover()
        assert "token 7" in details.text_content()
        page.mouse.move(2, 2)
        assert "token 5" in details.text_content(), "the kept token comes back"
        page.locator(".map rect.column").nth(9).hover()
        assert "token 9" in details.text_content(), "the map tells as well"


def test_characters_of_several_tokens_and_every_picture_with_its_table(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ran(page, prompt="é€a", tokens=4)
        pieces = [tokens_of(page).nth(i).text_content() for i in range(6)]
        assert pieces == ["▫", "é", "▫", "▫", "€", "a"], "a sign stands for a part of a character"
        tokens_of(page).nth(2).hover()
        assert "token 2" in page.locator(".details").first.text_content()
        tokens_of(page).nth(5).click()
        page.locator(".attention svg").first.wait_for()
        panel = page.locator(".panel").first
        assert panel.locator("svg[role=img]").count() == panel.get_by_role("button", name="Save as SVG").count() == 4
        assert panel.locator("details").count() == 4
        path = page.locator(".details").first
        path.locator("summary").click()
        rows = path.locator("tbody tr").all_text_contents()
        assert len(rows) == 4, "a row for each mechanism of a block, and one for a block without any"
        assert rows[0] == "0–––every token"
        assert "token selective" in rows[2]
        tokens_of(page).nth(4).hover()
        assert path.locator("tbody").is_visible(), "it stays open from token to token"
        neurons = panel.locator(".neurons")
        neurons.locator("summary").click()
        counts = [
            int(n)
            for n in re.findall(r"\d+", " ".join(neurons.locator("tbody tr").last.locator("td").all_text_contents()))
        ]
        assert sum(counts[1:]) == 24, "every neuron of a block counts once"


def test_a_page_without_text_shows_no_empty_picture(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.locator(".panel").first.wait_for()
        assert page.locator("figure:visible").count() == 0
        ran(page, tokens=2)
        assert page.locator("figure:visible").count() == 4


def test_the_slider_sets_the_budget_and_runs_again(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        ran(page)
        before = page.locator(".meter b").first.text_content()
        slider = page.get_by_role("slider")
        assert slider.count() == 1, "the other model has no table"
        assert "skipstone calibrate" in page.locator(".panel").nth(1).text_content()
        assert page.locator("output").text_content() == "43 % of the dense FLOPs", "as trained"
        slider.press("Home")
        page.get_by_text("40 % of the dense FLOPs").wait_for()
        page.get_by_text("done", exact=True).wait_for(timeout=PATIENCE)
        assert page.locator(".meter b").first.text_content() != before
        page.get_by_label("as trained").check()
        page.get_by_text("done", exact=True).wait_for(timeout=PATIENCE)
        assert page.locator(".meter b").first.text_content() == before


def test_a_draft_is_counted(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.locator(".panel").first.wait_for()
        page.get_by_label("Draft").select_option("skip")
        ran(page, tokens=24)
        told = page.locator(".drafts .key").first.text_content()
        accepted, guesses = map(int, re.findall(r"\d+", told))
        assert accepted <= guesses
        assert page.locator(".stream").first.locator(".token.guessed").count() == accepted
        page.fill("#temperature", "3")
        ran(page, tokens=24)
        accepted, guesses = map(int, re.findall(r"\d+", page.locator(".drafts .key").first.text_content()))
        struck = page.locator(".stream").first.locator("del.rejected")
        assert struck.count() > 0
        assert struck.locator("span").count() <= guesses - accepted
        assert "the model chose" in struck.first.get_attribute("title")
        assert "line-through" in struck.first.evaluate("one => getComputedStyle(one).textDecorationLine")


def test_the_page_is_saved_as_one_file_that_opens_offline(browser: Any, address: str, tmp_path: Path) -> None:
    with opened(browser, address) as page:
        assert page.locator("#save").is_disabled()
        ran(page)
        seen = page.locator(".meter b").all_text_contents()
        tokens_of(page, 1).nth(6).click()
        page.locator(".attention svg").wait_for()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save page").click()
        assert download.value.suggested_filename == "skipstone-small--model--other.html"
        out = tmp_path / "saved.html"
        download.value.save_as(out)
    assert out.stat().st_size < 1_000_000
    for scheme in ("light", "dark"):
        with opened(browser, out.as_uri(), color_scheme=scheme) as page:
            assert page.locator("#prompt").text_content() == HTML
            assert page.locator(".meter b").all_text_contents() == seen
            for panel in (0, 1):
                assert tokens_of(page, panel).count() == len(HTML) + 12
            assert page.locator(".panel").nth(1).locator(".attention rect.attended").count() >= 7
            tokens_of(page).nth(4).click()
            assert "token 4" in page.locator(".details").first.text_content()
            assert page.locator(".details").first.locator("svg path.path").count() == 1
            assert page.locator(".neurons svg").first.locator("rect").count() >= 1
            assert page.get_by_role("slider").count() == 0
            with page.expect_download():
                page.get_by_role("button", name="Save as SVG").first.click()
            assert findings(page) == []


def test_stop_and_a_mistake_are_told_and_the_next_run_works(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        run(page, prompt="ab", tokens=90)
        page.click("#stop")
        page.get_by_text("stopped", exact=True).wait_for()
        assert tokens_of(page).count() < 92
        run(page, prompt="x" * 96)
        page.get_by_text("leaves no room in the context of small-<model>, 96 tokens").wait_for()
        ran(page)


def test_a_page_that_is_closed_frees_the_server(browser: Any, address: str) -> None:
    for _ in range(8):  # more than may wait
        with opened(browser, address) as page:
            run(page, prompt="ab", tokens=90)
            page.locator(".token").first.wait_for()
    with opened(browser, address) as page:
        ran(page)


def test_keyboard_alone(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.locator(".panel").first.wait_for()
        page.keyboard.press("Tab")
        page.keyboard.type("hello")
        page.keyboard.press("Control+Enter")
        page.get_by_text("done", exact=True).wait_for(timeout=PATIENCE)
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.locator(".token:focus").count():
                break
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
            page.keyboard.press(key)
        details = page.locator(".details").first
        assert "token 1" in details.text_content()
        page.keyboard.press("Enter")
        assert tokens_of(page).nth(1).get_attribute("aria-pressed") == "true"
        page.keyboard.press("End")
        assert "no pass has read it" in details.text_content()
        page.keyboard.press("Escape")
        assert page.locator('.token[aria-pressed="true"]').count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_for_people_with_disabilities(browser: Any, address: str, scheme: str) -> None:
    with opened(browser, address, color_scheme=scheme) as page:
        ran(page)
        tokens_of(page).nth(3).click()
        page.locator("details summary").first.click()
        assert findings(page) == []
        red, *_ = re.findall(r"\d+", page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))
        assert (int(red) < 60) == (scheme == "dark")


def test_a_narrow_screen_scrolls_down_only(browser: Any, address: str) -> None:
    with opened(browser, address, viewport={"width": 360, "height": 740}) as page:
        ran(page, tokens=40)
        wide, seen = page.locator("html").evaluate("root => [root.scrollWidth, root.clientWidth]")
        assert wide <= seen


def test_a_picture_is_saved_with_its_style(browser: Any, address: str, tmp_path: Path) -> None:
    with opened(browser, address) as page:
        ran(page)
        with page.expect_download() as download:
            page.get_by_role("button", name="Save as SVG").nth(1).click()
        download.value.save_as(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert 'fill="rgb(' in text


def test_two_hundred_requests_at_once_leave_the_server_answering(address: str) -> None:
    body = json.dumps({"prompt": "ab", "models": [0], "new_tokens": 4}).encode()
    statuses: list[int] = []
    refusals: list[str] = []

    def ask() -> None:
        request = urllib.request.Request(f"{address}api/generate", body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()
                statuses.append(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                refusals.append(json.loads(error.read())["error"])
            statuses.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 200
    assert {*statuses} == {200, 503}
    assert {*refusals} == {"too many requests wait already; try again in a moment"}
    with urllib.request.urlopen(address, timeout=20) as page:
        assert page.status == 200
    ask()
    assert statuses[-1] == 200


def test_ctrl_c_stops_within_a_second_while_it_computes(saved: Path) -> None:
    process, found = serve(saved)
    body = json.dumps({"prompt": "ab", "models": [0], "new_tokens": 90}).encode()
    request = urllib.request.Request(f"{found}api/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.readline()
        assert stop(process) < 1.0 or os.getloadavg()[0] > 2 * (os.cpu_count() or 1), "on a machine that is not busy"
    assert process.returncode == 0


def test_screenshots(browser: Any, saved: Path, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SKIPSTONE_SCREENSHOTS", tmp_path))
    runs = [Path(run) for run in os.environ.get("SKIPSTONE_VIEW_RUNS", f"{saved}").split(":")]
    prompt = os.environ.get("SKIPSTONE_VIEW_PROMPT", 'def greet(name):\n    """Say <b>hello</b>."""\n    return ')
    process, found = serve(*runs)
    for name, scheme, width, height in SHOTS:
        with opened(browser, found, color_scheme=scheme, viewport={"width": width, "height": height}) as page:
            ran(page, prompt=prompt, tokens=40)
            for panel in range(len(runs)):
                tokens_of(page, panel).nth(21).click()
            page.locator(".attention svg").nth(len(runs) - 1).wait_for()
            page.mouse.move(2, 2)
            page.locator("#status").click()
            page.screenshot(path=folder / f"view-{name}.png")
        assert 10_000 < (folder / f"view-{name}.png").stat().st_size < 200_000
    with opened(browser, found) as page:
        page.locator(".panel").first.wait_for()
        page.get_by_label("Draft").select_option("skip")
        ran(page, prompt=prompt, tokens=40)
        tokens_of(page).nth(30).click()
        page.locator(".attention svg").first.wait_for()
        page.mouse.move(2, 2)
        page.locator(".reading").first.screenshot(path=folder / "view-draft.png")
    stop(process)
