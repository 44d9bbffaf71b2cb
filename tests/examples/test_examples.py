"""Every file in examples/ runs unchanged and prints what it should, and opens as a notebook.

The quick tests run the cells without marimo; the slow ones run them by marimo, as a script and as a page in a browser.
SKIPSTONE_SCREENSHOTS=FOLDER keeps pictures of the pages.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers

from browser import chromium
from examples import plain_marimo
from skipstone.mechanisms import DEPTH

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
PATIENCE = 480  # seconds; on a machine that is not busy, a page is ready in less than one minute
LOG = "log.txt"
STEPS = ("--steps", "80" if "SKIPSTONE_SCREENSHOTS" in os.environ else "8")
SAYS = {
    "adapt_checkpoint": "the result is a Hugging Face model: SkipstoneForCausalLM",
    "add_a_mechanism": "computing the kept tokens alone changes logits by at most",
    "route_any_decoder": "the same without a cache: True",
    "route_your_block": "what the first routed block computes:",
    "watch_who_skips": "computed by block 3",
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    assert transformers.Trainer  # loaded before it can take the stand-in for a notebook

    def run(name: str, **arguments: object) -> str:
        monkeypatch.setitem(sys.modules, "marimo", plain_marimo.module(**arguments))
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    yield run
    DEPTH.pop("sluice", None)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SAYS}


def test_route_your_block(ran: Callable[..., str]) -> None:
    printed = ran("route_your_block", steps=2)
    assert "every token    loss" in printed
    assert "routed, 25 %   loss" in printed
    shown = printed.splitlines()[-1]
    assert len(shown) - shown.count("·") == int(len(shown) * 0.25)


@pytest.mark.filterwarnings("ignore::UserWarning")  # four steps: thresholds that have hardly moved
def test_watch_who_skips(ran: Callable[..., str]) -> None:
    printed = ran("watch_who_skips", steps=4)
    assert "computed by block 1" in printed
    assert "computed by block 3" in printed
    assert "64% of the dense model's" in printed


@pytest.mark.filterwarnings("ignore::UserWarning")  # two steps: thresholds that have hardly moved
def test_route_any_decoder(ran: Callable[..., str]) -> None:
    printed = ran("route_any_decoder", steps=2)
    assert "tokens times blocks that were computed" in printed
    assert "the same without a cache: True" in printed


def test_add_a_mechanism(ran: Callable[..., str]) -> None:
    printed = ran("add_a_mechanism", steps=2)
    moved = [float(found) for found in re.findall(r"logits by at most (\S+)", printed)]
    assert len(moved) == 2
    assert max(moved) < 1e-4
    assert "updates that a causal pass computes: 100%" in printed, "two steps: all sluices are still open"


@pytest.mark.slow
def test_adapt_checkpoint(ran: Callable[..., str]) -> None:
    lines = ran("adapt_checkpoint").splitlines()
    source, adapted = (next(line for line in lines if line.startswith(name)) for name in ("source", "adapted"))
    flops = [int(line.split(" nats a token, ")[1].split(" FLOPs")[0].replace(",", "")) for line in (source, adapted)]
    assert flops[1] <= 0.84 * flops[0]  # the budget, 5 % missed at the most
    assert lines[-1].endswith("SkipstoneForCausalLM")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs_by_marimo_as_a_script(name: str, tmp_path: Path) -> None:
    pytest.importorskip("marimo", reason="marimo is not installed")
    words = [sys.executable, str(EXAMPLES / f"{name}.py"), *STEPS]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[name] in done.stdout
    checked = subprocess.run(
        [sys.executable, "-m", "marimo", "check", "--strict", words[1]], capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("verb", "name"), [*(("run", name) for name in sorted(SAYS)), ("edit", "watch_who_skips")], ids=lambda value: value
)
def test_an_example_opens_in_a_browser(verb: str, name: str, tmp_path: Path) -> None:
    for package in ("marimo", "IPython"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    shots = Path(os.environ.get("SKIPSTONE_SCREENSHOTS", tmp_path))
    with chromium() as browser, notebook(verb, name, tmp_path) as address:
        page = browser.new_page(viewport={"width": 1000, "height": 1000})
        page.goto(address, wait_until="commit", timeout=PATIENCE * 1000)  # marimo's scripts are several megabytes
        wait(page.get_by_role("heading", level=1).first, tmp_path)
        shown = page.locator(".markdown li" if name == "route_any_decoder" else ".skipstone pre.depth span").first
        if verb == "edit":  # marimo runs no cell before it is asked to; the code is there
            shown = page.get_by_text("SkipstoneConfig").first
        wait(shown, tmp_path)
        page.wait_for_timeout(1000)  # what follows it
        assert page.get_by_text("Traceback").count() == 0
        shown.scroll_into_view_if_needed()
        page.screenshot(path=shots / f"example-{name}.png" if verb == "run" else tmp_path / "edit.png")


def wait(shown: Any, folder: Path) -> None:
    """Wait until something is shown; fail at once if a cell of the notebook has failed."""
    end = time.monotonic() + PATIENCE
    while not shown.is_visible():
        log = (folder / LOG).read_text(encoding="utf-8")
        assert "Traceback" not in log, log[-2000:]
        assert time.monotonic() < end, f"nothing is shown after {PATIENCE} seconds"
        shown.page.wait_for_timeout(500)


@contextmanager
def notebook(verb: str, name: str, folder: Path) -> Iterator[str]:
    """Serve a copy of an example by marimo, as it is started for a page without a token."""
    copy = shutil.copy(EXAMPLES / f"{name}.py", folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "marimo",
        "-y",
        verb,
        str(copy),
        "--headless",
        "--no-token",
        "--port",
        str(port),
        "--",
        *STEPS,
    ]
    with (folder / LOG).open("w", encoding="utf-8") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment(), cwd=folder)
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}
