"""Where a network and its weights came from, for the manifest."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from app.manifest import Source
from export.spec import ExportError, ExportRequest, WeightsReport

_LIBRARIES = ("torch", "timm", "transformers", "open_clip_torch", "diffusers", "onnx", "onnxscript")


def describe_source(
    request: ExportRequest,
    library: Literal["timm", "transformers", "open_clip", "diffusers", "python", "onnx", "vitrine"],
    architecture: str,
    *,
    arguments: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    licence: str | None = None,
    paper: str | None = None,
    report: WeightsReport | None = None,
    checkpoint_sha256: str | None = None,
) -> Source:
    """The record of one source; what the user said of the licence comes before what the library says."""
    if request.weights is None:
        raise ExportError("No weights were chosen.")
    return Source(
        library=library,
        architecture=architecture,
        arguments=arguments or {},
        weights=request.weights,
        checkpoint=report.file if report else checkpoint,
        checkpoint_sha256=report.sha256 if report else checkpoint_sha256,
        licence=request.licence or licence,
        paper=paper,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
