"""Fourth stage of a model, only when asked for: TensorRT builds a plan for the GPU of this machine from the ONNX file."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from app.manifest import Precision, TensorSpec
from export.plan import make_log, require_tensorrt
from export.spec import Engine, ExportError

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_LOG_LINES = 20


def to_tensorrt(engine: Engine, path: Path, precision: Precision, max_batch: int) -> Engine:
    """Write the plan of `engine` to `path`: one optimisation profile over batches of 1 to `max_batch`.

    The network is strongly typed: `precision` is that of the types in the ONNX graph, and TensorRT keeps to it.

    Raises:
        MissingToolError: see `require_tensorrt`.
        ExportError: the graph is of another precision, the parser does not take it, or the build fails; with what TensorRT said.
    """
    trt = require_tensorrt()
    if engine.precision != precision:
        raise ExportError(f"The ONNX graph is {engine.precision}; a {precision} plan needs a {precision} graph.")
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(engine.path)):
        raise ExportError(parser_message(parser.get_error(i) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    # TF32 rounds the factors of a float32 product to 10 bits; fp32 is to mean fp32.
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for source in engine.interface.inputs:
        profile.set_shape(source.name, *profile_shapes(source, max_batch))
    config.add_optimization_profile(profile)
    plan = _build(builder, network, config, timing_cache_path(trt.__version__, torch.cuda.get_device_name()))
    if plan is None:
        raise ExportError(f"TensorRT could not build the engine. {log_message(log.lines)}")
    path.write_bytes(plan)
    return replace(engine, path=path, kind="tensorrt", external_data=())


def profile_shapes(source: TensorSpec, max_batch: int) -> Shapes:
    """Smallest, most usual and largest shape of the input; tuned for full batches."""
    row = source.shape[1:]
    return (1, *row), (max_batch, *row), (max_batch, *row)


def timing_cache_path(version: str, gpu: str) -> Path:
    """Where measured kernel times are kept between builds, one file per TensorRT version and GPU model."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "vitrine" / "tensorrt" / f"{version}-{gpu.lower().replace(' ', '-')}.cache"


def parser_message(errors: Iterable[Any]) -> str:
    """All errors of an OnnxParser in one message, a line each."""
    lines = [f"  {error.node_operator() or 'graph'} {error.node_name()}: {error.desc()}" for error in errors]
    return "TensorRT's parser does not take this graph:\n" + "\n".join(lines or ["  it gave no reason"])


def log_message(lines: list[str]) -> str:
    """The end of the builder's log."""
    return "It said:\n" + "\n".join(f"  {line}" for line in lines[-_LOG_LINES:]) if lines else "It said nothing."


def _build(builder: Any, network: Any, config: Any, cache_path: Path) -> Any:
    """The serialized engine, None when TensorRT fails; the timing cache is read before and written after."""
    cache = config.create_timing_cache(cache_path.read_bytes() if cache_path.exists() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    timings = config.get_timing_cache()
    if plan is not None and timings is not None:
        with suppress(OSError):  # without it the next build is slower, no worse
            cache_path.parent.mkdir(parents=True, exist_ok=True)
            fresh = cache_path.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(timings.serialize())
            fresh.replace(cache_path)
    return plan
