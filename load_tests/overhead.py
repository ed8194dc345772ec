"""What metrics and `Server-Timing` cost a request, in CPU time: the gateway's own functions, called as a request calls them.

    python load_tests/overhead.py --limit 60

Measured with one process and as one of several (metrics in shared files); exit code 1 when either is above the limit.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from app import metrics
from app.admission import Ticket
from app.api.call import Call, server_timing
from app.workers import metrics_directory

MODES = ("one process", "several processes")
REPEATS = 15
REQUESTS = 2000
TASK, MODEL, ENGINE = "classify", "convnext-50", "convnext-50@1"


def measure() -> float:
    """Microseconds of CPU per request, the median of the repeats."""
    metrics.begin((TASK,))
    metrics.expect(TASK, MODEL)
    depth, sizes = metrics.Level(metrics.QUEUE_DEPTH.labels(ENGINE)), metrics.BATCH_SIZE.labels(ENGINE)

    def request() -> None:
        call = Call("0f7c2f8a3a8f4c5a9c1f0f4be2f0a9d1", TASK)
        call.ticket = ticket = Ticket(id=call.id)
        metrics.IN_FLIGHT.set(1)
        for stage in ("read", "parse"):
            with ticket.stage(stage):
                pass
        ticket.model = MODEL
        for stage in ("decode", "decode", "resize"):  # decoding is timed in two parts: the header and the pixels
            with ticket.stage(stage):
                pass
        metrics.observe_image(57_000, 500 * 334)
        depth.set(1)
        sizes.observe(1)
        now = time.perf_counter()
        ticket.record("queue", 0.0004, now)
        ticket.record("infer", 0.0013)
        depth.set(0)
        with ticket.stage("finish"):
            pass
        metrics.count_images(TASK, MODEL, 1, ())
        with ticket.stage("encode"):
            pass
        metrics.IN_FLIGHT.set(0)
        call.status = 200
        server_timing(ticket.stages)
        call.observe()
        assert len(ticket.stages) == len(metrics.STAGES)

    def bare() -> None:
        call = Call("0f7c2f8a3a8f4c5a9c1f0f4be2f0a9d1", TASK)
        call.ticket = Ticket(id=call.id)

    def cost(work: Callable[[], None]) -> float:
        began = time.process_time()
        for _ in range(REQUESTS):
            work()
        return (time.process_time() - began) / REQUESTS * 1e6

    return statistics.median(cost(request) - cost(bare) for _ in range(REPEATS))


def measure_apart(mode: str) -> float:
    """In a process of its own: prometheus_client chooses how it stores values when it is imported."""
    with metrics_directory() as directory:
        variables = {"PROMETHEUS_MULTIPROC_DIR": directory} if mode == MODES[1] else {}
        inherited = {name: value for name, value in os.environ.items() if name.lower() != "prometheus_multiproc_dir"}
        command = [sys.executable, __file__, "--here"]
        done = subprocess.run(command, env=inherited | variables, capture_output=True, text=True, check=True)  # noqa: S603
        return float(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=60.0, help="microseconds of CPU per request that are allowed")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(measure())
        return 0
    costs = {mode: measure_apart(mode) for mode in MODES}
    for mode, cost in costs.items():
        print(f"{mode}: {cost:.1f} us CPU per request; {arguments.limit:g} are allowed")
    return 0 if max(costs.values()) <= arguments.limit else 1


if __name__ == "__main__":
    sys.exit(main())
