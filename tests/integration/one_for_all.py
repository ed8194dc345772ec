"""The `model.py` of a Triton model that fails every request of a merged batch for one of them, as NVIDIA's C++ backends do.

It runs the `model.onnx` beside it under Triton's own Python backend.
"""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        file = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])

    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        try:
            (answers,) = self.session.run(["probabilities"], {"image": np.concatenate(images)})
        except Exception as error:
            return [_failure(f"onnx runtime error 2: {error}") for _ in requests]
        parts = np.split(answers, np.cumsum([len(image) for image in images])[:-1])
        return [pb_utils.InferenceResponse([pb_utils.Tensor("probabilities", part)]) for part in parts]


def _failure(message):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))
