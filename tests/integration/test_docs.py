"""The page /docs in a real browser: under its own policy it lists the routes, and asks one with a key that it is given."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from app.keys import make_key
from tests.browser import chromium
from tests.gateway import gateway
from tests.repository import make_repository

KEY, KNOWN = make_key("reader")


@pytest.fixture
def page() -> Iterator[Page]:
    with chromium() as browser, browser.new_context() as context:
        yield context.new_page()


def test_lists_the_routes_and_asks_one(page: Page, tmp_path: Path) -> None:
    complaints: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    with gateway(make_repository(tmp_path / "repository"), default_classify="colours", api_keys=KNOWN) as url:
        page.goto(f"{url}/docs")
        expect(page.locator("#operations-tasks-classify")).to_be_visible()
        page.get_by_role("button", name="Authorize").first.click()
        dialog = page.locator(".dialog-ux")
        dialog.get_by_label("auth-bearer-value").fill(KEY)
        dialog.get_by_role("button", name="Apply credentials").first.click()
        dialog.get_by_role("button", name="Close").first.click()
        models = page.locator("#operations-models-models_v1_models_get")
        models.locator(".opblock-summary-control").click()
        models.get_by_role("button", name="Try it out").click()
        models.get_by_role("button", name="Execute").click()
        expect(models.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
        expect(models.locator(".live-responses-table")).to_contain_text("colours")
    assert not complaints
    assert {address for address in asked if not address.startswith((f"{url}/", "data:"))} == set()
