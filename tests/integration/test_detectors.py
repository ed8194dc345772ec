"""ViDT+ and TransVG++ exported by the line of the command and asked over HTTP: golden images have golden rows, in their pixels."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from starlette.testclient import TestClient

from app.main import create_app
from app.manifest import Entry, read_entry
from app.settings import Settings
from export.pipeline import export
from tests.detector_repository import in_frame
from tests.export.detectors import DETECTORS
from tests.export.grounders import GROUNDERS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

EDGE = 0.02  # pixels; a box that ends there was cut off


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return read_entry(export(DETECTORS["vidt_plus"].request(tmp_path_factory.mktemp("detector")), lambda stage: None).path)


@pytest.fixture(scope="module")
def grounder(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    return read_entry(export(GROUNDERS["transvg_pp"].request(tmp_path_factory.mktemp("grounder")), lambda stage: None).path)


@contextmanager
def serving(entry: Entry) -> Iterator[TestClient]:
    """A model with random weights answers only where it is named, or is the default."""
    options = {"repository": entry.path.parents[1], f"default_{entry.manifest.role}": entry.manifest.model, "repository_poll": 0}
    with TestClient(create_app(Settings(_env_file=None, **options))) as client:
        yield client


def golden(entry: Entry) -> Iterator[tuple[Any, bytes, dict[str, np.ndarray]]]:
    """Every example with its image and what the engine must say of it."""
    for example in entry.manifest.golden:
        with np.load(entry.path / example.outputs) as outputs:
            yield example, (entry.path / str(example.image)).read_bytes(), {name: outputs[name][0] for name in outputs.files}


def shares(boxes: Any, entry: Entry, image: dict[str, Any]) -> np.ndarray:
    """Boxes in pixels of the original, as shares of the engine's frame: worked out by hand, not by the gateway."""
    return in_frame(boxes, entry.manifest.preprocessing, (image["width"], image["height"]))


def test_detections_are_the_golden_rows(detector: Entry) -> None:
    compared = 0
    with serving(detector) as client:
        for _, photo, rows in golden(detector):
            (result,) = client.post("/v1/detect?threshold=0&masks=true", content=photo).json()["results"]
            image, found = result["image"], result["detections"]
            scores = np.array([one["score"] for one in found])
            assert (np.diff(scores) <= 0).all()
            for one, share in zip(found, shares([one["box"] for one in found], detector, image), strict=True):
                right, bottom = image["width"] - EDGE, image["height"] - EDGE
                assert coco_mask.decode(one["mask"]).shape == (image["height"], image["width"])
                if one["box"][0] <= EDGE or one["box"][1] <= EDGE or one["box"][2] >= right or one["box"][3] >= bottom:
                    continue
                row = np.argmin(np.abs(rows["boxes"] - share).sum(1) + (rows["classes"] != one["class_id"]))
                np.testing.assert_allclose(rows["boxes"][row], share, atol=2e-3)
                assert rows["scores"][row] == pytest.approx(one["score"], abs=2e-3)
                assert rows["classes"][row] == one["class_id"]
                compared += 1
            drawn = Image.open(BytesIO(client.post("/v1/detect", content=photo, headers={"Accept": "image/png"}).content))
            assert drawn.size == (image["width"], image["height"])
    assert compared > 3


def test_groundings_are_the_golden_boxes(grounder: Entry) -> None:
    with serving(grounder) as client:
        for example, photo, rows in golden(grounder):
            (result,) = client.post("/v1/ground", params={"phrase": example.phrase}, content=photo).json()["results"]
            (grounding,) = result["groundings"]
            image = result["image"]
            inside = shares([[0, 0, image["width"], image["height"]]], grounder, image)[0]
            expected = np.clip(rows["box"], np.tile(inside[:2], 2), np.tile(inside[2:], 2))
            np.testing.assert_allclose(shares([grounding["box"]], grounder, image)[0], expected, atol=2e-3)
            assert grounding["score"] is None
