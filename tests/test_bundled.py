"""The models that travel with the repository: small, free, verified, and as good as the documents say."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app.admission import Ticket
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.client import Client
from app.fidelity import psnr
from app.golden import check_golden
from app.local_gateway import local_gateway
from app.manifest import Entry, check_hashes, read_entry
from app.settings import Settings
from export.evaluate.grounding import overlap
from tests.repository import make_images

ROOT = Path(__file__).parent.parent
MEGABYTES = {
    "convnext-50": 15,
    "vq-photo.tokenize": 8,
    "vq-photo.detokenize": 8,
    "scenes-detector": 8,
    "scenes-grounding": 8,
}
SCENE = ROOT / "docs/photos/scene.jpg"
SHAPES = [
    *[("star", (33, 199, 82, 251)), ("star", (265, 287, 350, 375)), ("star", (269, 108, 385, 225))],
    *[("crescent", (63, 42, 173, 141)), ("crescent", (184, 182, 301, 316)), ("crescent", (56, 204, 143, 300))],
    ("crescent", (269, 190, 396, 344)),
]
"""What `recipes/scenes.py` has drawn into SCENE, in pixels."""


def newest(name: str) -> Entry:
    versions = (ROOT / "model_repository" / name).glob("[0-9]*")
    return read_entry(max(versions, key=lambda path: int(path.name)))


@pytest.fixture(params=MEGABYTES)
def entry(request: pytest.FixtureRequest) -> Entry:
    return newest(request.param)


def test_nothing_else_is_bundled() -> None:
    assert {path.name for path in (ROOT / "model_repository").iterdir() if not path.name.startswith(".")} == MEGABYTES.keys()


def test_it_is_small_free_and_verified(entry: Entry) -> None:
    manifest = entry.manifest
    check_hashes(entry)
    assert manifest.engine.size <= MEGABYTES[entry.name] * 1e6
    assert manifest.source.licence == "Apache-2.0"
    assert manifest.source.weights != "random"
    assert manifest.description
    assert manifest.verification is not None
    assert manifest.verification.passed
    assert manifest.verification.accuracy


@pytest.mark.anyio
async def test_it_gives_its_golden_answers(entry: Entry) -> None:
    backend = OnnxRuntimeBackend()
    await backend.load(entry)
    await check_golden(backend, entry)
    await backend.close()
    assert len(entry.manifest.golden) == 3


def test_the_default_models_are_the_bundled_ones() -> None:
    fields = Settings.model_fields
    names = {fields[f"default_{kind}"].default for kind in ("classify", "tokenizer", "detect", "ground")}
    assert names == {newest(name).manifest.model for name in MEGABYTES}


def test_the_two_engines_of_the_tokenizer_belong_together() -> None:
    first, second = newest("vq-photo.tokenize"), newest("vq-photo.detokenize")
    assert first.version == second.version
    for shared in ("build", "roles", "codebook", "source", "preprocessing"):
        assert getattr(first.manifest, shared) == getattr(second.manifest, shared)
    assert first.manifest.verification is not None
    assert second.manifest.verification is not None
    assert first.manifest.verification.accuracy == second.manifest.verification.accuracy
    codebook = first.manifest.codebook
    assert codebook is not None
    assert (codebook.size, codebook.bits, codebook.grid) == (8192, 13, (32, 32))


@pytest.mark.anyio
async def test_tokens_hold_what_an_image_looks_like() -> None:
    """Smooth images, each of another colour, come back as themselves and not as one another."""
    images = make_images(2, size=8, seed=3).repeat(32, 1).repeat(32, 2)
    backend = OnnxRuntimeBackend()
    for name in ("vq-photo.tokenize", "vq-photo.detokenize"):
        await backend.load(newest(name))
    tokens = await backend.infer(newest("vq-photo.tokenize"), {"image": images}, Ticket())
    restored = (await backend.infer(newest("vq-photo.detokenize"), tokens, Ticket()))["image"]
    await backend.close()
    assert tokens["tokens"].shape == (2, 32, 32)
    for own, other in ((0, 1), (1, 0)):
        assert psnr(restored[own], images[own]) > psnr(restored[own], images[other]) + 6
    assert not np.array_equal(restored[0], restored[1])


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_gateway(Settings(_env_file=None, repository=ROOT / "model_repository")) as url, Client(url) as asking:
        yield asking


def test_the_detector_finds_what_was_drawn(client: Client) -> None:
    (item,) = client.detect(SCENE).results
    assert item.detections is not None
    assert sorted(found.label for found in item.detections) == sorted(kind for kind, _ in SHAPES)
    for kind, box in SHAPES:
        assert any(found.label == kind and overlap(found.box, box) > 0.8 for found in item.detections), (kind, box)


@pytest.mark.parametrize(
    ("phrase", "shape"), [("the blue shape", 5), ("the red crescent", 3), ("the yellow star", 1), ("the largest star", 2)]
)
def test_the_grounding_model_finds_what_is_meant(client: Client, phrase: str, shape: int) -> None:
    (item,) = client.ground(SCENE, phrase).results
    assert item.groundings is not None
    (found,) = item.groundings
    assert found.box is not None
    assert overlap(found.box, SHAPES[shape][1]) > 0.5


def test_the_document_of_the_scenes_has_the_recorded_figures() -> None:
    document = (ROOT / "docs/scenes.md").read_text()
    for name, kept, unit in (
        ("scenes-detector", ("AP", "AP50", "AP75"), "images"),
        ("scenes-grounding", ("accuracy", "mean_iou"), "phrases"),
    ):
        entry = newest(name)
        assert entry.manifest.verification is not None
        found = entry.manifest.verification.accuracy
        assert f"| **all {found[unit]:.0f} {unit}** | {' | '.join(f'{found[figure]:.3f}' for figure in kept)} |" in document
        size = f"{entry.manifest.engine.size / 1e6:.1f} MB"
        assert any(line.startswith(f"| `{name}`") and line.endswith(f"| {size} |") for line in document.splitlines())


def test_the_document_has_the_recorded_figures() -> None:
    document = (ROOT / "docs/tokenizers.md").read_text()
    verification = newest("vq-photo.tokenize").manifest.verification
    assert verification is not None
    found = verification.accuracy
    means = " | ".join(f"{found[f'psnr_{view}']:.2f} dB | {found[f'ssim_{view}']:.3f}" for view in ("resized", "cut"))
    assert f"| **vq-photo, mean** | {means} |" in document
    assert f"a perplexity of {found['perplexity']:,.0f}, " in document
    sizes = [newest(f"vq-photo.{role}").manifest.engine.size / 1e6 for role in ("tokenize", "detokenize")]
    assert "Its engines have {:.1f} and {:.1f} MB".format(*sizes) in document
