"""`POST /v1/embeddings`, called by OpenAI's own client and by hand."""

from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.app.api.test_embed import BLUE, BLUE_VECTOR, LONG, RED, RED_VECTOR
from tests.dual_repository import LENGTH, add_dual_encoder, text_vector
from tests.gateway import gateway

RED_URL, BLUE_URL = (f"data:image/png;base64,{b64encode(image).decode()}" for image in (RED, BLUE))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    repository = tmp_path_factory.mktemp("gateway") / "repository"
    add_dual_encoder(repository)
    with gateway(repository, default_embed="colour-clip", max_texts=4, max_images=2) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_text(client: openai.OpenAI) -> None:
    """The client asks for base64 where nothing is said, and decodes it."""
    answer = client.embeddings.create(model="colour-clip", input="Dark red")
    assert (answer.object, answer.model, answer.data[0].index) == ("list", "colour-clip", 0)
    np.testing.assert_allclose(answer.data[0].embedding, text_vector("dark red"), atol=1e-6)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (4, 4)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_texts_and_images_keep_their_order(client: openai.OpenAI, encoding: Any) -> None:
    given: Any = ["red", RED_URL, "blue", {"image": BLUE_URL}]
    answer = client.embeddings.create(model="colour-clip", input=given, encoding_format=encoding)
    found = [one.embedding if encoding == "float" else np.frombuffer(b64decode(str(one.embedding)), "<f4") for one in answer.data]
    assert [one.index for one in answer.data] == [0, 1, 2, 3]
    np.testing.assert_allclose(found, [text_vector("red"), RED_VECTOR, text_vector("blue"), BLUE_VECTOR], atol=1e-5)
    assert answer.usage.prompt_tokens == 6


def test_a_text_that_was_cut_off_says_so(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="colour-clip", input=["red", LONG])
    assert [(one.model_extra or {}).get("truncated", False) for one in answer.data] == [False, True]
    assert answer.usage.prompt_tokens == 3 + LENGTH


REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str]] = [
    ({"model": "nothing"}, openai.NotFoundError, "model", "model_not_found"),
    ({"input": ""}, openai.UnprocessableEntityError, "input", "invalid_value"),
    ({"input": []}, openai.UnprocessableEntityError, "input", "invalid_value"),
    ({"input": ["red", " "]}, openai.UnprocessableEntityError, "input", "invalid_value"),
    ({"input": [[1, 2]]}, openai.BadRequestError, "input", "malformed_request"),
    ({"input": [{"image": "x"}]}, openai.BadRequestError, "input", "malformed_request"),
    ({"input": ["data:image/png;base64,AAAA"]}, openai.APIStatusError, "input", "unsupported_media"),
    ({"input": ["red"] * 5}, openai.APIStatusError, "input", "too_large"),
    ({"input": [RED_URL] * 3}, openai.APIStatusError, "input", "too_large"),
    ({"dimensions": 2}, openai.UnprocessableEntityError, "dimensions", "invalid_value"),
    ({"encoding_format": "hex"}, openai.UnprocessableEntityError, "encoding_format", "invalid_value"),
    ({"extra_body": {"colour": 1}}, openai.UnprocessableEntityError, "colour", "invalid_value"),
]


@pytest.mark.parametrize(("asked", "kind", "param", "code"), REFUSED)
def test_errors_name_the_parameter(
    client: openai.OpenAI, asked: dict[str, Any], kind: type[openai.APIStatusError], param: str, code: str
) -> None:
    with pytest.raises(kind) as refused:
        client.embeddings.create(**{"model": "colour-clip", "input": "red"} | asked)
    error = refused.value
    assert 400 <= error.status_code < 500
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")


def test_an_image_by_address_is_not_fetched(client: openai.OpenAI) -> None:
    given: Any = [{"image": "http://127.0.0.1:1/a.png"}]
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.embeddings.create(model="colour-clip", input=given)
    assert refused.value.param == "input"


def test_a_body_that_is_no_json(tmp_path: Path, url: str) -> None:
    import httpx2

    response = httpx2.post(f"{url}/v1/embeddings", content=b"{", trust_env=False)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_request")
    assert response.headers["X-Request-ID"]


def test_its_stages_are_told(url: str) -> None:
    import httpx2

    response = httpx2.post(f"{url}/v1/embeddings", json={"input": "green"}, trust_env=False)
    assert {"read", "parse", "infer", "encode"} <= {
        stage.partition(";")[0] for stage in response.headers["Server-Timing"].split(", ")
    }
