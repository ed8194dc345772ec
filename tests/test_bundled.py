"""The models that travel with the repository: small, free, verified, and as good as the documents say."""

from pathlib import Path

import numpy as np
import pytest

from app.admission import Ticket
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.fidelity import psnr
from app.golden import check_golden
from app.manifest import Entry, check_hashes, read_entry
from app.settings import Settings
from tests.repository import make_images

ROOT = Path(__file__).parent.parent
MEGABYTES = {"convnext-50": 15, "vq-photo.tokenize": 8, "vq-photo.detokenize": 8}


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
    assert (manifest.source.licence, manifest.source.weights) == ("Apache-2.0", "checkpoint")
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
    names = {fields[name].default for name in ("default_classify", "default_tokenizer")}
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
