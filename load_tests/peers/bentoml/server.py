"""BentoML: worker processes; one image per call as the raw body, or with adaptive batching lists of images by form."""

from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from load_tests.peers.classifier import BATCH, WORKERS, Classifier

LIMITS = {"timeout": 120, "max_concurrency": 256}


@bentoml.service(workers=WORKERS, traffic=LIMITS, logging={"access": {"enabled": False}})
class Single:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api
    def classify(self, image: Annotated[Path, ContentType("image/jpeg")], /) -> dict[str, Any]:
        return self.classifier.classify(image.read_bytes())


@bentoml.service(workers=WORKERS, traffic=LIMITS, logging={"access": {"enabled": False}})
class Batched:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(batchable=True, max_batch_size=max(2, BATCH), max_latency_ms=1000)
    def classify(self, images: list[Path]) -> list[dict[str, Any]]:
        return self.classifier.classify_batch([image.read_bytes() for image in images])
