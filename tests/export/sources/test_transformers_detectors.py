"""Detectors of transformers: what they are taken for, their frames, and rows that are those of the library."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from export.detector import Detections
from export.informative import sample_images
from export.library_detector import LibraryDetector
from export.load import load
from export.rewrites import rewrite
from export.row_agreement import Told
from export.spec import ExportError, ExportRequest, LoadedDetector, PreprocessingOverrides, image_tensor
from tests.export.detectors import CLASSES, DETECTORS, SIZE

LIBRARY = sorted(name for name, family in DETECTORS.items() if family.processor is not None and not family.phrases)


def load_detector(request: ExportRequest) -> LoadedDetector:
    loaded = load(request)
    assert isinstance(loaded, LoadedDetector)
    return loaded


@pytest.fixture(scope="module")
def detectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedDetector]:
    return {name: load_detector(DETECTORS[name].request(tmp_path_factory.mktemp(name))) for name in LIBRARY}


def library_answer(network: Any, images: torch.Tensor, content: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
    """What the library and its own processor say, boxes in pixels of the content."""
    library = network.library
    sizes = [network.frame] * len(images) if content is None else [tuple(size) for size in content.tolist()]
    given = {"pixel_values": images}
    if content is not None:
        given["pixel_mask"] = torch.zeros(len(images), *SIZE, dtype=torch.long)
        for mask, (height, width) in zip(given["pixel_mask"], sizes, strict=True):
            mask[:height, :width] = 1
        given["pixel_values"] = images * given["pixel_mask"][:, None]  # as the processor pads
    processor = getattr(transformers, DETECTORS[library.config.model_type].processor["image_processor_type"])()  # type: ignore[index]
    answers: list[dict[str, torch.Tensor]] = processor.post_process_object_detection(
        library(**given), threshold=-1, target_sizes=sizes
    )
    return answers


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LIBRARY)
def test_rows_are_those_of_the_librarys_post_processing(detectors: dict[str, LoadedDetector], name: str, padded: bool) -> None:
    loaded = detectors[name]
    network = loaded.network
    if padded and not network.content:
        assert loaded.preprocessing.policy == "stretch"
        return
    images = image_tensor(sample_images(loaded.preprocessing, 3, seed=2), loaded.preprocessing)
    content = torch.tensor([[96, 100], [50, 136], [70, 80]], dtype=torch.int32) if padded else None
    with torch.inference_mode():
        queries = network.detect(images, content)
        rows = network.choose(queries, network.scores(queries.logits))
        expected = library_answer(network, images, content)
    for image, answer in enumerate(expected):
        order = answer["scores"].argsort(descending=True)
        found = Detections(rows.boxes[image], rows.scores[image], rows.classes[image])
        torch.testing.assert_close(found.scores, answer["scores"][order])
        drops = -found.scores.diff(prepend=found.scores[:1] + 1, append=found.scores[-1:] - 1)
        clear = (drops[:-1] > 1e-6) & (drops[1:] > 1e-6)  # equal scores have no order
        assert clear.float().mean() > 0.7
        assert torch.equal(found.classes[clear], answer["labels"][order][clear])
        pixels = found.boxes * torch.tensor([network.frame[1], network.frame[0]] * 2)
        torch.testing.assert_close(pixels[clear], answer["boxes"][order][clear], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", LIBRARY)
def test_a_rewritten_detector_says_the_same(detectors: dict[str, LoadedDetector], name: str, tmp_path: Path) -> None:
    loaded = detectors[name]
    images = image_tensor(sample_images(loaded.preprocessing, 2, seed=3), loaded.preprocessing)
    again = load_detector(DETECTORS[name].request(tmp_path))
    rewritten, used = rewrite(again.network)
    assert set(used) == DETECTORS[name].rewrites
    assert isinstance(rewritten, LibraryDetector)
    with torch.inference_mode():
        before, after = loaded.network.detect(images, None), rewritten.detect(images, None)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.boxes, before.boxes, rtol=1e-4, atol=1e-5)


def test_queries_start_where_they_are_told(detectors: dict[str, LoadedDetector]) -> None:
    """The queries of other places are others; the same places in another order give the same queries in that order."""
    loaded = detectors["rt_detr"]
    images = image_tensor(sample_images(loaded.preprocessing, 2, seed=4), loaded.preprocessing)
    with torch.inference_mode():
        told = Told.of(loaded.network, images, None)
        assert told.starts is not None
        turned, elsewhere = (
            Told.of(loaded.network, images, None, starts) for starts in (told.starts[:, ::-1].copy(), told.starts * 0 + range(12))
        )
    assert np.abs(turned.boxes[:, ::-1] - told.boxes).max() < 1e-5
    assert np.abs(elsewhere.boxes - told.boxes).max() > 0.01
    assert not loaded.network.library.model.enc_score_head._forward_hooks


def test_a_frame_that_the_maps_do_not_fit_is_refused(tmp_path: Path) -> None:
    request = replace(DETECTORS["rt_detr"].request(tmp_path), preprocessing=PreprocessingOverrides(input_size=SIZE))
    with pytest.raises(ExportError, match=r"fails on images of 96x136"):
        load(request)


@pytest.mark.parametrize("given", [None, (96, 160)])
def test_the_frame_of_a_processor_that_stretches(tmp_path: Path, given: tuple[int, int] | None) -> None:
    """RT-DETR's processor resizes to a square and divides by 255, without mean and standard deviation."""
    home = DETECTORS["rt_detr"].describe(tmp_path)
    processor = json.loads((home / "preprocessor_config.json").read_text())
    (home / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"height": 64, "width": 96}}))
    request = ExportRequest(f"transformers/{home}", tmp_path / "repository", weights="random", num_classes=CLASSES)
    preprocessing = load_detector(replace(request, preprocessing=PreprocessingOverrides(input_size=given))).preprocessing
    assert (preprocessing.height, preprocessing.width) == (given or (64, 96))
    assert (preprocessing.resize_height, preprocessing.resize_width) == (given or (64, 96))
    assert (preprocessing.policy, preprocessing.interpolation) == ("stretch", "bilinear")
    assert (preprocessing.scale, preprocessing.mean, preprocessing.std) == (pytest.approx(1 / 255), (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("name", "policy", "score", "content"),
    [
        ("detr", "letterbox", "softmax", True),
        ("deformable_detr", "letterbox", "sigmoid", True),
        ("rt_detr", "stretch", "sigmoid", False),
        ("yolos", "stretch", "softmax", False),
    ],
)
def test_what_a_detector_is(detectors: dict[str, LoadedDetector], name: str, policy: str, score: str, content: bool) -> None:
    loaded = detectors[name]
    assert loaded.preprocessing.policy == policy
    assert (loaded.detection.score, loaded.detection.content) == (score, content)
    assert (loaded.detection.classes, loaded.detection.masks) == (CLASSES, None)
    assert loaded.source.architecture == name


def test_the_frame_is_the_processors_unless_another_is_given(tmp_path: Path) -> None:
    request = replace(DETECTORS["detr"].request(tmp_path), preprocessing=PreprocessingOverrides())
    preprocessing = load_detector(request).preprocessing
    assert (preprocessing.height, preprocessing.width) == (800, 1333)
    assert preprocessing.fill == (124, 116, 104)


def test_a_directory_with_weights(tmp_path: Path) -> None:
    """What `save_pretrained` writes, as a user has it from the hub."""
    home = DETECTORS["yolos"].describe(tmp_path)
    config = transformers.AutoConfig.from_pretrained(home, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    torch.manual_seed(0)
    library = transformers.AutoModelForObjectDetection.from_config(config)
    library.save_pretrained(home)
    request = ExportRequest(f"transformers/{home}", tmp_path / "repository", weights="pretrained")
    loaded = load_detector(replace(request, preprocessing=PreprocessingOverrides(input_size=SIZE)))
    assert loaded.labels == ("cat", "dog")
    assert (loaded.source.weights, loaded.source.checkpoint) == ("pretrained", "source")
    own, theirs = loaded.network.state_dict(), library.state_dict()
    assert all(torch.equal(own[f"library.{key}"], theirs[key]) for key in theirs)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    home = DETECTORS["yolos"].describe(tmp_path)
    transformers.AutoModelForObjectDetection.from_config(transformers.AutoConfig.from_pretrained(home)).save_pretrained(home)
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps(config | {"num_detection_tokens": 9}))
    with pytest.raises(ExportError, match="do not fit"):
        load(ExportRequest(f"transformers/{home}", tmp_path / "repository", weights="pretrained"))


def test_half_precision_is_refused_where_places_would_be_lost(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="leave --precision out"):
        load(DETECTORS["deformable_detr"].request(tmp_path, precision="fp16"))


def test_a_detector_has_no_activation(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--activation"):
        load(DETECTORS["detr"].request(tmp_path, activation="softmax"))
