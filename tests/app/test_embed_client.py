"""Vectors and labels through the client and the `vitrine` command, against a real gateway."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.client import Client, ClientError
from tests.app.api.test_embed import BLUE, BLUE_VECTOR, RED, RED_VECTOR
from tests.app.test_cli import vitrine
from tests.dual_repository import add_dual_encoder, text_vector
from tests.gateway import gateway


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    repository = tmp_path_factory.mktemp("embed") / "repository"
    add_dual_encoder(repository)
    with gateway(repository, default_embed="colour-clip") as url, Client(url) as client:
        yield client


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    return tmp_path


def test_photos_and_texts(client: Client) -> None:
    answer = client.embed([RED, BLUE], ["red", "dark blue"])
    expected = [RED_VECTOR, BLUE_VECTOR, text_vector("red"), text_vector("dark blue")]
    np.testing.assert_allclose([item.embedding for item in answer.results], expected, atol=1e-5)
    assert [item.tokens for item in answer.results] == [None, None, 3, 4]
    (alone,) = client.embed(texts="red").results
    assert (alone.embedding, alone.truncated) == (answer.results[2].embedding, False)
    with pytest.raises(ClientError, match="nothing to embed"):
        client.embed()


def test_similarities(client: Client) -> None:
    answer = client.similarity([RED, BLUE], ["red", "blue"])
    found = np.array([item.similarities for item in answer.results])
    np.testing.assert_allclose(found[0], [text_vector("red") @ RED_VECTOR, text_vector("blue") @ RED_VECTOR], atol=1e-5)
    assert (found.argmax(1) == [0, 1]).all()


def test_labels(client: Client) -> None:
    answer = client.classify(BLUE, labels=["red", "blue"], template="a {}")
    assert [prediction.label for prediction in answer.results[0].predictions or ()] == ["blue", "red"]


def test_as_many_labels_as_a_request_may_name(client: Client) -> None:
    labels = ["red", "blue", *(f"number {number}" for number in range(2046))]
    answer = client.classify([RED, BLUE], labels=labels, top_k=1)
    assert [item.predictions is not None and len(item.predictions) for item in answer.results] == [1, 1]
    with pytest.raises(ClientError, match="2048"):
        client.classify(RED, labels=[*labels, "one more"])


def test_the_command_that_embeds(client: Client, photos: Path) -> None:
    ran = vitrine("embed", "red.png", "--text", "red", "--text", "", "--url", client.url, cwd=photos)
    photo, text, empty = map(json.loads, ran.stdout.splitlines())
    assert (photo["file"], text["text"], text["truncated"]) == ("red.png", "red", False)
    np.testing.assert_allclose(photo["embedding"], RED_VECTOR, atol=1e-5)
    np.testing.assert_allclose(text["embedding"], text_vector("red"), atol=1e-5)
    assert (ran.returncode, empty["error"]["code"]) == (1, "invalid_value")
    assert vitrine("embed", "--url", client.url, cwd=photos).returncode == 2


def test_the_command_with_labels(client: Client, photos: Path) -> None:
    ran = vitrine("classify", ".", "--labels", "red, green,blue", "--template", "a {}", "--json", "--url", client.url, cwd=photos)
    best = [json.loads(line)["predictions"][0]["label"] for line in ran.stdout.splitlines()]
    assert (ran.returncode, best) == (0, ["blue", "red"])
