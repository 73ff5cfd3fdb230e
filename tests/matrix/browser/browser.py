"""Debian's Chromium, driven by Playwright, and what a page may not do in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
PHONE = {"width": 360, "height": 740}
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Two browsers and a model may share a core.
_PATIENCE_MS = 60_000
expect.set_options(timeout=_PATIENCE_MS)
# What WCAG 2 asks for, up to AA, and what its authors recommend.
_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_at(browser: Browser, url: str, **settings: object) -> Iterator[Page]:
    """A page of its own; fails if anything goes elsewhere, or the console has an error."""
    context = browser.new_context(**settings)
    page, wrong = context.new_page(), []
    home = urlsplit(url).netloc

    def asked(request):
        if not request.url.startswith(("blob:", "data:")) and urlsplit(request.url).netloc != home:
            wrong.append(f"asks {request.url}")

    page.on("request", asked)
    page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.set_default_timeout(_PATIENCE_MS)
    try:
        page.goto(url)
        yield page
        expected = getattr(page, "expected_errors", ())
        assert [text for text in wrong if not any(word in text for word in expected)] == []
    finally:
        context.close()


def violations(page: Page) -> list[str]:
    """What axe finds against accessibility."""
    found = Axe().run(page, options=_RULES).response["violations"]
    return [
        f"{one['id']}: {node['html']} {node.get('failureSummary')}"
        for one in found
        for node in one["nodes"]
    ]
