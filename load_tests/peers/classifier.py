"""What every peer's server does with an image, so that only the servers differ: the same ONNX file, decoding, top five.

Runs in the environment of each peer, told by the environment what to do: BENCH_MODEL (model.onnx), BENCH_MANIFEST, BENCH_DECODE
(`usual`: Pillow as tutorials use it; `vitrine`: the functions of Vitrine's own stages), BENCH_THREADS (of one inference).
"""

import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

PORT = int(os.environ.get("BENCH_PORT", "8000"))
WORKERS = int(os.environ.get("BENCH_WORKERS", "1"))
BATCH = int(os.environ.get("BENCH_BATCH", "1"))
WAIT = float(os.environ.get("BENCH_WAIT", "0"))  # seconds that a batch may wait for company


class Classifier:
    """A session of onnxruntime on the processor, with the preprocessing of the model's manifest."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("BENCH_THREADS", "1"))
        options.inter_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(os.environ["BENCH_MODEL"], options, providers=providers)
        self.preprocessing = json.loads(Path(os.environ["BENCH_MANIFEST"]).read_text())["preprocessing"]
        self.prepare = (
            _usual(self.preprocessing)
            if os.environ.get("BENCH_DECODE", "usual") == "usual"
            else vitrine_decoding(self.preprocessing)
        )

    def infer(self, frames: NDArray[Any]) -> NDArray[Any]:
        """uint8 [N,H,W,3] -> probabilities float32 [N,classes]."""
        outputs: list[NDArray[Any]] = self.session.run(["probabilities"], {"image": frames})
        return outputs[0]

    def classify(self, data: bytes) -> dict[str, Any]:
        return answer(self.infer(self.prepare(data)[None])[0])

    def classify_batch(self, images: list[bytes]) -> list[dict[str, Any]]:
        frames = np.stack([self.prepare(data) for data in images])
        return [answer(row) for row in self.infer(frames)]


def answer(probabilities: NDArray[Any]) -> dict[str, Any]:
    """The five likeliest classes of one row."""
    best = np.argsort(probabilities)[-5:][::-1]
    return {"predictions": [{"class_id": int(each), "score": float(probabilities[each])} for each in best]}


def _usual(preprocessing: dict[str, Any]) -> Any:
    """Open, convert, resize the shortest edge, cut the centre: torchvision's steps in Pillow."""
    edge, height, width = (preprocessing[name] for name in ("resize_height", "height", "width"))
    filter_ = Image.Resampling[preprocessing["interpolation"].upper()]

    def prepare(data: bytes) -> NDArray[Any]:
        image = Image.open(BytesIO(data)).convert("RGB")
        scale = edge / min(image.size)
        image = image.resize((max(edge, int(image.width * scale)), max(edge, int(image.height * scale))), filter_)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return np.asarray(image.crop((left, top, left + width, top + height)))

    return prepare


def vitrine_decoding(preprocessing: Any) -> Any:
    """Vitrine's `decode` and `resize` stages, as its pipeline calls them; `preprocessing` is the manifest's."""
    from functools import partial  # noqa: PLC0415

    from app.decode import DecodeLimits, decode, open_image  # noqa: PLC0415
    from app.manifest import Preprocessing  # noqa: PLC0415
    from app.resize import minimum_size, resize  # noqa: PLC0415

    wanted = Preprocessing.model_validate(preprocessing)
    limits = DecodeLimits()
    smallest = partial(minimum_size, preprocessing=wanted) if wanted.scaled_decoding else None

    def prepare(data: bytes) -> NDArray[Any]:
        image, info = decode(open_image(data, limits, smallest))
        return resize(image, wanted, (info.width, info.height))

    return prepare
