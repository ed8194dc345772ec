"""Ray Serve: replicas as actors behind its HTTP proxy; the work in a thread, so that a replica's event loop stays free."""

import asyncio
import os
import time
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

from load_tests.peers.classifier import BATCH, PORT, WAIT, WORKERS, Classifier


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
class Single:
    def __init__(self) -> None:
        self.classifier = Classifier()

    async def __call__(self, request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(self.classifier.classify, await request.body())


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
class Batched:
    def __init__(self) -> None:
        self.classifier = Classifier()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT)
    async def classify(self, images: list[bytes]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.classifier.classify_batch, images)

    async def __call__(self, request: Request) -> dict[str, Any]:
        answer: dict[str, Any] = await self.classify(await request.body())
        return answer


if __name__ == "__main__":
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False, object_store_memory=256 * 1024**2)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run((Batched if BATCH > 1 else Single).bind(), route_prefix="/classify")
    while True:
        time.sleep(3600)
