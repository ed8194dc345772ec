"""The end of a detector's way: a version directory whose engine gives its golden rows wherever it is loaded."""

import asyncio
import json

import numpy as np
import pytest

from app.backends.onnxruntime import OnnxRuntimeBackend
from app.golden import check_golden
from app.manifest import ManifestError, Role, read_entry
from export.config import CONFIG_FILE
from export.publish import publish
from export.report import _rows
from export.spec import Engine, ExportError, Fused, LoadedDetector, Published
from export.stage import stage
from export.verify import verify
from tests.export.detectors import CLASSES, DETECTORS, SIZE

Made = tuple[LoadedDetector, Fused, Engine]


@pytest.fixture(scope="module")
def published(made_detector: Made, tmp_path_factory: pytest.TempPathFactory) -> Published:
    loaded, fused, engine = made_detector
    request = DETECTORS["vidt_plus"].request(tmp_path_factory.mktemp("published"))
    with stage([engine], loaded, request) as staged:
        return publish(verify(staged, [fused]), request.repository)


def test_the_manifest_says_what_rows_mean(published: Published) -> None:
    manifest = read_entry(published.path).manifest
    role: Role = "detect"
    assert (manifest.entry_name, manifest.role, manifest.roles) == ("vidt-plus", role, (role,))
    assert manifest.detection is not None
    assert manifest.detection.model_dump() == {
        "queries": 15,
        "classes": CLASSES,
        "box": "xyxy",
        "score": "sigmoid",
        "content": True,
        "masks": {"encoding": "dct", "count": 12, "side": 16},
    }
    assert [spec.name for spec in manifest.inputs] == ["image", "content"]
    assert [spec.name for spec in manifest.outputs] == ["boxes", "scores", "classes", "masks"]
    assert (manifest.preprocessing.policy, manifest.preprocessing.fill) == ("letterbox", (124, 116, 104))
    assert (manifest.preprocessing.height, manifest.preprocessing.width) == SIZE
    assert not manifest.preprocessing.scaled_decoding
    assert manifest.macs
    assert manifest.parameters > 100_000


def test_triton_is_told_of_every_tensor(published: Published) -> None:
    config = (published.path.parent / CONFIG_FILE).read_text()
    assert all(f'name: "{name}"' in config for name in ("image", "content", "boxes", "scores", "classes", "masks"))


def test_the_golden_rows_come_again(published: Published) -> None:
    async def load() -> None:
        backend = OnnxRuntimeBackend()
        entry = read_entry(published.path)
        await backend.load(entry)
        try:
            await check_golden(backend, entry)
        finally:
            await backend.close()

    asyncio.run(load())


def test_other_rows_are_not_golden(published: Published) -> None:
    outputs = published.path / published.manifest.golden[0].outputs
    before = outputs.read_bytes()
    with np.load(outputs) as archive:
        rows = {name: archive[name] for name in archive.files}
    rows["boxes"] = rows["boxes"] + 0.1
    np.savez_compressed(outputs, **rows)

    async def load() -> None:
        backend = OnnxRuntimeBackend()
        entry = read_entry(published.path)
        await backend.load(entry)
        try:
            with pytest.raises(ManifestError, match="boxes is off"):
                await check_golden(backend, entry)
        finally:
            await backend.close()

    try:
        asyncio.run(load())
    finally:
        outputs.write_bytes(before)


def test_a_version_with_other_classes_needs_another_name(published: Published, made_detector: Made) -> None:
    loaded, fused, engine = made_detector
    repository = published.path.parent.parent
    request = DETECTORS["vidt_plus"].request(repository.parent)
    with stage([engine], loaded, request) as staged:
        (verified,) = verify(staged, [fused])
        manifest = json.loads((verified.path / "manifest.json").read_text())
        manifest["detection"]["classes"] += 1
        (verified.path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(ExportError, match="classes or masks"):
            publish([type(verified)(verified.path, read_entry(verified.path).manifest)], repository)


def test_the_summary_tells_of_rows(published: Published) -> None:
    told = dict(_rows(published))
    assert told["rows"] == "the best 15, of 7 classes without labels, sigmoid, masks of 12 coefficients; padding masked"
    assert "query boxes" in told["verified"]
