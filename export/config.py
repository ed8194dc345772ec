"""Triton's `config.pbtxt` of a model directory: what all versions of the model share, rendered, never edited by hand."""

from typing import Any

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

from app.manifest import Manifest, TensorSpec

CONFIG_FILE = "config.pbtxt"
_HEADER = "# Rendered by `python -m export` from the manifest; the next publish renders it again.\n"

MAX_QUEUE = 256
QUEUE_TIMEOUT_US = 10_000_000
# One thread an instance keeps two inferences from fighting over the same cores; onnxruntime's default takes every core for each.
CPU_INSTANCES = 2
CPU_THREADS = 1
MAX_STREAMS = 8  # answers under way in one Triton; threads are onnxruntime's own choice there, since one step runs at a time

_TYPES = {"uint8": "TYPE_UINT8", "int32": "TYPE_INT32", "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32"}
_BACKENDS: dict[str, dict[str, Any]] = {
    "onnx": {
        "backend": "onnxruntime",
        "instance_group": [{"kind": "KIND_AUTO", "count": CPU_INSTANCES}],
        "parameters": {
            "intra_op_thread_count": {"string_value": str(CPU_THREADS)},
            "inter_op_thread_count": {"string_value": "1"},
        },
    },
    "tensorrt": {"backend": "tensorrt", "instance_group": [{"kind": "KIND_GPU", "count": 1}]},
}


def render_config(manifest: Manifest) -> str:
    """`config.pbtxt` as protobuf text. No `preferred_batch_size`: a batch is whatever has queued, never waited for."""
    if manifest.generation is not None:
        return _render(_chat(manifest) if manifest.role == "decoder" else _whole(manifest))
    max_batch = manifest.engine.max_batch
    fields = _BACKENDS[manifest.engine.kind] | {
        "name": manifest.entry_name,
        "default_model_filename": manifest.engine.file,
        "max_batch_size": max_batch,
        "input": [_tensor(spec) for spec in manifest.inputs],
        "output": [_tensor(spec) for spec in manifest.outputs],
        "version_policy": {"latest": {"num_versions": 2}},
        "dynamic_batching": {
            "default_queue_policy": {
                "timeout_action": "REJECT",
                "default_timeout_microseconds": QUEUE_TIMEOUT_US,
                "allow_timeout_override": True,
                "max_queue_size": MAX_QUEUE,
            }
        },
        "model_warmup": [_warmup(manifest.inputs, rows) for rows in sorted({1, max_batch})],
    }
    return _render(fields)


def _whole(manifest: Manifest) -> dict[str, Any]:
    """For an engine whose inputs are of one image or one conversation, so that Triton neither batches nor warms up."""
    return _BACKENDS[manifest.engine.kind] | {
        "name": manifest.entry_name,
        "default_model_filename": manifest.engine.file,
        "max_batch_size": 0,
        "input": [_tensor(spec, whole=True) for spec in manifest.inputs],
        "output": [_tensor(spec, whole=True) for spec in manifest.outputs],
        "version_policy": {"latest": {"num_versions": 2}},
    }


def _chat(manifest: Manifest) -> dict[str, Any]:
    """The Python model that runs all three engines: a prompt in, tokens out one by one. See `export/triton_chat.py`."""
    assert manifest.generation is not None
    channels = len(manifest.preprocessing.mean)
    patch = channels * manifest.generation.temporal_patch_size * manifest.generation.patch_size**2
    return {
        "name": manifest.entry_name,
        "backend": "python",
        "max_batch_size": 0,
        "input": [
            {"name": "input_ids", "data_type": "TYPE_INT64", "dims": [-1]},
            {"name": "patches", "data_type": "TYPE_UINT8", "dims": [-1, patch], "optional": True},
            {"name": "grids", "data_type": "TYPE_INT64", "dims": [-1, 3], "optional": True},
            {"name": "max_tokens", "data_type": "TYPE_INT32", "dims": [1]},
            {"name": "temperature", "data_type": "TYPE_FP32", "dims": [1]},
            {"name": "top_p", "data_type": "TYPE_FP32", "dims": [1]},
            {"name": "top_k", "data_type": "TYPE_INT32", "dims": [1]},
            {"name": "seed", "data_type": "TYPE_INT64", "dims": [1], "optional": True},
        ],
        "output": [
            {"name": "token", "data_type": "TYPE_INT32", "dims": [-1]},
            {"name": "finish", "data_type": "TYPE_STRING", "dims": [1]},
            {"name": "error", "data_type": "TYPE_STRING", "dims": [1]},
        ],
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [{"kind": "KIND_AUTO", "count": 1}],
        "parameters": {"threads": {"string_value": "0"}, "max_streams": {"string_value": str(MAX_STREAMS)}},
        "version_policy": {"latest": {"num_versions": 2}},
    }


def _render(fields: dict[str, Any]) -> str:
    message = json_format.ParseDict(fields, model_config_pb2.ModelConfig())
    return f"{_HEADER}{text_format.MessageToString(message)}"


def _tensor(spec: TensorSpec, *, whole: bool = False) -> dict[str, Any]:
    """`whole`: the first axis is written too."""
    return {"name": spec.name, "data_type": _TYPES[spec.dtype], "dims": list(spec.shape if whole else spec.shape[1:])}


def _warmup(inputs: tuple[TensorSpec, ...], rows: int) -> dict[str, Any]:
    """One inference of `rows` rows of zeros before the model is called ready; a free axis is warmed up at 1."""
    tensors = {
        spec.name: {"data_type": _TYPES[spec.dtype], "dims": [max(1, size) for size in spec.shape[1:]], "zero_data": True}
        for spec in inputs
    }
    return {"name": f"batch-{rows}", "batch_size": rows, "inputs": tensors}
