"""Triton's `onnxruntime` backend in Python, for a Triton that was built without the C++ one.

Triton takes a directory `backends/NAME/model.py` for the backend of that name, so a repository whose `config.pbtxt` says
`backend: "onnxruntime"` is served here and by NVIDIA's container alike. Read from the configuration, as the C++ backend names
them: `default_model_filename`, `max_batch_size`, `output`, `optimization.graph.level`, and the parameters
`intra_op_thread_count`, `inter_op_thread_count`, `execution_mode`, `enable_mem_arena` and `enable_mem_pattern`.
CPU only; strings and sequences are not served.

Needs numpy 1: the stub reads numpy's memory layout of version 1 and gives empty tensors under numpy 2, without an error.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

_LEVELS = {
    -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    0: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


class TritonPythonModel:
    """One instance of one version of a model; the method names are Triton's."""

    def initialize(self, args):
        """Open the session; what is raised here is why Triton says the model cannot be loaded."""
        config = json.loads(args["model_config"])
        file = Path(args["model_repository"]) / args["model_version"] / (config.get("default_model_filename") or "model.onnx")
        self.session = ort.InferenceSession(file, _session_options(config), providers=["CPUExecutionProvider"])
        self.inputs = [tensor.name for tensor in self.session.get_inputs()]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.batched = config.get("max_batch_size", 0) > 0
        missing = set(self.outputs) - {tensor.name for tensor in self.session.get_outputs()}
        if missing:
            raise ValueError(f"{file.name} has no output {', '.join(sorted(missing))}, but config.pbtxt names it")

    def execute(self, requests):
        """Answer the requests that Triton's batcher put together, in their order."""
        responses = [None] * len(requests)
        waiting = []
        for index, request in enumerate(requests):
            if request.is_cancelled():
                responses[index] = _failure("the request was cancelled", pb_utils.TritonError.CANCELLED)
            else:
                waiting.append(index)
        for index, response in zip(waiting, self._answer([requests[index] for index in waiting]), strict=True):
            responses[index] = response
        return responses

    def _answer(self, requests):
        """One run for all requests; when that fails, one for each, so that only the request at fault gets the error."""
        if not self.batched or len(requests) < 2:
            return [self._answer_alone(request) for request in requests]
        try:
            return self._run(requests)
        except Exception:
            return [self._answer_alone(request) for request in requests]

    def _answer_alone(self, request):
        try:
            return self._run([request])[0]
        except Exception as error:
            return _failure(str(error), pb_utils.TritonError.INVALID_ARG)

    def _run(self, requests):
        rows = [[_tensor(request, name) for name in self.inputs] for request in requests]
        feeds = {name: _stack(tensors) for name, tensors in zip(self.inputs, zip(*rows, strict=True), strict=True)}
        results = self.session.run(self.outputs, feeds)
        if len(requests) == 1:
            return [_response(self.outputs, results, requests[0])]
        counts = [len(tensors[0]) for tensors in rows]
        for name, result in zip(self.outputs, results, strict=True):
            if len(result) != sum(counts):
                raise ValueError(f"output {name} has {len(result)} rows for {sum(counts)} of input")
        parts = [np.split(result, np.cumsum(counts)[:-1]) for result in results]
        return [_response(self.outputs, part, request) for part, request in zip(zip(*parts, strict=True), requests, strict=True)]


def _session_options(config):
    """The session that `config` asks for, by the names and defaults of the C++ backend."""
    parameters = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
    level = int(config.get("optimization", {}).get("graph", {}).get("level", 0))
    options = ort.SessionOptions()
    options.graph_optimization_level = _LEVELS.get(level, _LEVELS[0])
    options.intra_op_num_threads = max(0, int(parameters.get("intra_op_thread_count", 0)))
    options.inter_op_num_threads = max(0, int(parameters.get("inter_op_thread_count", 0)))
    if parameters.get("execution_mode") == "1":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.enable_cpu_mem_arena = _flag(parameters.get("enable_mem_arena", "1"))
    options.enable_mem_pattern = _flag(parameters.get("enable_mem_pattern", "1"))
    # Instances share the processor's cores with the server and with one another: a thread that spins takes from them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _flag(value):
    return value.lower() in ("1", "true", "on", "yes")


def _tensor(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise ValueError(f"input {name} is missing")
    return tensor.as_numpy()


def _stack(tensors):
    return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def _response(names, results, request):
    wanted = request.requested_output_names()
    tensors = zip(names, results, strict=True)
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, result) for name, result in tensors if name in wanted])


def _failure(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
