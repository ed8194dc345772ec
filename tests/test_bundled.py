"""The models that travel with the repository: small, free, verified, and as good as the documents say."""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from openai import OpenAI

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
    "scenes-encoder.image": 7,
    "scenes-encoder.text": 7,
    "scenes-chat.vision": 8,
    "scenes-chat.embed": 8,
    "scenes-chat.decoder": 8,
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
@pytest.mark.parametrize("name", [name for name in MEGABYTES if not name.startswith("scenes-chat.")])
async def test_it_gives_its_golden_answers(name: str) -> None:
    entry = newest(name)
    backend = OnnxRuntimeBackend()
    await backend.load(entry)
    await check_golden(backend, entry)
    await backend.close()
    assert len(entry.manifest.golden) == 3


def test_the_default_models_are_the_bundled_ones() -> None:
    fields = Settings.model_fields
    names = {fields[f"default_{kind}"].default for kind in ("classify", "tokenizer", "detect", "ground", "embed", "chat")}
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


def test_the_encoder_finds_the_description(client: Client) -> None:
    labels = ["a circle and a square", "three stars and four crescents", "one red heart", "seven rings"]
    (item,) = client.classify(SCENE, labels=labels, top_k=1).results
    assert item.predictions is not None
    assert item.predictions[0].label == labels[1]


def test_the_chat_model_answers_what_was_asked(client: Client) -> None:
    """Streamed to the library's client; what else is in the picture or not decides."""
    photo = base64.b64encode(SCENE.read_bytes()).decode()
    library = OpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0)
    said = {}
    for question in ("How many crescents are there?", "Is there a green heart?", "What colour is the topmost shape?"):
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{photo}"}}, {"type": "text", "text": question}]
        stream = library.chat.completions.create(
            model="scenes-chat", messages=[{"role": "user", "content": parts}], temperature=0, stream=True
        )
        said[question] = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert list(said.values()) == ["4", "no", "red"]


def test_triton_runs_the_chat_model_with_the_code_of_today() -> None:
    """Else `make bundled-chat` is due."""
    version = newest("scenes-chat.decoder").path
    assert (version / "app/generate.py").read_bytes() == (ROOT / "app/generate.py").read_bytes()
    assert (version / "model.py").read_bytes() == (ROOT / "export/triton_chat.py").read_bytes()


def test_the_document_of_the_scenes_has_what_was_recorded_of_encoder_and_chat() -> None:
    document = (ROOT / "docs/scenes.md").read_text()
    encoder, chat = newest("scenes-encoder.text").manifest, newest("scenes-chat.decoder").manifest
    assert encoder.verification is not None
    assert chat.verification is not None
    found = encoder.verification.accuracy | chat.verification.accuracy
    lines = [line for line in document.splitlines() if line.startswith("| ")]
    for start, figure in (
        ("| with places", "zero_shot_places"),
        ("| without", "zero_shot_list"),
        ("| as counts", "zero_shot_counts"),
        ("| count", "exact_match_count"),
        ("| colour", "exact_match_colour"),
        ("| shape", "exact_match_shape"),
        ("| where", "exact_match_where"),
        ("| yes or no", "exact_match_yes_or_no"),
        ("| **all 500 questions", "exact_match"),
        ("| 200 descriptions", "described_exactly"),
        ("| 500 boxes", "box_accuracy"),
    ):
        assert any(line.startswith(start) and f"{found[figure]:.1%}" in line for line in lines), figure


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
