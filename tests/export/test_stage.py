import stat
from dataclasses import replace
from pathlib import Path

import pytest

from app.manifest import check_hashes, read_entry
from export.spec import Engine, ExportError, Loaded, Reference
from export.stage import model_name, stage
from tests.export.small import CLASSES, make_request

Made = tuple[Engine, Reference]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("timm/convnext_atto.d2_in1k", "convnext-atto-d2-in1k"),
        ("transformers/microsoft/cvt-13", "cvt-13"),
        ("transformers//srv/checkpoints/My_ViT/", "my-vit"),
        ("python/work/mynet.py:make", "mynet"),
        ("onnx/their.onnx", "their"),
        ("hiera", "hiera"),
        ("timm/" + "x" * 120, "x" * 100),
    ],
)
def test_a_name_is_made_of_the_source(tmp_path: Path, source: str, name: str) -> None:
    assert model_name(make_request(tmp_path, source=source, name=None)) == name


@pytest.mark.parametrize("name", ["", "Größe", "a/b", "../up", "-dash", "a.b", "x" * 101])
def test_a_name_that_no_model_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="--name"):
        model_name(make_request(tmp_path, name=name))


def test_a_staged_version_is_whole_and_outside_the_repository(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    request = make_request(tmp_path, description="small but whole", max_batch=4)
    request.repository.mkdir()
    with stage([made[0]], loaded, request) as (staged,):
        entry = read_entry(staged.path)
        check_hashes(entry)
        assert not staged.path.is_relative_to(request.repository)
        assert staged.path.stat().st_dev == request.repository.stat().st_dev
        assert not list(request.repository.iterdir())
        assert sorted(path.name for path in (staged.path / "golden").iterdir()) == ["landscape.jpg", "portrait.png", "rotated.jpg"]
        assert (staged.path.parent / "config.pbtxt").exists()
        # Another user runs the server.
        assert all(path.stat().st_mode & stat.S_IROTH for path in staged.path.rglob("*"))
    manifest = entry.manifest
    assert manifest.verification is None
    assert not manifest.preprocessing.scaled_decoding
    assert (manifest.inputs[0].shape, manifest.outputs[0].shape) == ((-1, 32, 32, 3), (-1, CLASSES))
    assert (manifest.engine.max_batch, manifest.engine.opset, manifest.description) == (4, made[0].opset, "small but whole")
    assert manifest.build.endswith(manifest.engine.sha256[:8])
    assert manifest.tensorrt == made[0].tensorrt


def test_nothing_stays_when_the_block_fails(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    with pytest.raises(RuntimeError, match="stop"), stage([made[0]], loaded, make_request(tmp_path)):
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_external_data_travels_beside_the_engine(tmp_path: Path, made: Made, loaded: Loaded) -> None:
    data = tmp_path / "model.onnx.data"
    data.write_bytes(b"weights")
    with stage([replace(made[0], external_data=(data,))], loaded, make_request(tmp_path)) as (staged,):
        check_hashes(read_entry(staged.path))
        assert (staged.path / "model.onnx.data").read_bytes() == b"weights"
        (staged.path / "model.onnx.data").write_bytes(b"weighty")
        with pytest.raises(Exception, match="SHA-256"):
            check_hashes(read_entry(staged.path))


def test_a_repository_on_another_file_system_is_refused(made: Made, loaded: Loaded) -> None:
    mounted = Path("/dev/shm")  # a mount point of its own on Linux
    if not mounted.is_mount():
        pytest.skip("needs a mounted directory")
    with pytest.raises(ExportError, match="two file systems"), stage([made[0]], loaded, make_request(mounted, repository=mounted)):
        pass
    assert not list(mounted.parent.glob(".staging-*"))
