"""Tests of pages in a real browser: Chromium by Playwright, which records everything that a page must never do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

SERIOUS = ("serious", "critical")


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a Chromium browser; skip the test where Playwright or Chromium is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """Open a page; fail for console errors, errors of scripts, and requests to anything but `address`."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if allowed(request.url, address) else wrong.append(request.url))
    page.goto(address)
    yield page
    context.close()
    assert wrong == []


def allowed(url: str, address: str) -> bool:
    """Return whether a request for `url` stays on the page at `address`."""
    return url.startswith((address, "data:", f"blob:{address}", "blob:null"))


def findings(page: Any) -> list[str]:
    """Return the serious findings of axe-core on a page, a line each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:120]}" for one in found if one["impact"] in SERIOUS for node in one["nodes"][:2]
    ]
