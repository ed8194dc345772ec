"""OWLv2 exported by the line of the command, and asked for phrases over HTTP, on both engines: the rows are the library's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient
from transformers import Owlv2ImageProcessor

from app.main import create_app
from app.manifest import Entry, read_entry
from app.settings import Settings
from export.load import load
from export.phrase_detector import PhraseDetector
from export.pipeline import export
from export.served import served_image
from export.spec import LoadedDetector, image_tensor
from tests import triton
from tests.export.detectors import DETECTORS
from tests.factories import make_jpeg

SIZES = [(160, 96), (90, 150)]
PHOTOS = [make_jpeg(*size, seed) for seed, size in enumerate(SIZES)]
PHRASES = ["red cup", "Dog", "ärger", "dog!"]


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return read_entry(export(DETECTORS["owlv2"].request(tmp_path_factory.mktemp("owlv2")), lambda stage: None).path)


@pytest.fixture(scope="module", params=["onnxruntime", pytest.param("triton", marks=pytest.mark.triton)])
def client(request: pytest.FixtureRequest, entry: Entry) -> Iterator[TestClient]:
    options: dict[str, Any] = {"repository": entry.path.parents[1], "default_detect": "owlv2", "repository_poll": 0}
    if request.param == "onnxruntime":
        with TestClient(create_app(Settings(_env_file=None, **options))) as client:
            yield client
        return
    with triton.serve(entry.path.parents[1]) as server:
        address = f"127.0.0.1:{server.ports.grpc}"
        with TestClient(create_app(Settings(_env_file=None, backend="triton", triton_url=address, **options))) as client:
            yield client


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedDetector, PhraseDetector]:
    """The same once more, with the same random weights, before anything was exported."""
    loaded = load(DETECTORS["owlv2"].request(tmp_path_factory.mktemp("again")))
    assert isinstance(loaded, LoadedDetector)
    assert isinstance(loaded.network, PhraseDetector)
    return loaded, loaded.network


def test_detections_are_those_of_the_librarys_post_processing(
    client: TestClient, network: tuple[LoadedDetector, PhraseDetector]
) -> None:
    loaded, detector = network
    response = client.post("/v1/detect", params={"phrases": PHRASES, "threshold": 0.5}, files=[("image", p) for p in PHOTOS])
    assert response.status_code == 200, response.text
    detector.ask(PHRASES)
    frames = np.stack([served_image(photo, loaded.preprocessing)[0] for photo in PHOTOS])
    images = image_tensor(torch.from_numpy(frames), loaded.preprocessing)
    with torch.inference_mode():
        answer = detector.library(
            input_ids=detector.asked[: len(PHRASES)].repeat(len(PHOTOS), 1), pixel_values=images, attention_mask=None
        )
    targets = [(height, width) for width, height in SIZES]
    expected = Owlv2ImageProcessor().post_process_object_detection(answer, threshold=0.5, target_sizes=targets)
    compared = 0
    for result, theirs, (width, height) in zip(response.json()["results"], expected, SIZES, strict=True):
        corners = theirs["boxes"].clamp(min=0).minimum(torch.tensor([width, height] * 2))
        inside = (corners[:, 2:] > corners[:, :2]).all(1)  # the rest lies on the padding
        order = theirs["scores"][inside].argsort(descending=True)
        found = result["detections"]
        np.testing.assert_allclose([one["score"] for one in found], theirs["scores"][inside][order], atol=1e-4)
        assert [one["class_id"] for one in found] == theirs["labels"][inside][order].tolist()
        assert [one["label"] for one in found] == [PHRASES[one["class_id"]] for one in found]
        np.testing.assert_allclose([one["box"] for one in found], corners[inside][order], atol=1.0)
        compared += len(found)
    assert compared > 10
    assert len({one["class_id"] for result in response.json()["results"] for one in result["detections"]}) > 1


def test_phrases_do_not_depend_on_their_company(client: TestClient) -> None:
    """What a phrase finds among others it also finds alone, and is as sure of it."""
    both = client.post("/v1/detect", params={"phrases": PHRASES[:2], "threshold": 0}, content=PHOTOS[0]).json()["results"][0]
    alone = client.post("/v1/detect", params={"phrases": PHRASES[1], "threshold": 0}, content=PHOTOS[0]).json()["results"][0]
    scores = {tuple(one["box"]): one["score"] for one in alone["detections"]}
    of_second = [one for one in both["detections"] if one["class_id"] == 1]
    assert of_second
    assert all(scores[tuple(one["box"])] == pytest.approx(one["score"], abs=1e-4) for one in of_second)


@pytest.mark.parametrize("phrases", [["x" * 15], ["red", ""], [f"dog {number}" for number in range(17)], []])
def test_what_cannot_be_looked_for(client: TestClient, phrases: list[str]) -> None:
    response = client.post("/v1/detect", params={"phrases": phrases}, content=PHOTOS[0])
    assert (response.status_code, response.json()["field"]) == (422, "phrases")


def test_the_record_holds_ids_phrases_and_queries(entry: Entry) -> None:
    manifest = entry.manifest
    assert manifest.verification is not None
    names = {check.name for check in manifest.verification.checks}
    assert {"tokenizer: other ids in 1,500 strings", "sees other phrases: query scores", "engine, batch 8: query boxes"} <= names
    assert manifest.text is not None
    assert manifest.text.phrases == 16
    assert all(example.phrase for example in manifest.golden)
    assert (Path(entry.path) / "tokenizer.json").is_file()
