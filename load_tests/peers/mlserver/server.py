"""MLServer: a custom runtime that takes the image in base64, the form that its protocol has for bytes in JSON."""

import json
from typing import Any

from mlserver import MLModel
from mlserver.codecs import Base64Codec, StringCodec
from mlserver.types import InferenceRequest, InferenceResponse

from load_tests.peers.classifier import Classifier


class OnnxClassifier(MLModel):
    async def load(self) -> bool:
        self.classifier = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One input of N images; with adaptive batching MLServer has merged N requests into it."""
        images: list[bytes] = Base64Codec.decode_input(payload.inputs[0])
        answers: list[dict[str, Any]] = self.classifier.classify_batch(images)
        output = StringCodec.encode_output("predictions", [json.dumps(each) for each in answers])
        return InferenceResponse(model_name=self.name, outputs=[output])
