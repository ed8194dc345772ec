"""What is refused of a chat request, and under which parameter's name."""

from typing import Any

import pytest

from app.api.chat_schemas import ChatRequest, read_chat
from app.errors import InvalidValueError, TooLargeError

HELLO = {"role": "user", "content": "hello"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def read(**fields: Any) -> ChatRequest:
    return read_chat({"messages": [HELLO]} | fields, max_images=2, max_tokens=100)


def said(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [HELLO, 1]}, "messages[1].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [said()]}, "messages[0].content"),
        ({"messages": [said({"type": "input_audio"})]}, "messages[0].content[0].type"),
        ({"messages": [said({"text": "x"})]}, "messages[0].content[0].type"),
        ({"messages": [said({"type": "text", "text": "x"}, {"type": "text"})]}, "messages[0].content[1].text"),
        ({"messages": [HELLO, said({"type": "image_url"})]}, "messages[1].content[0].image_url"),
        ({"messages": [said({"type": "image_url", "image_url": None})]}, "messages[0].content[0].image_url"),
        ({"messages": [said({"type": "image_url", "image_url": "data:"})]}, "messages[0].content[0].image_url"),
        ({"messages": [said({"type": "image_url", "image_url": {}})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [said({"type": "image_url", "image_url": {"url": ""}})]}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "system", "content": [PICTURE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [HELLO | {"colour": "red"}]}, "messages[0].colour"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {}}, "prediction"),
        ({"store": True}, "store"),
        ({"colour": "red"}, "colour"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"colour": True}}, "stream_options.colour"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"model": "x" * 201}, "model"),
    ],
)
def test_a_refusal_names_its_parameter(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        read(**fields)
    assert caught.value.field == param
    assert param in caught.value.detail


def test_too_many_images_are_counted_over_all_messages() -> None:
    with pytest.raises(TooLargeError, match="3 images") as caught:
        read(messages=[said(PICTURE, PICTURE), said(PICTURE)])
    assert caught.value.field == "messages"


def test_what_asks_for_nothing_is_taken() -> None:
    asked = read(
        n=1, tools=[], tool_choice="auto", logprobs=False, modalities=["text"], store=False, user="me", metadata={"a": "b"},
        temperature=None, frequency_penalty=0, response_format={"type": "text"},
    )  # fmt: skip
    assert asked.engine_dependent == []
    assert asked.temperature is None


def test_what_only_another_engine_knows_is_told() -> None:
    asked = read(logprobs=True, response_format={"type": "json_object"}, presence_penalty=0.5)
    assert asked.engine_dependent == ["presence_penalty", "logprobs", "response_format"]


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {"role": "assistant", "content": "a cat", "refusal": None, "annotations": None, "tool_calls": None, "audio": None}
    assert [message.role for message in read(messages=[HELLO, answer, HELLO]).messages] == ["user", "assistant", "user"]


def test_the_images_in_their_order_with_their_names() -> None:
    other = {"type": "image_url", "image_url": {"url": "data:other", "detail": "low"}}
    asked = read(messages=[said({"type": "text", "text": "x"}, PICTURE), HELLO, said(other)])
    assert [(name, part.image_url.url[:10]) for name, part in asked.image_parts()] == [
        ("messages[0].content[1].image_url.url", "data:image"),
        ("messages[2].content[0].image_url.url", "data:other"),
    ]


def test_both_names_of_the_limit() -> None:
    assert read(max_tokens=3).most_tokens == 3
    assert read(max_completion_tokens=4).most_tokens == 4
    assert read().most_tokens is None
    assert read(stop="end").stop == ["end"]
