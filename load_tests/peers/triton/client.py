"""Bare Triton: a ready tensor over gRPC, no picture involved, and what decoding and resizing would add, measured apart.

Uses `tritonclient`, which Vitrine's own environment has. Prints one line of JSON; latencies in milliseconds.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from load_tests.peers.classifier import Classifier


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("image", type=Path)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5)
    arguments = parser.parse_args()
    data = arguments.image.read_bytes()
    classifier = Classifier()
    frame = classifier.prepare(data)[None]
    until = time.perf_counter() + 1
    with triton.InferenceServerClient(arguments.url) as client:
        while time.perf_counter() < until:
            ask(client, arguments.model, frame)
    until = time.perf_counter() + arguments.seconds
    with ThreadPoolExecutor(arguments.clients) as threads:
        jobs = [threads.submit(loop, arguments.url, arguments.model, frame, until) for _ in range(arguments.clients)]
        latencies = sorted(latency for job in jobs for latency in job.result())
    prepared = []
    for _ in range(200):
        started = time.perf_counter()
        classifier.prepare(data)
        prepared.append(time.perf_counter() - started)
    p50, p90, p99 = (1000 * latencies[min(len(latencies) - 1, int(len(latencies) * share))] for share in (0.5, 0.9, 0.99))
    prepare = 1000 * statistics.median(prepared)
    print(json.dumps({"requests": len(latencies), "p50": p50, "p90": p90, "p99": p99, "prepare": prepare}))


def loop(url: str, model: str, frame: np.ndarray, until: float) -> list[float]:
    latencies = []
    with triton.InferenceServerClient(url) as client:
        while (started := time.perf_counter()) < until:
            ask(client, model, frame)
            latencies.append(time.perf_counter() - started)
    return latencies


def ask(client: triton.InferenceServerClient, model: str, frame: np.ndarray) -> None:
    tensor = triton.InferInput("image", list(frame.shape), "UINT8")
    tensor.set_data_from_numpy(frame)
    assert client.infer(model, [tensor]).as_numpy("probabilities") is not None


if __name__ == "__main__":
    main()
