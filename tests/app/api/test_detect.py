"""`POST /v1/detect` as a client sees it: a real engine whose boxes are known, and so where they lie in the original."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from starlette.testclient import TestClient

from app.api.schemas import DetectResponse
from app.main import create_app
from app.manifest import Preprocessing
from app.masks import decode_mask, paste
from app.settings import Settings
from tests.detector_repository import FRAME, LABELS, MASKS, SPOT, add_detector, in_frame, letterbox
from tests.factories import encode, make_exif, make_image, make_jpeg

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

BOXES = [[10, 20, 101, 62], [100.5, 3.25, 140, 90], [-30, 40, 60, 400], [12, 7, 13.5, 9.25], [400, 400, 410, 410]]
SCORES = [0.9, 0.8, 0.55, 0.4, 0.95]
CLASSES = [0, 1, 2, 1, 0]
SIZE = (151, 97)
PHOTO = make_jpeg(*SIZE)
WHITE = encode(Image.new("RGB", SIZE, "white"), "PNG")


@contextmanager
def serving(directory: Path, **settings: Any) -> Iterator[TestClient]:
    app = create_app(Settings(_env_file=None, repository=directory, repository_poll=0, **settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """`shapes` knows where things are in a photo of SIZE; one of them lies outside."""
    repository = tmp_path_factory.mktemp("repository")
    add_detector(repository, in_frame(BOXES, letterbox(), SIZE), SCORES, CLASSES, masks=True)
    add_detector(repository, in_frame(BOXES, letterbox(), SIZE), SCORES, CLASSES, name="plain")
    with serving(repository, default_detect="shapes") as client:
        yield client


def boxes_of(answer: dict[str, Any], index: int = 0) -> list[list[float]]:
    return [found["box"] for found in answer["results"][index]["detections"]]


def test_one_image(client: TestClient) -> None:
    response = client.post("/v1/detect", content=PHOTO)
    assert response.status_code == 200
    answer = response.json()
    DetectResponse.model_validate(answer)
    assert (answer["model"], answer["version"], answer["task"], answer["warnings"]) == ("shapes", 1, "detect", [])
    (result,) = answer["results"]
    found = result["detections"]
    assert [(one["label"], one["class_id"]) for one in found] == [("circle", 0), ("square", 1), ("Dreieck", 2)]
    np.testing.assert_allclose([one["score"] for one in found], [0.9, 0.8, 0.55], atol=1e-6)
    np.testing.assert_allclose(boxes_of(answer), [[10, 20, 101, 62], [100.5, 3.25, 140, 90], [0, 40, 60, 97]], atol=0.02)
    assert not {"mask", "rendered"} & {*result, *found[0]}


CROP = Preprocessing(height=48, width=48, policy="shortest_edge", resize_height=60, resize_width=60, interpolation="bilinear")
STRETCH = letterbox(policy="stretch")


@pytest.mark.parametrize("size", [(151, 97), (97, 151), (640, 31), (33, 500), (80, 48), (7, 5)])
@pytest.mark.parametrize("anchor", ["corner", "centre", "stretch"])
@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_boxes_are_in_pixels_of_the_upright_original(tmp_path: Path, size: tuple[int, int], anchor: str, orientation: int) -> None:
    """`size` is that of the upright image."""
    width, height = size
    boxes = np.array([[0, 0, 1, 1], [0.1, 0.2, 0.7, 0.5], [0.5, 0.31, 0.93, 0.99]]) * [width, height, width, height]
    if anchor == "stretch":
        preprocessing, shares = STRETCH, (boxes / [width, height, width, height]).astype(np.float32)
    else:
        preprocessing = letterbox(anchor)
        shares = in_frame(boxes.tolist(), preprocessing, size)
    add_detector(tmp_path, shares, [0.9, 0.8, 0.7], [0, 1, 2], preprocessing=preprocessing)
    stored = size if orientation < 5 else size[::-1]
    photo = encode(make_image(*stored), "JPEG", exif=make_exif(orientation))
    with serving(tmp_path) as client:
        answer = client.post("/v1/detect", content=photo).json()
    image = answer["results"][0]["image"]
    assert (image["width"], image["height"], image["orientation"]) == (*size, orientation)
    np.testing.assert_allclose(boxes_of(answer), boxes, atol=0.02)


def test_a_crop_is_undone(tmp_path: Path) -> None:
    """200 x 100 becomes 120 x 60, of which the middle 48 x 48 is seen: the frame's corner is 36, 6."""
    shares = np.array([[0, 0, 1, 1], [0.25, 0.5, 0.75, 1]], np.float32)
    manifest = {"inputs": ({"name": "image", "dtype": "uint8", "shape": (-1, *FRAME, 3)},)}
    preprocessing = CROP.model_copy(update={"width": FRAME[1], "height": FRAME[0]})
    add_detector(tmp_path, shares, [0.9, 0.8], [0, 1], preprocessing=preprocessing, **manifest)
    with serving(tmp_path) as client:
        answer = client.post("/v1/detect", content=make_jpeg(200, 100)).json()
    left, top = (120 - 80) / 2 / 0.6, (60 - 48) / 2 / 0.6
    np.testing.assert_allclose(
        boxes_of(answer),
        [[left, top, left + 80 / 0.6, top + 80], [left + 20 / 0.6, top + 40, left + 60 / 0.6, top + 80]],
        atol=0.02,
    )


def test_the_engine_is_told_how_much_of_the_frame_the_image_fills(tmp_path: Path) -> None:
    add_detector(tmp_path, np.array([[0, 0, 0.1, 0.1]], np.float32), [0], [0], content=True)
    with serving(tmp_path) as client:
        answer = client.post("/v1/detect?threshold=0", files=[("image", make_jpeg(200, 100)), ("image", make_jpeg(50, 100))]).json()
    scores = [result["detections"][0]["score"] for result in answer["results"]]
    np.testing.assert_allclose(scores, [0.040080, 0.048024], atol=1e-7)


def test_only_what_was_asked_for(client: TestClient) -> None:
    def ids(query: str) -> list[int]:
        return [found["class_id"] for found in client.post(f"/v1/detect?{query}", content=PHOTO).json()["results"][0]["detections"]]

    assert ids("threshold=0") == [0, 1, 2, 1]
    assert ids("threshold=0.81") == [0]
    assert ids("threshold=1") == []
    assert ids("max_detections=2") == [0, 1]
    assert ids("classes=square&threshold=0") == [1, 1]
    assert ids("classes=dreieck&classes=0") == [0, 2]
    body = {"image": {"base64": base64.b64encode(PHOTO).decode()}, "classes": [2, "circle"]}
    assert len(client.post("/v1/detect", json=body).json()["results"][0]["detections"]) == 2
    form = client.post("/v1/detect", files=[("image", PHOTO)], data={"classes": ["2", "square"]}).json()
    assert [found["class_id"] for found in form["results"][0]["detections"]] == [1, 2]


@pytest.mark.parametrize(
    ("query", "field", "words"),
    [
        ("classes=elephant", "classes", "shapes has no class 'elephant'"),
        ("classes=3", "classes", "no class '3'"),
        ("threshold=1.1", "threshold", "less than or equal to 1"),
        ("max_detections=0", "max_detections", "greater than or equal to 1"),
        ("max_detections=2&max_detections=3", "max_detections", "valid integer"),
        ("masks=true&model=plain", "masks", "plain has no masks"),
        ("image_id=1&image_id=2", "image_id", "2 ids for 1 images"),
        ("format=voc", "format", "'json' or 'coco'"),
    ],
)
def test_what_cannot_be_asked(client: TestClient, query: str, field: str, words: str) -> None:
    response = client.post(f"/v1/detect?{query}", content=PHOTO)
    assert (response.status_code, response.json()["code"], response.json()["field"]) == (422, "invalid_value", field)
    assert words in response.json()["detail"]


def test_an_image_without_an_answer_does_not_stop_the_others(client: TestClient) -> None:
    files = [("image", PHOTO), ("image", WHITE), ("image", b"no image"), ("image", PHOTO)]
    response = client.post("/v1/detect?masks=true&render=true", files=files)
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result.get("error", {}).get("code") for result in results] == [None, "inference_failed", "unsupported_media", None]
    assert results[0]["detections"] == results[3]["detections"]
    assert len(results[0]["detections"]) == 3


def test_boxes_that_are_not_numbers_are_the_engines_fault(client: TestClient) -> None:
    response = client.post("/v1/detect", content=WHITE)
    assert (response.status_code, response.json()["code"]) == (500, "inference_failed")
    assert "not numbers" in response.json()["detail"]


def test_a_class_that_the_model_does_not_have_is_the_engines_fault(tmp_path: Path) -> None:
    add_detector(tmp_path, in_frame(BOXES[:1], letterbox(), SIZE), [0.9], [len(LABELS)])
    with serving(tmp_path) as client:
        assert client.post("/v1/detect", content=PHOTO).json()["code"] == "inference_failed"


def test_masks_lie_in_their_boxes(client: TestClient) -> None:
    found = client.post("/v1/detect?masks=true", content=PHOTO).json()["results"][0]["detections"]
    for one, whole in zip(found, BOXES, strict=False):
        pixels = coco_mask.decode(one["mask"]).astype(bool)
        assert pixels.shape == SIZE[::-1]
        left, top, right, bottom = one["box"]
        y, x = np.nonzero(pixels)
        assert left - 1 <= x.min() <= x.max() <= right
        assert top - 1 <= y.min() <= y.max() <= bottom
        # A mask is stretched over the whole box, of which the picture shows a part.
        expected = coco_mask.decode(paste(decode_mask(SPOT, MASKS.side), tuple(whole), *SIZE).rle())
        assert np.mean(pixels != expected) < 0.002


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)).convert("RGB")).astype(int)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_picture_is_the_upright_original_with_boxes(client: TestClient, kind: str) -> None:
    turned = encode(make_image(*SIZE[::-1]), "JPEG", exif=make_exif(6))
    response = client.post("/v1/detect", content=turned, headers={"Accept": f"image/{kind}"})
    assert response.status_code == 200
    assert (response.headers["Content-Type"], response.headers["X-Model"]) == (f"image/{kind}", "shapes@1")
    assert "X-Codebook" not in response.headers
    drawn = Image.open(BytesIO(response.content))
    assert (drawn.format, drawn.size) == (kind.upper(), SIZE)
    difference = np.abs(picture(response.content) - np.asarray(make_image(*SIZE[::-1]).transpose(Image.Transpose.ROTATE_270)))
    assert difference[62, 30:90].mean() > 30  # the lower side of the first box, all of which was found
    assert difference[70:, 105:].mean() < 30


def test_json_has_the_picture_when_asked(client: TestClient) -> None:
    (result,) = client.post("/v1/detect?render=true", content=PHOTO).json()["results"]
    rendered = result["rendered"]
    file = base64.b64decode(rendered["base64"])
    assert (rendered["media_type"], rendered["width"], rendered["height"]) == ("image/png", *SIZE)
    assert file == client.post("/v1/detect", content=PHOTO, headers={"Accept": "image/png"}).content


def test_masks_are_drawn(client: TestClient) -> None:
    plain, masked = (
        picture(client.post(f"/v1/detect?masks={flag}", content=PHOTO, headers={"Accept": "image/png"}).content)
        for flag in ("false", "true")
    )
    assert np.abs(plain - masked)[50, 55].max() > 20
    assert np.abs(plain - masked)[90, 145].max() == 0


def test_what_is_too_long_for_a_webp_is_refused(client: TestClient) -> None:
    thread = encode(Image.new("RGB", (16_384, 3)), "PNG")
    response = client.post("/v1/detect", content=thread, headers={"Accept": "image/webp"})
    assert (response.status_code, response.json()["field"]) == (406, "Accept")
    assert client.post("/v1/detect", content=thread, headers={"Accept": "image/png"}).status_code == 200


def test_several_images_are_not_one_picture(client: TestClient) -> None:
    response = client.post("/v1/detect", files=[("image", PHOTO)] * 2, headers={"Accept": "image/png"})
    assert (response.status_code, response.json()["code"]) == (406, "not_acceptable")


def ground_truth(boxes: list[list[float]], ids: list[int]) -> COCO:
    """What pycocotools holds against results: the boxes of the first three rows in every image."""
    annotations = [
        {"id": 1 + 10 * i + row, "image_id": image, "category_id": CLASSES[row], "iscrowd": 0,
         "bbox": [x, y, right - x, bottom - y], "area": (right - x) * (bottom - y)}
        for i, image in enumerate(ids)
        for row, (x, y, right, bottom) in enumerate(boxes)
    ]  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image, "width": SIZE[0], "height": SIZE[1]} for image in ids],
        "categories": [{"id": number, "name": label} for number, label in enumerate(LABELS)],
        "annotations": annotations,
    }
    truth.createIndex()
    return truth


@pytest.mark.parametrize("accept", [None, "application/vnd.coco+json"])
def test_pycocotools_reads_coco_as_it_is(client: TestClient, tmp_path: Path, accept: str | None) -> None:
    query, headers = ("format=coco", {}) if accept is None else ("", {"Accept": accept})
    url = f"/v1/detect?{query}&masks=true&image_id=139&image_id=285"
    response = client.post(url, files=[("image", PHOTO)] * 2, headers=headers)
    assert (response.status_code, response.headers["Content-Type"]) == (200, "application/vnd.coco+json")
    file = tmp_path / "results.json"
    file.write_bytes(response.content)
    with redirect_stdout(StringIO()) as said:
        truth = ground_truth([[10, 20, 101, 62], [100.5, 3.25, 140, 90], [0, 40, 60, 97]], [139, 285])
        results = truth.loadRes(str(file))
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1), said.getvalue()
    assert [one["image_id"] for one in json.loads(response.content)] == [139] * 3 + [285] * 3
    assert all(results.annToMask(one).shape == SIZE[::-1] for one in results.anns.values())


def test_coco_is_all_or_nothing(client: TestClient) -> None:
    response = client.post("/v1/detect?format=coco", files=[("image", PHOTO), ("image", b"no image")])
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media")
    assert "Image 1" in response.json()["detail"]


def test_coco_counts_images_from_0(client: TestClient) -> None:
    rows = client.post("/v1/detect?format=coco&max_detections=1", files=[("image", PHOTO)] * 2).json()
    assert [row["image_id"] for row in rows] == [0, 1]
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"}
    np.testing.assert_allclose(rows[0]["bbox"], [10, 20, 91, 42], atol=0.02)
