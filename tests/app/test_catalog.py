"""What the catalog lists, loads and chooses, and how it copes with every fault of a repository."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from app.backends.onnxruntime import OnnxRuntimeBackend
from app.catalog import Catalog
from app.errors import ModelNotChosenError, ModelNotFoundError, ModelUnavailableError
from app.golden import check_golden
from app.manifest import MANIFEST_FILE
from tests.repository import add_entry, make_manifest, make_repository

pytestmark = pytest.mark.anyio


async def open_catalog(root: Path, **defaults: str) -> Catalog:
    catalog = Catalog(root, OnnxRuntimeBackend(), check_golden, defaults)
    await catalog.refresh()
    return catalog


async def acquire(catalog: Catalog, name: str | None = None) -> str:
    return str(await catalog.acquire(name, "classify", "classify"))


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
    assert await acquire(catalog) == "colours@2"
    assert await acquire(catalog, "colours@1") == "colours@1"
    shutil.rmtree(tmp_path / "colours" / "2")
    await catalog.refresh()
    assert await acquire(catalog) == "colours@1"


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


@pytest.mark.parametrize(("break_it", "reason"), FAULTS[:13], ids=[fault.__name__ for fault, _ in FAULTS[:13]])
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
