"""The status page in a real browser, on a real gateway under load: what it shows is what was sent, and its charts are drawn."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from app.keys import make_key
from tests.browser import chromium
from tests.factories import encode
from tests.gateway import free_port, gateway
from tests.repository import make_repository

PHOTO = encode(Image.effect_noise((640, 480), 60).convert("RGB"), "JPEG")
EVERY = 0.5  # seconds between the page's looks
WINDOW = 10 * EVERY
SENDERS = 2
PAUSE = 0.04  # seconds between two requests of one sender
BROKEN = 10  # every so many requests there is one that is no image

INKED = """
([chart, name]) => {
    const copy = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    copy.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    copy.fillRect(0, 0, 1, 1);
    const wanted = copy.getImageData(0, 0, 1, 1).data;
    const canvas = document.querySelector(`#${chart}-chart canvas`);
    Object.assign(copy.canvas, { width: canvas.width, height: canvas.height });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    let count = 0;
    for (let pixel = 0; pixel < data.length; pixel += 4)
        if (data[pixel + 3] > 200 && [0, 1, 2].every((band) => Math.abs(data[pixel + band] - wanted[band]) < 24)) count += 1;
    return count;
}
"""


class Load:
    """Requests at a steady pace from a few threads; `sent` holds the moment of every answer and its status."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sent: deque[tuple[float, int]] = deque()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send, args=(number,)) for number in range(SENDERS)]

    def _send(self, number: int) -> None:
        with httpx2.Client(base_url=self.url, timeout=30) as client:
            while not self._stop.wait(PAUSE):
                number += 1
                content = b"no image" if number % BROKEN == 0 else PHOTO
                status = client.post("/v1/classify", content=content).status_code
                self.sent.append((time.monotonic(), status))

    @contextmanager
    def running(self) -> Iterator["Load"]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def answers(self, seconds: float) -> list[int]:
        """The statuses of the last `seconds`."""
        since = time.monotonic() - seconds
        return [status for moment, status in list(self.sent) if moment >= since]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("status") / "repository")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="en-GB")
    page.set_default_timeout(30_000)
    yield page
    page.context.close()


def shown(page: Page, name: str) -> float:
    """The number in the figure `name`, without its unit."""
    text = page.locator(f"#{name}").inner_text()
    return float(text.replace(",", "").split()[0].rstrip("%"))


def shares(page: Page) -> dict[str, float]:
    """Per cent of the time that each row of the table of stages names."""
    rows = [row.split("\t") for row in page.locator("#stages").inner_text().splitlines()]
    return {stage: float(share.rstrip("%")) for stage, _, share in rows}


def inked(page: Page, chart: str, series: str) -> int:
    """How many pixels of the chart have the colour of the series."""
    return int(page.evaluate(INKED, [chart, series]))


def test_shows_what_was_sent_and_draws_it(browser: Browser, page: Page, repository: Path, tmp_path: Path) -> None:
    complaints: list[str] = []
    asked: set[str] = set()
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.add(request.url))
    with gateway(repository, default_classify="colours") as url, Load(url).running() as load:
        page.goto(f"{url}/status?every={EVERY}")
        expect(page.locator("#state")).to_have_attribute("data-state", "live")
        page.wait_for_timeout(1500 * WINDOW)

        answers = load.answers(WINDOW)
        assert shown(page, "requests") == pytest.approx(len(answers) / WINDOW, rel=0.25)
        assert shown(page, "images") == pytest.approx(answers.count(200) / WINDOW, rel=0.25)
        assert shown(page, "client-errors") == pytest.approx(100 / BROKEN, rel=0.5)
        assert shown(page, "server-errors") == 0
        assert 0 < shown(page, "p50") <= shown(page, "p90") <= shown(page, "p99")
        assert shown(page, "batch-size") >= 1
        assert 0 <= shown(page, "in-flight") <= SENDERS
        assert page.locator("#backend").inner_text() == "onnxruntime up"
        assert page.locator("#models").inner_text().split() == ["colours", "1", "onnxruntime", "fp32"]
        assert sum(shares(page).values()) == pytest.approx(100, abs=3)

        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            for width in (1280, 400):
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(1000 * EVERY)
                page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{width} px are too narrow"
                assert_drawn(page)
    assert not complaints
    assert {address for address in asked if not address.startswith(f"{url}/")} == set()


def assert_drawn(page: Page) -> None:
    """Every series that has something to show has left its colour on its chart."""
    lines = {"throughput": ("ok", "client-errors"), "latency": ("p50", "p90", "p99"), "load": ("in-flight", "batch-size")}
    for chart, names in lines.items():
        assert {name: inked(page, chart, name) for name in names if inked(page, chart, name) < 30} == {}, chart
    large = [stage for stage, share in shares(page).items() if share >= 10]
    assert len(large) >= 2
    assert {stage: inked(page, "stages", stage) for stage in large if inked(page, "stages", stage) < 200} == {}


def test_says_when_there_is_no_traffic_and_when_the_server_is_away(page: Page, repository: Path) -> None:
    state, port = page.locator("#state"), free_port()
    settings = {"port": port, "default_classify": "colours"}
    with gateway(repository, **settings) as url:
        page.goto(f"{url}/status?every=0.2")
        expect(state).to_contain_text(f"No requests yet. Send one: curl --data-binary @photo.jpg {url}/v1/classify")
        for _ in range(20):
            httpx2.post(f"{url}/v1/classify", content=PHOTO)
        expect(state).to_have_attribute("data-state", "live")
        assert shown(page, "requests") > 0
    expect(state).to_contain_text("No answer since")
    expect(page.locator("#requests")).to_have_text("–")
    assert inked(page, "latency", "p99") > 0, "what was seen before stays in the charts"
    with gateway(repository, **settings) as url:
        expect(state).to_contain_text("No requests yet")
        httpx2.post(f"{url}/v1/classify", content=PHOTO)
        expect(state).to_have_attribute("data-state", "live")


def test_asks_for_a_key_where_keys_are_set(page: Page, repository: Path) -> None:
    (scraper, known), (stranger, _) = make_key("scrape", "monitor"), make_key("nobody")
    state, form = page.locator("#state"), page.locator("#ask-key")
    with gateway(repository, default_classify="colours", api_keys=known) as url:
        page.goto(f"{url}/status?every=0.2")
        expect(state).to_contain_text("wants an API key")
        for key, text in ((stranger, "may not read"), (scraper, "No requests")):
            form.get_by_label("API key").fill(key)
            form.get_by_role("button").click()
            expect(state).to_contain_text(text)
        expect(form).to_be_hidden()
        page.reload()
        expect(state).to_contain_text("No requests")
        assert scraper not in page.url


@pytest.fixture(scope="module")
def calculator(browser: Browser, repository: Path) -> Iterator[Page]:
    """A page on which `metrics` is the module that computes."""
    with gateway(repository, default_classify="colours") as url, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{url}/livez")
        page.evaluate("async (url) => { window.metrics = await import(url); }", f"{url}/status/assets/metrics.js")
        yield page


SCRAPE = r"""
# HELP t_seconds Time.
# TYPE t_seconds histogram
t_seconds_bucket{{code="200",le="0.01"}} {0}
t_seconds_bucket{{code="200",le="0.1"}} {1}
t_seconds_bucket{{code="200",le="+Inf"}} {2}
t_seconds_count{{code="200"}} {2}
t_seconds_sum{{code="200"}} {2}
# TYPE odd gauge
odd{{name="a}} \"b\" \\n c",other=""}} 1.5e-3
"""


def test_reads_the_text_format(calculator: Page) -> None:
    (odd,) = calculator.evaluate("(text) => metrics.gauges(metrics.parse(text, 0), 'odd')", SCRAPE.format(0, 0, 0))
    assert odd == {"name": "odd", "labels": {"name": 'a} "b" \\n c', "other": ""}, "value": 0.0015}


@pytest.mark.parametrize(
    ("q", "counts", "expected"),
    [
        (0.5, (10, 20, 20), 0.01),
        (0.25, (10, 20, 20), 0.005),
        (0.75, (10, 20, 20), 0.055),
        (0.5, (0, 20, 20), 0.055),
        (0.99, (0, 0, 20), 0.1),
        (0.5, (0, 0, 0), None),
    ],
)
def test_quantiles_are_those_of_prometheus(
    calculator: Page, q: float, counts: tuple[int, int, int], expected: float | None
) -> None:
    script = """([q, first, last]) => {
        const sliding = new metrics.Window(10);
        sliding.add(metrics.parse(first, 1));
        sliding.add(metrics.parse(last, 3));
        return metrics.quantile(q, sliding.increases("t_seconds_bucket"));
    }"""
    texts = [SCRAPE.format(5, 6, 7), SCRAPE.format(*(count + base for count, base in zip(counts, (5, 6, 7), strict=True)))]
    found = calculator.evaluate(script, [q, *texts])
    assert found == (None if expected is None else pytest.approx(expected))


def test_a_window_slides_and_begins_again_with_a_new_server(calculator: Page) -> None:
    script = """(texts) => {
        const sliding = new metrics.Window(2);
        return texts.map((text, at) => {
            sliding.add(metrics.parse(text, at));
            return [sliding.seconds, metrics.total(sliding.increases("t_seconds_count"))];
        });
    }"""
    texts = [SCRAPE.format(count, count, count) for count in (100, 110, 120, 150, 4, 6)]
    assert calculator.evaluate(script, texts) == [[0, 0], [1, 10], [2, 20], [2, 40], [0, 0], [1, 2]]
