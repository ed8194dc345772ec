"""OpenAI's route on a chat model inside a real Triton: the same answers as embedded, and slots that come free."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from export.config import MAX_STREAMS, render_config
from export.stage import write_triton_model
from tests.chat_repository import NAME, ROLES, add_chat
from tests.factories import make_jpeg
from tests.gateway import gateway
from tests.triton import serve

pytestmark = pytest.mark.triton

PATH = "/v1/chat/completions"
LONG = 15_000


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("triton") / "repository"
    for role, entry in zip(ROLES, add_chat(root, max_length=20_000), strict=True):
        (root / f"{NAME}.{role}" / "config.pbtxt").write_text(render_config(entry.manifest))
        if role == "decoder":
            write_triton_model(entry.path)
    return root


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[httpx2.Client]:
    settings: dict[str, Any] = {"default_chat": NAME, "chat_max_tokens": LONG}
    with (
        serve(repository) as triton,
        gateway(repository, backend="triton", triton_url=triton.url, **settings) as address,
        httpx2.Client(base_url=address, trust_env=False, timeout=60) as client,
    ):
        yield client


def body(text: str, *images: bytes, **fields: Any) -> dict[str, Any]:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in images]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]} | fields


def test_a_whole_answer_about_images(client: httpx2.Client) -> None:
    answer = client.post(PATH, json=body("hi", make_jpeg(15, 9), make_jpeg(8, 8), max_tokens=4)).json()
    assert answer["choices"][0]["message"]["content"] == "<=>?"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 9 + 8 + 4, "completion_tokens": 4, "total_tokens": 25}
    assert answer["vitrine"]["images"] == [{"width": 16, "height": 8}, {"width": 8, "height": 8}]


def test_a_stream_with_a_stop_string(client: httpx2.Client) -> None:
    *events, done, _ = client.post(PATH, json=body("hi", stream=True, stop="AB")).text.split("\n\n")
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == "<=>?@"
    assert (chunks[-1]["finish_reason"], done) == ("stop", "data: [DONE]")


def test_hanging_up_frees_the_slots(client: httpx2.Client) -> None:
    """All are taken by answers that would take minutes; the next is refused until they are left alone."""
    answers = [client.stream("POST", PATH, json=body("hi", max_tokens=LONG, stream=True)) for _ in range(MAX_STREAMS)]
    for answer in answers:
        assert answer.__enter__().status_code == 200
    try:
        refused = client.post(PATH, json=body("hi", max_tokens=1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "full")
    finally:
        for answer in answers:
            answer.__exit__(None, None, None)
    until = time.monotonic() + 20
    while client.post(PATH, json=body("hi", max_tokens=1)).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.05)
