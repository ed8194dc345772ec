"""Every dual encoder, from open_clip's network to the answer over HTTP: open_clip's own preprocessing, ids and vectors."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from starlette.testclient import TestClient

from app.main import create_app
from app.manifest import Entry, read_entry
from app.settings import Settings
from export.fuse import fuse
from export.golden import golden_images
from export.load import load
from export.publish import publish
from export.reference import reference_pixels
from export.spec import Engine, LoadedDualEncoder, image_tensor
from export.stage import stage
from export.to_onnx import to_onnx
from export.verify import verify
from tests.export.dual_encoders import DUAL_ENCODERS, DualFamily
from tests.factories import encode

NARROW = [pytest.param((family, False), id=name) for name, family in DUAL_ENCODERS.items()]
PUBLISHED = [
    pytest.param((family, True), id=f"{name}-published", marks=pytest.mark.conformance) for name, family in DUAL_ENCODERS.items()
]
PHOTO = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)).resize((280, 180)), "PNG")
TEXTS = ["A red circle", "the   LARGEST dog &amp; a cat", "ÃŠtre lÃ ", "x", "word " * 120]


class Exported:
    """One network, its engines, and the model as it was published."""

    def __init__(self, family: DualFamily, published: bool, directory: Path) -> None:
        request = family.request(directory, published=published)
        loaded = load(request)
        assert isinstance(loaded, LoadedDualEncoder)
        self.family, self.published, self.loaded = family, published, loaded
        fused = fuse(loaded)
        parts = zip(fused, (directory / "image.onnx", directory / "text.onnx"), strict=True)
        self.engines: list[Engine] = [to_onnx(part, path, "fp32") for part, path in parts]
        with stage(self.engines, loaded, request) as staged:
            done = publish(verify(staged, fused), request.repository)
        self.repository = request.repository
        self.entries: list[Entry] = [read_entry(path) for path in done.paths]


@pytest.fixture(scope="module", params=[*NARROW, *PUBLISHED])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family, published = request.param
    return Exported(family, published, tmp_path_factory.mktemp(family.name))


@pytest.fixture(scope="module")
def client(exported: Exported) -> Iterator[TestClient]:
    settings = Settings(
        _env_file=None, repository=exported.repository, repository_poll=0, default_embed=exported.family.name, request_timeout=300
    )
    with TestClient(create_app(settings)) as client:
        yield client


def transform(loaded: LoadedDualEncoder) -> Any:
    config = PreprocessCfg(**loaded.network.network.visual.preprocess_cfg)
    return image_transform_v2(config, is_train=False)


def test_both_engines_are_verified_and_fit_tensorrt(exported: Exported) -> None:
    image, text = (entry.manifest for entry in exported.entries)
    assert (image.role, text.role, image.roles) == ("image", "text", ("image", "text"))
    assert image.text is None
    assert text.text is not None
    assert image.embedding == text.embedding
    for manifest in (image, text):
        assert manifest.verification is not None
        assert manifest.verification.passed
        assert {"1", "3", "8"} <= {check.name.partition("batch ")[2][:1] for check in manifest.verification.checks}
        assert manifest.tensorrt is not None
        assert manifest.tensorrt.convertible
        assert manifest.golden
    assert image.parameters + text.parameters + 1 + bool(image.embedding.bias) == sum(
        parameter.numel() for parameter in exported.loaded.network.parameters()
    )


def test_published_sizes_are_those_of_their_papers(exported: Exported) -> None:
    if exported.published:
        image, text = (entry.manifest for entry in exported.entries)
        seeing, reading, macs = exported.family.figures
        assert image.parameters / 1e6 == pytest.approx(seeing, rel=0.01)
        assert text.parameters / 1e6 == pytest.approx(reading, rel=0.01)
        assert (image.macs or 0) / 1e9 == pytest.approx(macs, rel=0.05)


def test_pixels_are_those_of_open_clips_transform(exported: Exported) -> None:
    prepare, preprocessing = transform(exported.loaded), exported.loaded.preprocessing
    for golden in golden_images():
        expected = reference_pixels(golden.data, preprocessing)
        ours = image_tensor(torch.from_numpy(expected.copy())[None], preprocessing)[0]
        theirs = prepare(ImageOps.exif_transpose(Image.open(BytesIO(golden.data))))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_gateway_gives_the_vectors_of_open_clip(exported: Exported, client: TestClient) -> None:
    network = exported.loaded.network.network
    with torch.inference_mode():
        image = network.encode_image(transform(exported.loaded)(Image.open(BytesIO(PHOTO)))[None], normalize=True)
        ids = exported.loaded.vocabulary.rows(TEXTS)
        texts = network.encode_text(torch.from_numpy(ids), normalize=True)
    response = client.post("/v1/embed", params={"texts": TEXTS}, content=PHOTO)
    results = response.json()["results"]
    found = np.array([result["embedding"] for result in results])
    np.testing.assert_allclose(found[0], image[0], atol=0.02)
    np.testing.assert_allclose(found[1:], texts, atol=1e-3)
    assert [result["truncated"] for result in results[1:]] == [False, False, False, False, True]


def test_zero_shot_is_open_clips(exported: Exported, client: TestClient) -> None:
    network = exported.loaded.network.network
    labels = ["a red circle", "the tall tree", "two dogs"]
    with torch.inference_mode():
        image = transform(exported.loaded)(Image.open(BytesIO(PHOTO)))[None]
        logits = network.get_logits(image, torch.from_numpy(exported.loaded.vocabulary.rows(labels)))[0][0]
        expected = logits.softmax(-1) if network.logit_bias is None else logits.sigmoid()
    answer = client.post("/v1/classify", params={"labels": labels}, content=PHOTO).json()
    for prediction in answer["results"][0]["predictions"]:
        assert prediction["score"] == pytest.approx(float(expected[prediction["class_id"]]), abs=0.05)


def test_clips_ids_are_those_of_its_own_tokenizer(exported: Exported) -> None:
    """`get_tokenizer` by name, not what the export took it for."""
    if exported.family.name != "siglip":
        name = exported.family.source.partition("/")[2]
        theirs = open_clip.get_tokenizer(name)(TEXTS).numpy()
        np.testing.assert_array_equal(exported.loaded.vocabulary.rows(TEXTS), theirs)
