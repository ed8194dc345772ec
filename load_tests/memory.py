"""Whether the gateway's memory grows: `python -m load_tests.memory`, 50,000 requests, some minutes.

Resident memory (proportional, of all its processes) is read after a warm-up and again at the end.
"""

import json
from typing import Annotated

import typer

from load_tests import images, models
from load_tests.cache import RESULTS, cache
from load_tests.images import PHOTOS
from load_tests.models import MODELS
from load_tests.processes import Server, unwind_on_sigterm
from load_tests.servers import CONTENDERS, Tuning, start
from load_tests.wrk import Body, body, run

LIMIT = 0.05
STEP = 10.0  # seconds between two looks at what is done
CLIENTS = 32


def main(
    requests: Annotated[int, typer.Option(help="Between the two readings.", min=1)] = 50_000,
    warm_up: Annotated[int, typer.Option(help="Requests before the first.", min=1)] = 2_000,
) -> None:
    unwind_on_sigterm()
    images.make_all()
    models.make_all()
    sent = body(PHOTOS["500x334"], "raw")
    server, url = start(CONTENDERS["vitrine"], Tuning(), MODELS["small"])
    with server:
        server.wait(url, sent)
        _send(server, url, sent, warm_up)
        before = server.usage().memory
        done = _send(server, url, sent, requests)
        after = server.usage().memory
    growth = after / before - 1
    found = {"requests": done, "before": before, "after": after, "growth": growth, "limit": LIMIT, "met": growth <= LIMIT}
    (RESULTS / "memory.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{done} requests: {before / 2**20:.1f} MB -> {after / 2**20:.1f} MB, {growth:+.1%} (at most {LIMIT:.0%})")
    if growth > LIMIT:
        raise typer.Exit(1)


def _send(server: Server, url: str, sent: Body, requests: int) -> int:
    """Send at least `requests` and give how many it were.

    Raises:
        ValueError: one of them failed.
    """
    done = 0
    while done < requests:
        load = run(url, sent, CLIENTS, STEP, cache() / "wrk")
        if load.errors or not load.requests:
            raise ValueError(f"{load.errors} of {load.requests} requests failed.")
        done += load.requests
        print(f"{done} requests, {server.usage().memory / 2**20:.1f} MB", flush=True)
    return done


if __name__ == "__main__":
    typer.run(main)
