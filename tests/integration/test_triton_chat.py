"""The chat model inside a real Triton: tokens stream out of its Python model, several requests side by side."""

import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from export.config import MAX_STREAMS, render_config
from export.stage import write_triton_model
from tests.chat_repository import CHANNELS, END, IMAGE, NAME, ROLES, add_chat
from tests.triton import serve

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root: Path = tmp_path_factory.mktemp("triton") / "repository"
    for role, entry in zip(ROLES, add_chat(root, max_length=20_000), strict=True):
        (root / f"{NAME}.{role}" / "config.pbtxt").write_text(render_config(entry.manifest))
        if role == "decoder":
            write_triton_model(entry.path)
    with serve(root) as server:
        yield server.url


class Client:
    """One stream of gRPC; its answers in the order in which they came."""

    def __init__(self, url: str) -> None:
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._client = grpc.InferenceServerClient(url)
        self._client.start_stream(lambda result, error: self.answers.put((result, error)))

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *args: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Whatever is under way is cancelled."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def ask(self, name: str, *ids: int, images: tuple[np.ndarray, list[list[int]]] | None = None, **sampling: Any) -> None:
        tensors = {
            "input_ids": np.array(ids, np.int64),
            "max_tokens": np.array([sampling.get("max_tokens", 3)], np.int32),
            "temperature": np.array([sampling.get("temperature", 0)], np.float32),
            "top_p": np.array([1], np.float32),
            "top_k": np.array([0], np.int32),
        }
        if "seed" in sampling:
            tensors["seed"] = np.array([sampling["seed"]], np.int64)
        if images is not None:
            tensors |= {"patches": images[0], "grids": np.array(images[1], np.int64)}
        inputs = []
        for tensor, array in tensors.items():
            inputs.append(grpc.InferInput(tensor, array.shape, _TYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        self._client.async_stream_infer(f"{NAME}.decoder", inputs, request_id=name)

    def read(self) -> tuple[str, list[int], str]:
        """Request, tokens and finish of the next answer that has something in it."""
        result, error = self.answers.get(timeout=60)
        if error is not None:
            raise error
        if result.as_numpy("finish") is None:
            return self.read()
        return result.get_response().id, result.as_numpy("token").tolist(), result.as_numpy("finish")[0].decode()

    def answer(self) -> tuple[list[int], str]:
        """All tokens of the one request under way, and how it ended."""
        tokens: list[int] = []
        while True:
            _, more, finish = self.read()
            tokens += more
            if finish:
                return tokens, finish


_TYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "uint8": "UINT8"}


def test_an_answer_comes_token_by_token(url: str) -> None:
    with Client(url) as client:
        client.ask("one", 40, 41)
        assert [client.read() for _ in range(3)] == [("one", [42], ""), ("one", [43], ""), ("one", [44], "length")]
        client.ask("two", END - 2)
        assert client.answer() == ([END - 1], "stop")


def test_images_of_two_sizes_are_seen(url: str) -> None:
    patches = np.concatenate([np.full((24, CHANNELS), 100, np.uint8), np.full((4, CHANNELS), 50, np.uint8)])
    with Client(url) as client:
        client.ask("images", *[IMAGE] * 6, 7, IMAGE, images=(patches, [[1, 4, 6], [1, 2, 2]]))
        assert client.answer() == ([51, 52, 53], "length")


def test_a_seed_repeats_an_answer(url: str) -> None:
    with Client(url) as client:
        answers = []
        for seed in (1, 1, 2):
            client.ask("seed", 60, seed=seed, temperature=20.0, max_tokens=16)
            answers.append(client.answer())
    assert answers[0] == answers[1] != answers[2]


def test_four_streams_advance_together(url: str) -> None:
    """The fourth's first token comes before the first's last."""
    with Client(url) as client:
        for name in "abcd":
            client.ask(name, ord(name), max_tokens=400)
        order = []
        while sum(finish != "" for _, _, finish in order) < 4:
            order.append(client.read())
    names = [name for name, _, _ in order]
    assert {name: names.count(name) for name in "abcd"} == dict.fromkeys("abcd", 400)
    assert names.index("d") < len(names) - 1 - names[::-1].index("a")


def test_what_is_wrong_with_a_prompt_is_told(url: str) -> None:
    with Client(url) as client:
        client.ask("bad", 1, IMAGE)
        with pytest.raises(InferenceServerException, match="more image tokens"):
            client.read()


def test_a_client_that_leaves_frees_its_slots(url: str) -> None:
    leaving = Client(url)
    with Client(url) as client:
        for place in range(MAX_STREAMS):
            leaving.ask(str(place), 1, max_tokens=19_000)
        first = {leaving.read()[0] for _ in range(4 * MAX_STREAMS)}
        assert len(first) == MAX_STREAMS
        client.ask("more", 5)
        with pytest.raises(InferenceServerException, match="taken"):
            client.read()
        leaving.leave()
        end = time.monotonic() + 30
        while True:
            client.ask("again", 5)
            try:
                assert client.answer() == ([6, 7, 8], "length")
            except InferenceServerException:
                assert time.monotonic() < end
                time.sleep(0.1)
            else:
                return
