"""The `openai` client, this gateway and a chat server of another make, each a process of its own."""

import base64
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.factories import make_jpeg
from tests.gateway import gateway
from tests.model_server import make_model, model_server
from tests.repository import make_repository

MOST_TOKENS = 4000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    make_model(folder)
    return folder


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    repository = make_repository(tmp_path_factory.mktemp("gateway") / "repository")
    with model_server(model) as server, gateway(repository, chat_upstream=server, chat_max_tokens=MOST_TOKENS) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="theirs", max_retries=0, timeout=120) as client:
        yield client


def question(*images: bytes) -> list[Any]:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in images]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]}]


def metric(address: str, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(httpx2.get(f"{address}/metrics", trust_env=False).text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_an_answer_about_images(client: OpenAI, model: Path) -> None:
    asked: dict[str, Any] = {"model": str(model), "max_tokens": 5, "temperature": 0}
    plain = client.chat.completions.create(messages=question(), **asked)
    turned = client.chat.completions.create(messages=question(make_jpeg(200, 60, orientation=6)), **asked)
    assert plain.usage is not None
    assert turned.usage is not None
    assert turned.usage.completion_tokens == 5
    assert turned.usage.prompt_tokens > plain.usage.prompt_tokens
    assert turned.choices[0].finish_reason == "length"
    assert turned.model_extra == {"vitrine": {"images": [{"width": 60, "height": 200}]}}


def test_a_stream_comes_as_it_is_made(client: OpenAI, address: str, model: Path) -> None:
    before = metric(address, "vitrine_chat_tokens_total", kind="completion")
    began = time.monotonic()
    arrived, finish = [], None
    with client.chat.completions.create(model=str(model), messages=question(), max_tokens=200, stream=True) as stream:
        for chunk in stream:
            arrived.append(time.monotonic() - began)
            finish = chunk.choices[0].finish_reason or finish
    assert finish == "length"
    assert len(arrived) > 20
    assert arrived[1] < arrived[-1] / 2
    assert metric(address, "vitrine_chat_tokens_total", kind="completion") == before + 200


def test_hanging_up_ends_the_work_behind(client: OpenAI, address: str, model: Path) -> None:
    """It answers one question after the other: the next one would wait for thousands of tokens."""
    with client.chat.completions.create(model=str(model), messages=question(), max_tokens=MOST_TOKENS, stream=True) as stream:
        began = time.monotonic()
        for _ in range(20):
            next(stream)
        left = (time.monotonic() - began) / 20 * (MOST_TOKENS - 20)
    began = time.monotonic()
    client.chat.completions.create(model=str(model), messages=question(), max_tokens=1)
    assert time.monotonic() - began < left / 3
    assert metric(address, "vitrine_chat_seconds_count", outcome="cancelled") == 1
    assert metric(address, "vitrine_request_seconds_count", task="chat", code="499") == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "/another/model"}, None),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"max_tokens": MOST_TOKENS + 1}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
)
def test_refusals_reach_the_client(client: OpenAI, model: Path, fields: dict[str, Any], param: str | None) -> None:
    asked: dict[str, Any] = {"model": str(model), "messages": question(), "max_tokens": 1} | fields
    with pytest.raises(APIStatusError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.status_code in (400, 422)
    assert caught.value.param == param
    assert str(model) not in str(caught.value.body)
