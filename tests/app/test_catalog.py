"""What the catalog lists, loads and chooses, and how it copes with every fault of a repository."""

import asyncio
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.admission import Ticket
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.catalog import Catalog
from app.errors import BackendUnavailableError, InferenceError, ModelNotChosenError, ModelNotFoundError, ModelUnavailableError
from app.golden import check_golden
from app.manifest import MANIFEST_FILE, Entry, Source
from tests.chat_repository import add_chat
from tests.dual_repository import LENGTH, add_dual_encoder
from tests.repository import add_entry, make_images, make_manifest, make_repository

pytestmark = pytest.mark.anyio


async def open_catalog(root: Path, **defaults: str) -> Catalog:
    catalog = Catalog(root, OnnxRuntimeBackend(), check_golden, defaults)
    await catalog.refresh()
    return catalog


async def acquire(catalog: Catalog, name: str | None = None) -> str:
    return str((await catalog.acquire(name, "classify", "classify")).entries["classify"])


async def until_loaded(catalog: Catalog, name: str, number: int) -> None:
    while not any(version.loaded for version in catalog.models[name].versions if version.number == number):
        await asyncio.sleep(0.001)


def edit_manifest(version: Path, change: Callable[[dict], None]) -> None:
    document = json.loads((version / MANIFEST_FILE).read_text())
    change(document)
    (version / MANIFEST_FILE).write_text(json.dumps(document))


async def test_an_empty_or_missing_repository(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelNotFoundError, match="python -m export"):
            await acquire(await open_catalog(root))


async def test_choosing(tmp_path: Path) -> None:
    make_repository(tmp_path, "alpha", "beta")
    with pytest.raises(ModelNotChosenError, match="alpha, beta"):
        await acquire(await open_catalog(tmp_path))
    catalog = await open_catalog(tmp_path, classify="beta")
    assert await acquire(catalog) == "beta@1"
    assert await acquire(catalog, "alpha") == "alpha@1"
    assert await acquire(catalog, "alpha@1") == "alpha@1"
    for unknown in ("gamma", "alpha@2", "alpha@1x", "../alpha", "alpha/1", ""):
        with pytest.raises(ModelNotFoundError):
            await acquire(catalog, unknown)


async def test_a_new_version_takes_over_and_a_vanished_one_is_let_go(tmp_path: Path) -> None:
    make_repository(tmp_path)
    catalog = await open_catalog(tmp_path)
    assert await acquire(catalog) == "colours@1"
    add_entry(tmp_path, version=2)
    await catalog.refresh()
    assert await acquire(catalog) == "colours@1"  # answers while the new one loads
    await until_loaded(catalog, "colours", 2)
    assert await acquire(catalog) == "colours@2"
    assert await acquire(catalog, "colours@1") == "colours@1"
    shutil.rmtree(tmp_path / "colours" / "2")
    await catalog.refresh()
    assert await acquire(catalog) == "colours@1"


async def test_a_new_version_of_what_serves_loads_before_anyone_asks(tmp_path: Path) -> None:
    make_repository(tmp_path, "colours", "idle")
    catalog = await open_catalog(tmp_path)
    await acquire(catalog, "colours")
    for name in ("colours", "idle"):
        add_entry(tmp_path, name, version=2)
    await catalog.refresh()
    catalog.advance()
    await asyncio.wait_for(until_loaded(catalog, "colours", 2), 30)
    assert [version.status for version in catalog.models["idle"].versions] == ["available", "available"]


def newer_schema(version: Path) -> None:
    edit_manifest(version, lambda document: document.update(schema_version=99))


def no_manifest(version: Path) -> None:
    (version / MANIFEST_FILE).unlink()


def corrupt_manifest(version: Path) -> None:
    (version / MANIFEST_FILE).write_text('{"schema_version": 1,')


def manifest_of_a_list(version: Path) -> None:
    (version / MANIFEST_FILE).write_text("[]")


def unknown_field(version: Path) -> None:
    edit_manifest(version, lambda document: document.update(colour="blue"))


def another_name(version: Path) -> None:
    edit_manifest(version, lambda document: document.update(model="other"))


def no_engine(version: Path) -> None:
    (version / "model.onnx").unlink()


def short_engine(version: Path) -> None:
    engine = version / "model.onnx"
    engine.write_bytes(engine.read_bytes()[:-1])


def wrong_hash(version: Path) -> None:
    engine = version / "model.onnx"
    content = bytearray(engine.read_bytes())
    content[len(content) // 2] ^= 1
    engine.write_bytes(content)


def engine_outside(version: Path) -> None:
    edit_manifest(version, lambda document: document["engine"].update(file="../../secret.onnx"))


def engine_linked_outside(version: Path) -> None:
    outside = version.parent.parent.parent / "outside.onnx"
    shutil.move(version / "model.onnx", outside)
    (version / "model.onnx").symlink_to(outside)


def foreign_engine(version: Path) -> None:
    edit_manifest(version, lambda document: document["engine"].update(kind="tensorrt"))


def other_golden_answer(version: Path) -> None:
    np.savez(version / "golden" / "0.npz", probabilities=np.full((1, 6), 1 / 6, np.float32))


def unreadable_golden(version: Path) -> None:
    (version / "golden" / "0.png").write_bytes(b"not an image")


def truncated_golden_answer(version: Path) -> None:
    answer = version / "golden" / "0.npz"
    answer.write_bytes(answer.read_bytes()[:40])


def golden_answer_of_another_shape(version: Path) -> None:
    np.savez(version / "golden" / "0.npz", probabilities=np.full((1, 5), 0.2, np.float32))


def golden_answer_of_another_name(version: Path) -> None:
    np.savez(version / "golden" / "0.npz", scores=np.full((1, 6), 1 / 6, np.float32))


def missing_role(version: Path) -> None:
    edit_manifest(version, lambda document: document.update(roles=["classify", "embed"]))
    shutil.move(version.parent, version.parent.with_name(f"{version.parent.name}.classify"))


def other_tensor_names(version: Path) -> None:
    edit_manifest(version, lambda document: document["outputs"][0].update(name="scores"))


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (newer_schema, "newer than this gateway"),
    (no_manifest, "manifest.json cannot be read"),
    (corrupt_manifest, "not valid JSON"),
    (manifest_of_a_list, "not a JSON object"),
    (unknown_field, "colour"),
    (another_name, "the manifest is of 'other'"),
    (no_engine, "model.onnx is missing"),
    (short_engine, "bytes, the manifest says"),
    (wrong_hash, "does not match its SHA-256"),
    (engine_outside, "inside the version directory"),
    (engine_linked_outside, "points outside"),
    (foreign_engine, "cannot run a tensorrt engine"),
    (other_golden_answer, "does not reproduce golden/0.png"),
    (unreadable_golden, "golden example golden/0.png"),
    (truncated_golden_answer, "golden example golden/0.png"),
    (golden_answer_of_another_shape, "other outputs than golden/0.npz"),
    (golden_answer_of_another_name, "other outputs than golden/0.npz"),
    (missing_role, "engines for embed are missing"),
    (other_tensor_names, "its manifest says"),
]


@pytest.mark.parametrize(("break_it", "reason"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
async def test_a_broken_model_says_why_and_the_rest_serves(tmp_path: Path, break_it: Callable[[Path], None], reason: str) -> None:
    root = tmp_path / "repository"
    make_repository(root, "broken", "sound")
    break_it(root / "broken" / "1")
    catalog = await open_catalog(root)
    assert await acquire(catalog, "sound") == "sound@1"
    with pytest.raises(ModelUnavailableError, match=reason):
        await acquire(catalog, "broken")
    model = catalog.models["broken"]
    assert model.current is None
    assert reason in " ".join([*model.problems, *(version.fault or "" for version in model.versions)])


@pytest.mark.parametrize(("break_it", "reason"), FAULTS[:16], ids=[fault.__name__ for fault, _ in FAULTS[:16]])
async def test_a_broken_new_version_leaves_the_old_one_serving(
    tmp_path: Path, break_it: Callable[[Path], None], reason: str
) -> None:
    root = tmp_path / "repository"
    make_repository(root)
    add_entry(root, version=2)
    break_it(root / "colours" / "2")
    catalog = await open_catalog(root)
    assert await acquire(catalog) == "colours@1"
    if catalog.models["colours"].versions[0].number == 2:
        with pytest.raises(ModelUnavailableError, match=reason):
            await acquire(catalog, "colours@2")


async def test_external_data_outside_the_directory_is_not_loaded(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    add_entry(root, "leaky")
    version = root / "leaky" / "1"
    (root.parent / "secret.bin").write_bytes(np.zeros(18, np.float32).tobytes())
    model = onnx.load(version / "model.onnx")
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.append(onnx.StringStringEntryProto(key="location", value="../../../secret.bin"))
    (version / "model.onnx").write_bytes(model.SerializeToString())
    (version / MANIFEST_FILE).write_text(make_manifest(version / "model.onnx", "leaky").model_dump_json())
    with pytest.raises(ModelUnavailableError, match="cannot load leaky"):
        await acquire(await open_catalog(root), "leaky")


async def test_the_audit_lists_a_wrong_hash_before_anyone_asks(tmp_path: Path) -> None:
    make_repository(tmp_path)
    wrong_hash(tmp_path / "colours" / "1")
    catalog = await open_catalog(tmp_path)
    assert catalog.models["colours"].versions[0].status == "available"
    await catalog.audit()
    assert catalog.models["colours"].versions[0].status == "failed"


async def test_a_mended_version_serves_again(tmp_path: Path) -> None:
    make_repository(tmp_path)
    version = tmp_path / "colours" / "1"
    sound = (version / MANIFEST_FILE).read_text()
    corrupt_manifest(version)
    catalog = await open_catalog(tmp_path)
    with pytest.raises(ModelUnavailableError):
        await acquire(catalog)
    (version / MANIFEST_FILE).write_text(sound)
    os.utime(version / MANIFEST_FILE, ns=(1, 1))
    await catalog.refresh()
    assert await acquire(catalog) == "colours@1"


async def test_stray_files_and_directories_are_no_models(tmp_path: Path) -> None:
    make_repository(tmp_path)
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / ".staging" / "1").mkdir(parents=True)
    (tmp_path / "colours" / "notes").mkdir()
    assert list((await open_catalog(tmp_path)).models) == ["colours"]


async def test_an_engine_that_is_no_onnx(tmp_path: Path) -> None:
    make_repository(tmp_path)
    engine = tmp_path / "colours" / "1" / "model.onnx"
    engine.write_bytes(helper.make_tensor("x", TensorProto.FLOAT, [1], [1.0]).SerializeToString())
    (engine.parent / MANIFEST_FILE).write_text(make_manifest(engine).model_dump_json())
    with pytest.raises(ModelUnavailableError, match="cannot load"):
        await acquire(await open_catalog(tmp_path))


async def test_a_file_that_comes_late_is_noticed(tmp_path: Path) -> None:
    make_repository(tmp_path)
    engine = tmp_path / "colours" / "1" / "model.onnx"
    content = engine.read_bytes()
    for early in (None, b"\0" * len(content)):
        engine.unlink(missing_ok=True)
        if early is not None:
            engine.write_bytes(early)
        catalog = await open_catalog(tmp_path)
        with pytest.raises(ModelUnavailableError):
            await acquire(catalog)
        engine.write_bytes(content)
        os.utime(engine, ns=(1, 1))
        await catalog.refresh()
        assert await acquire(catalog) == "colours@1"


async def test_each_engine_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr("app.catalog.check_hashes", lambda entry: hashed.append(str(entry)))
    make_repository(tmp_path, "alpha", "beta")
    catalog = await open_catalog(tmp_path)
    for _ in range(3):
        await catalog.audit()
    await acquire(catalog, "alpha")
    assert sorted(hashed) == ["alpha@1", "beta@1"]


async def test_a_load_outlives_the_requests_that_gave_up(tmp_path: Path) -> None:
    loads = 0

    class Slow(OnnxRuntimeBackend):
        async def load(self, entry: Entry) -> None:
            nonlocal loads
            loads += 1
            await asyncio.sleep(0.1)
            await super().load(entry)

    catalog = Catalog(make_repository(tmp_path), Slow(), check_golden, {})
    await catalog.refresh()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(acquire(catalog), 0.01)
    assert await acquire(catalog) == "colours@1"
    assert loads == 1


async def test_a_version_that_is_withdrawn_while_it_loads_is_let_go(tmp_path: Path) -> None:
    begun = asyncio.Event()

    class Slow(OnnxRuntimeBackend):
        async def load(self, entry: Entry) -> None:
            begun.set()
            await asyncio.sleep(0.05)
            await super().load(entry)

    catalog = Catalog(make_repository(tmp_path), Slow(), check_golden, {}, grace=0.05)
    await catalog.refresh()
    waiting = asyncio.create_task(acquire(catalog))
    await begun.wait()
    model = catalog.withdraw("colours")
    assert await waiting == "colours@1", "it began before"
    async with asyncio.timeout(10):
        while model.versions[0].loaded:
            await asyncio.sleep(0.01)


async def test_a_model_that_is_restored_while_it_is_unloaded_has_all_engines(tmp_path: Path) -> None:
    restored = asyncio.Event()

    class Slow(OnnxRuntimeBackend):
        async def unload(self, entry: Entry) -> None:
            await super().unload(entry)
            await restored.wait()

    add_dual_encoder(tmp_path, "pair")
    backend = Slow()
    catalog = Catalog(tmp_path, backend, check_golden, {})
    await catalog.refresh()
    version = await catalog.acquire("pair", "embed", "image")
    catalog.withdraw("pair")
    while version.loaded:
        await asyncio.sleep(0.001)
    await catalog.restore("pair")
    restored.set()
    await asyncio.sleep(0.05)
    text = version.entries["text"]
    outputs = await backend.infer(text, {"input_ids": np.zeros((1, LENGTH), np.int64)}, Ticket())
    assert outputs["embedding"].shape == (1, 3)


async def test_the_version_before_answers_while_the_backend_lacks_the_newest(tmp_path: Path) -> None:
    class Behind(OnnxRuntimeBackend):
        async def load(self, entry: Entry) -> None:
            if entry.version == 2:
                raise BackendUnavailableError("not there yet")
            await super().load(entry)

    add_entry(tmp_path)
    add_entry(tmp_path, version=2)
    catalog = Catalog(tmp_path, Behind(), check_golden, {})
    await catalog.refresh()
    assert await acquire(catalog) == "colours@1"
    with pytest.raises(BackendUnavailableError):
        await acquire(catalog, "colours@2")


async def test_the_watch_survives_what_it_meets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = await open_catalog(make_repository(tmp_path))
    looks = 0

    def failing(root: Path) -> None:
        nonlocal looks
        looks += 1
        raise RuntimeError("surprise")

    monkeypatch.setattr("app.catalog._signature", failing)
    watch = asyncio.create_task(catalog.watch(0.001))
    while looks < 3:
        await asyncio.sleep(0.001)
    assert not watch.done()
    watch.cancel()


async def test_only_the_two_newest_versions_are_kept(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        add_entry(tmp_path, version=version)
    catalog = await open_catalog(tmp_path)
    assert [version.number for version in catalog.models["colours"].versions] == [10, 2]


async def test_requests_that_hold_a_vanished_version_finish(tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend()
    catalog = Catalog(make_repository(tmp_path), backend, check_golden, {}, grace=0.1)
    await catalog.refresh()
    entry = (await catalog.acquire(None, "classify", "classify")).entries["classify"]
    shutil.rmtree(tmp_path / "colours")
    await catalog.refresh()
    await asyncio.sleep(0.01)
    images = make_images(1)
    await backend.infer(entry, {"image": images}, Ticket())
    await asyncio.sleep(0.2)
    with pytest.raises(InferenceError, match="not loaded"):
        await backend.infer(entry, {"image": images}, Ticket())


async def test_a_chat_model_that_vanished_stays_for_its_longer_answers(tmp_path: Path) -> None:
    add_chat(tmp_path)
    catalog = Catalog(tmp_path, OnnxRuntimeBackend(), check_golden, {}, chat_grace=0.3)
    await catalog.refresh()
    version = await catalog.acquire(None, "chat", "decoder")
    for entry in version.entries.values():
        shutil.rmtree(entry.path.parent)
    await catalog.refresh()
    await asyncio.sleep(0.05)
    assert version.loaded
    await asyncio.sleep(0.5)
    assert not version.loaded


async def test_random_weights_answer_only_by_name(tmp_path: Path) -> None:
    add_entry(tmp_path, "dice", source=Source(library="timm", architecture="x", weights="random"))
    catalog = await open_catalog(tmp_path)
    with pytest.raises(ModelNotChosenError, match="dice"):
        await acquire(catalog)
    assert await acquire(catalog, "dice") == "dice@1"
