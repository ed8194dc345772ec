"""First stage of an export: find the network that a source names, with the weights that were asked for."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

from export import architectures
from export.sources.qwen2_5_vl import MODEL_TYPE as QWEN2_5_VL
from export.spec import AnyLoaded, ExportError, ExportRequest

_KINDS = ("timm", "transformers", "open_clip", "diffusers", "python", "onnx")
_FORMS = (
    "timm/NAME[.TAG], transformers/PATH_OR_ID, open_clip/NAME[:TAG], diffusers/PATH_OR_ID[:FOLDER], python/FILE.py:factory, "
    "onnx/FILE, qwen2_5_vl, or the NAME of a file in export/architectures ({names})"
)


def load(request: ExportRequest) -> AnyLoaded:
    """Build the network of `request.source`.

    Raises:
        ExportError: an unknown source; not exactly one way to get weights; a precision the engine does not run; anything the
            source itself refuses.
    """
    kind, slash, identifier = request.source.partition("/")
    if not slash and kind in architectures.names():
        kind, identifier = "architecture", kind
    elif not slash and kind == QWEN2_5_VL:
        identifier = kind
    elif kind not in _KINDS or not identifier:
        known = ", ".join(architectures.names()) or "none yet"
        raise ExportError(f"{request.source!r} is not a source; write {_FORMS.format(names=known)}.")
    _check_weights(request, kind)
    _check_reading(request, kind, identifier)
    _check_precision(request)
    source: Callable[[ExportRequest, str], AnyLoaded] = import_module(f"export.sources.{kind}").load
    return source(replace(request, weights="embedded") if kind == "onnx" else request, identifier)


def _check_precision(request: ExportRequest) -> None:
    """Precisions that the engine can run."""
    if request.precision == "int8":
        raise ExportError("int8 is not exported; choose --precision fp32, fp16 or, with --engine tensorrt, bf16.")
    if request.precision == "bf16" and request.engine != "tensorrt":
        raise ExportError("onnxruntime does not run bf16; choose --precision fp16, or --engine tensorrt.")


def _check_reading(request: ExportRequest, kind: str, identifier: str) -> None:
    """A tokenizer is for networks that read phrases."""
    if kind == "open_clip" and request.long_phrases is None:
        return
    reads = kind == "architecture" and architectures.task_of(architectures.find(identifier)) == "ground"
    if not reads and (request.tokenizer is not None or request.long_phrases is not None):
        raise ExportError(f"{request.source} reads no phrases; leave --tokenizer and --long-phrases out.")


def _check_weights(request: ExportRequest, kind: str) -> None:
    """Exactly one way to get weights, and one that the source has."""
    if kind == "onnx":
        if request.weights not in (None, "embedded") or request.checkpoint is not None:
            raise ExportError("An ONNX file brings its own weights; leave --pretrained, --checkpoint and --random-init out.")
        return
    if request.weights not in ("pretrained", "checkpoint", "random"):
        raise ExportError("Say where the weights come from: --pretrained, --checkpoint FILE or --random-init.")
    if (request.weights == "checkpoint") != (request.checkpoint is not None):
        raise ExportError("Choose one of --pretrained, --checkpoint FILE and --random-init; a checkpoint needs its FILE.")
