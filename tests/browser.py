"""The real Chromium of the system, for the tests of what people look at."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def require() -> str:
    """The browser's path; without one the test is skipped, or fails where VITRINE_REQUIRE says that it must be there."""
    if (found := next(filter(None, map(shutil.which, NAMES)), None)) is not None:
        return found
    message = f"there is no {', '.join(NAMES)} on PATH"
    if "chromium" in os.environ.get("VITRINE_REQUIRE", "").split(","):
        pytest.fail(f"VITRINE_REQUIRE asks for Chromium: {message}")
    pytest.skip(message)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser with a fresh profile, in a sandbox of its own only where it does not run as root."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require(), args=list(QUIET))
        try:
            yield browser
        finally:
            browser.close()
