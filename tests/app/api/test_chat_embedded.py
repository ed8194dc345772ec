"""Chat models of the repository over HTTP: a model whose answers count on from the question's last letter."""

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app.api.chat_schemas import ChatCompletionResponse
from app.main import create_app
from app.settings import Settings
from tests.chat_repository import MAX_LENGTH, VOCABULARY, add_chat, poison_token
from tests.factories import make_jpeg
from tests.gateway import gateway

PATH = "/v1/chat/completions"
LONG = 100_000


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`counter` has room for little; `talker` goes on counting, since none of its tokens is the one that ends."""
    root = tmp_path_factory.mktemp("chat") / "repository"
    add_chat(root)
    add_chat(root, "talker", max_length=LONG, end_token_ids=(VOCABULARY,))
    poison_token(add_chat(root, "faller"), ord("@"))
    return root


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[TestClient]:
    settings = Settings(_env_file=None, repository=repository, repository_poll=0, default_chat="counter", max_images=3)
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        yield client


def body(text: str, *images: bytes, **fields: Any) -> dict[str, Any]:
    urls = [f"data:image/jpeg;base64,{base64.b64encode(image).decode()}" for image in images]
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]} | fields


def chunks(answer: httpx2.Response) -> list[dict[str, Any]]:
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def metric(text: str, name: str, **labels: str) -> float:
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name]
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


def test_a_whole_answer(client: TestClient) -> None:
    answer = client.post(PATH, json=body("hi", max_tokens=4)).json()
    ChatCompletionResponse.model_validate(answer)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "<=>?"}  # the prompt ends with ";"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    assert (answer["model"], answer["vitrine"]) == ("counter", {"images": []})


def test_a_stream_has_the_same_text(client: TestClient) -> None:
    answer = client.post(PATH, json=body("hi", max_tokens=4, stream=True, stream_options={"include_usage": True}))
    first, *middle, last, usage = chunks(answer)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert first["vitrine"] == {"images": []}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in middle] == ["<", "=", ">", "?"]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 13)
    assert {chunk["id"] for chunk in (first, *middle, last, usage)} == {first["id"]}
    assert all(chunk["usage"] is None for chunk in (first, *middle, last))


def test_without_a_wish_there_is_no_usage_in_a_stream(client: TestClient) -> None:
    assert not any("usage" in chunk for chunk in chunks(client.post(PATH, json=body("hi", max_tokens=2, stream=True))))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer(client: TestClient, stream: bool) -> None:
    answer = client.post(PATH, json=body("hi", stop=["?@A", "nothing"], stream=stream))
    if stream:
        choices = [chunk["choices"][0] for chunk in chunks(answer)]
        text, finish = "".join(choice["delta"].get("content", "") for choice in choices), choices[-1]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert (text, finish) == ("<=>", "stop")


def test_the_size_that_the_model_saw(client: TestClient) -> None:
    """Sides are multiples of 4 here, and all pixels together at most 512."""
    plain = client.post(PATH, json=body("hi", make_jpeg(15, 9), max_tokens=1)).json()
    assert plain["vitrine"]["images"] == [{"width": 16, "height": 8}]
    assert plain["usage"]["prompt_tokens"] == 9 + 8
    turned = client.post(PATH, json=body("hi", make_jpeg(15, 9, orientation=6), make_jpeg(300, 300), max_tokens=1)).json()
    assert turned["vitrine"]["images"] == [{"width": 8, "height": 16}, {"width": 20, "height": 20}]


def test_a_model_is_asked_by_its_name_and_is_listed(client: TestClient) -> None:
    assert client.post(PATH, json=body("hi", model="talker@1", max_tokens=1)).json()["model"] == "talker"
    rows = {row["id"]: row for row in client.get("/v1/models").json()["data"]}
    assert (rows["counter"]["task"], rows["counter"]["default"], rows["talker"]["default"]) == ("chat", True, False)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"model": "counter@7"}, 404, "model"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 422, "messages[0].role"),
        ({"messages": []}, 422, "messages"),
        ({"messages": [{"role": "user", "content": "x" * MAX_LENGTH}]}, 422, "messages"),
        ({"messages": [{"role": "user", "content": "<|image|>"}]}, 422, "messages"),
        ({"max_tokens": MAX_LENGTH}, 422, "max_tokens"),
        ({"max_completion_tokens": MAX_LENGTH}, 422, "max_completion_tokens"),
        ({"max_tokens": 5000}, 422, "max_tokens"),
        ({"n": 2}, 422, "n"),
        ({"tools": [{}]}, 422, "tools"),
        ({"logprobs": True}, 422, "logprobs"),
        ({"response_format": {"type": "json_object"}}, 422, "response_format"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client: TestClient, fields: dict[str, Any], status: int, param: str, stream: bool) -> None:
    answer = client.post(PATH, json=body("hi", stream=stream) | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")


def test_images_are_refused_by_their_place(client: TestClient) -> None:
    for images, status, param in (
        ([make_jpeg(8, 8), b"none"], 415, "messages[0].content[1].image_url.url"),
        ([make_jpeg(8, 8), make_jpeg(801, 4)], 422, "messages[0].content[1].image_url.url"),
        ([make_jpeg(8, 8)] * 4, 413, "messages"),
    ):
        answer = client.post(PATH, json=body("hi", *images))
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_an_image_that_does_not_decode_is_counted(client: TestClient) -> None:
    before = metric(client.get("/metrics").text, "vitrine_decode_failures_total", format="unknown")
    client.post(PATH, json=body("hi", b"none"))
    assert metric(client.get("/metrics").text, "vitrine_decode_failures_total", format="unknown") == before + 1


def test_the_default_ends_where_the_model_has_no_more_room(client: TestClient) -> None:
    answer = client.post(PATH, json=body("hi")).json()
    assert answer["usage"]["total_tokens"] == MAX_LENGTH
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_fault_after_the_first_token_is_an_event(client: TestClient) -> None:
    answer = client.post(PATH, json=body("hi", model="faller", stream=True))
    assert answer.status_code == 200
    *told, error = chunks(answer)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in told) == "<=>?@"
    assert (error["error"]["code"], error["error"]["type"]) == ("inference_failed", "server_error")
    assert metric(client.get("/metrics").text, "vitrine_chat_seconds_count", model="faller", outcome="error") == 1


def test_a_fault_in_a_whole_answer_is_a_status(client: TestClient) -> None:
    answer = client.post(PATH, json=body("hi", model="faller"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "inference_failed")
    assert client.post(PATH, json=body("hi", model="faller", max_tokens=3)).status_code == 200


def test_the_time_of_an_answer_is_bounded(repository: Path) -> None:
    settings = Settings(
        _env_file=None, repository=repository, repository_poll=0, default_chat="talker", chat_timeout=0.5, chat_max_tokens=LONG
    )
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        *told, error = chunks(client.post(PATH, json=body("hi", stream=True)))
        assert told
        assert error["error"]["code"] == "deadline_exceeded"
        assert client.post(PATH, json=body("hi")).status_code == 504
        until(lambda: metric(client.get("/metrics").text, "vitrine_chat_streams", model="talker") == 0)


@pytest.fixture(scope="module")
def address(repository: Path) -> Iterator[str]:
    with gateway(repository, default_chat="talker", chat_streams=2, chat_queue=1, chat_max_tokens=LONG) as url:
        yield url


@pytest.fixture
def openai(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: OpenAI, tokens: int, **fields: Any) -> Any:
    return client.chat.completions.create(model="talker", messages=[{"role": "user", "content": "hi"}], max_tokens=tokens, **fields)


def until(true: Any) -> None:
    limit = time.monotonic() + 20
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


def gauge(address: str, name: str, **labels: str) -> float:
    return metric(httpx2.get(f"{address}/metrics", trust_env=False).text, name, **labels)


def alive(address: str) -> float:
    return gauge(address, "vitrine_chat_streams", model="talker")


def test_the_openai_client_streams(openai: OpenAI) -> None:
    with ask(openai, 5, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "<=>?@"
    assert ask(openai, 5).choices[0].message.content == "<=>?@"


def test_answers_grow_side_by_side_and_the_rest_waits_or_is_refused(openai: OpenAI, address: str) -> None:
    with ask(openai, LONG // 2, stream=True) as first, ask(openai, LONG // 2, stream=True) as second:
        assert next(first).id != next(second).id
        assert alive(address) == 2
        waited = threading.Thread(target=ask, args=(openai, 3))
        waited.start()
        until(lambda: gauge(address, "vitrine_queue_depth", engine="talker.decoder@1") == 1)
        full = httpx2.post(f"{address}{PATH}", json=body("hi"), trust_env=False)
        assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
        assert "retry-after" in full.headers
        assert waited.is_alive()
    waited.join(20)
    assert not waited.is_alive()
    until(lambda: alive(address) == 0)


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_frees_the_slot(openai: OpenAI, address: str, stream: bool) -> None:
    """The answer would take minutes: the slot is free because nobody waits, not because it has ended."""
    until(lambda: alive(address) == 0)
    if stream:
        with ask(openai, LONG // 2, stream=True) as answer:
            next(answer)
            assert alive(address) == 1
    else:
        with httpx2.Client(trust_env=False, timeout=0.5) as client, pytest.raises(httpx2.ReadTimeout):
            client.post(f"{address}{PATH}", json=body("hi", max_tokens=LONG // 2))
    hung_up = time.monotonic()
    until(lambda: alive(address) == 0)
    assert time.monotonic() - hung_up < 2


def test_far_too_much_text_is_not_even_read(client: TestClient) -> None:
    """A megabyte would take the tokenizer a second, and 32 of them may come."""
    started = time.process_time()
    answer = client.post("/v1/chat/completions", json=body("a" * 2_000_000))
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "messages")
    assert "characters; at most" in answer.json()["error"]["message"]
    assert time.process_time() - started < 0.5


def test_too_many_messages_are_refused_before_they_are_looked_at(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}] * 5000})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "messages")
    assert "4096" in answer.json()["error"]["message"]


@pytest.mark.parametrize("where", ['"\\ud800": 1', '"model": "\\ud800"'])
def test_half_a_character_is_told_as_its_escape(client: TestClient, where: str) -> None:
    sent = f'{{"messages": [{{"role": "user", "content": "a"}}], {where}}}'
    answer = client.post("/v1/chat/completions", content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code in (404, 422)
    assert answer.json()["error"]["message"]
