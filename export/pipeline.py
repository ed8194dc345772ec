"""The way of a model, every stage in its order. Read this first."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from export.files import writing
from export.fuse import fuse
from export.load import load
from export.plan import require_tensorrt
from export.publish import publish
from export.spec import ExportRequest, Fused, Published
from export.stage import stage
from export.to_onnx import to_onnx
from export.to_tensorrt import to_tensorrt
from export.verify import verify

Progress = Callable[[str], None]


def export(request: ExportRequest, progress: Progress) -> Published:
    """load -> fuse -> to_onnx -> [to_tensorrt] -> stage -> verify -> publish. `progress` hears each stage's name as it starts.

    Raises:
        MissingToolError: TensorRT is asked for and cannot be had here; said before any work.
        ExportError: with what to do; the repository is as it was.
    """
    if request.engine == "tensorrt":
        require_tensorrt()
    progress("load")
    loaded = load(request)
    progress("fuse")
    fused = fuse(loaded)
    with TemporaryDirectory(prefix="vitrine-export-") as directory:
        scratch = Path(directory)
        with writing(scratch):
            progress("to_onnx")
            engines = [to_onnx(part, _file(scratch, part), request.precision) for part in fused]
            if request.engine == "tensorrt":
                progress("to_tensorrt")
                plans = [(engine, engine.path.with_suffix(".plan")) for engine in engines]
                engines = [to_tensorrt(engine, plan, request.precision, request.max_batch) for engine, plan in plans]
        with stage(engines, loaded, request) as staged:
            progress("verify")
            verified = verify(staged, fused)
            progress("publish")
            published = publish(verified, request.repository)
    return replace(published, rewrites=fused[0].rewrites, weights=loaded.weights)


def _file(scratch: Path, fused: Fused) -> Path:
    """Where a graph is written; a directory each, since all are called alike."""
    directory = scratch / fused.interface.role
    directory.mkdir()
    return directory / "model.onnx"
