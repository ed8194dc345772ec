"""LitServe: an upload by form, as its image examples take it; decoding in the workers, batches by its own queue."""

from typing import Any

import litserve
from starlette.datastructures import FormData
from starlette.requests import Request

from load_tests.peers.classifier import BATCH, PORT, WAIT, WORKERS, Classifier


class ImageApi(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.classifier = Classifier()

    def decode_request(self, request: Request) -> bytes:
        form: FormData = request  # type: ignore[assignment]  # LitServe passes the form that it has read
        data: bytes = form["image"].file.read()  # type: ignore[union-attr]
        return data

    def predict(self, data: Any) -> Any:
        return self.classifier.classify_batch(data) if BATCH > 1 else self.classifier.classify(data)

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


if __name__ == "__main__":
    api = ImageApi(max_batch_size=BATCH, batch_timeout=WAIT, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=WORKERS, timeout=120)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning")
