"""Headless Chromium on the page of `unclip serve`: for the tests, and for the screenshot in the README.

`python -m tests.pipelines.serving.browser http://127.0.0.1:8000/ docs/page.png` makes the screenshot.
"""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
QUIET += ("--disable-sync", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1")
SHOWN = {
    "a big blue star on a white background": 4,
    "a tiny green triangle on black": 4,
    "a large yellow cross on a purple background": 4,
    "a large red cross on the left on white": 3,
}
"""Captions of the screenshot, and numbers of images."""


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium; it can reach no other host."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail(f"none of {', '.join(NAMES)} was found. Install one, for example with `apt-get install chromium`.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=list(QUIET))
        try:
            yield browser
        finally:
            browser.close()


@dataclasses.dataclass
class Watched:
    """A page, with all that must not happen on it."""

    page: Page
    complaints: list[str] = dataclasses.field(default_factory=list)
    """Errors and warnings of the console, and exceptions."""
    hosts: set[str | None] = dataclasses.field(default_factory=set)
    """Hosts that it asked for anything; None for its own blobs."""


def open_page(context: BrowserContext, address: str) -> Watched:
    """Open the page, and wait until it offers models."""
    watched = Watched(context.new_page())
    page = watched.page
    page.on("console", lambda line: watched.complaints.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    context.on("request", lambda request: watched.hosts.add(urlsplit(request.url).hostname))
    page.goto(address)
    page.wait_for_selector("#model option", state="attached", timeout=60_000)
    return watched


@contextlib.contextmanager
def finished(page: Page) -> Iterator[None]:
    """Wait for the images of the request that the block sends."""
    count = page.locator("#history li").count()
    yield
    page.wait_for_selector(
        f"#history li:nth-child({count + 1}), #problem:not(:empty)", state="attached", timeout=120_000
    )
    assert page.inner_text("#problem") == ""


def screenshot(address: str, path: Path) -> None:
    with chromium() as browser:
        context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
        page = open_page(context, address).page
        for caption, count in SHOWN.items():
            page.fill("#caption", caption)
            page.uncheck("#random")
            page.fill("#seed", "1")
            page.fill("#count", str(count))
            with finished(page):
                page.press("#caption", "Enter")
        page.evaluate("Promise.all([...document.images].filter((image) => image.src).map((image) => image.decode()))")
        page.screenshot(path=path)


if __name__ == "__main__":
    screenshot(sys.argv[1], Path(sys.argv[2]))
