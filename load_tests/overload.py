"""What is left of the gateway when twice as many ask as it can answer: `python -m load_tests.overload`, two minutes, needs k6.

Its capacity is measured in a closed loop; then requests arrive at twice that rate, answered or not; then the closed loop again.
Asked are the share of the capacity that is still answered rightly, that all else is told to come again, and that it is over when
it is over. `results/overload-BACKEND.json` keeps the figures.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from app import local_triton
from load_tests import images
from load_tests.cache import RESULTS
from load_tests.images import PHOTOS
from load_tests.k6.runner import K6Error, Plan, Run, run
from load_tests.k6.shots import Shot, shot
from load_tests.mix import warm
from load_tests.processes import ServerError, unwind_on_sigterm
from load_tests.report import describe
from load_tests.soak import BUNDLED, Backend, gateway
from load_tests.wrk import Body

CLIENTS = 32  # of the closed loop
WARM_UP = 2.0
LOOP_SECONDS = 10.0  # before and after
GOODPUT = 0.9
UNSENT = 0.01  # of what was to be sent; with more, this was no such load
RECOVERY_SECONDS = 1.0


def main(
    *,
    factor: Annotated[float, typer.Option(min=1, help="Times the capacity.")] = 2.0,
    seconds: Annotated[float, typer.Option(min=1, help="Of overload.")] = 60.0,
    backend: Annotated[Backend, typer.Option(help="The gateway's; for triton the local one is started.")] = "onnxruntime",
    photo: Annotated[str, typer.Option(help=f"What is sent: {', '.join(PHOTOS)}.")] = "1920x1281",
    route: Annotated[str, typer.Option(help="Where to; any that answers a photo.")] = "/v1/classify",
    repository: Annotated[
        Path, typer.Option(help="Models named as the bundled ones are.", show_default="model_repository")
    ] = BUNDLED,
    output: Annotated[Path, typer.Option(help="Directory of the results.", show_default="load_tests/results")] = RESULTS,
) -> None:
    if photo not in PHOTOS:
        raise typer.BadParameter(f"There is no photo {photo!r}.", param_hint="--photo")
    unwind_on_sigterm()
    images.make_all()
    loop = min(LOOP_SECONDS, seconds)
    try:
        with gateway(backend, repository) as (server, url):
            sent = shot(f"{url}{route}", PHOTOS[photo].path)
            warm([sent])
            run(_closed(sent, min(WARM_UP, loop)))
            before = run(_closed(sent, loop))
            measured = run(_open(sent, seconds, factor * _goodput(before)))
            began = time.monotonic()
            server.wait(sent.url, Body(sent.content_type, sent.body))
            recovery = time.monotonic() - began
            after = run(_closed(sent, loop))
    except (ServerError, K6Error, local_triton.LocalTritonError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    verdicts = judge(before, measured, recovery, after)
    about = {name: value for name, value in describe().items() if name not in ("command", "seeds")}
    runs = {"before": asdict(before), "overload": asdict(measured), "after": asdict(after)}
    asked = {"factor": factor, "seconds": seconds, "backend": backend, "photo": photo, "route": route}
    output.mkdir(parents=True, exist_ok=True)
    document = {"about": about, **asked, "verdicts": verdicts, "runs": runs}
    (output / f"overload-{backend}.json").write_text(json.dumps(document, indent=1) + "\n")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['told']} ({'met' if verdict['met'] else 'MISSED'})")
    if not all(verdict["met"] for verdict in verdicts.values()):
        for line in measured.log:
            print(f"  {line}")
        raise typer.Exit(1)


def _closed(sent: Shot, seconds: float) -> Plan:
    return Plan([sent], seconds, limit=30_000, clients=CLIENTS, stages=False, timeout=30)


def _open(sent: Shot, seconds: float, rate: float) -> Plan:
    """As many clients as the gateway takes in at a time, 256, and for a second those that it tells to come again."""
    return Plan([sent], seconds, limit=30_000, rate=rate, clients=300 + round(rate), stages=False, timeout=30)


def _goodput(found: Run) -> float:
    """Right answers a second."""
    return found.right / found.seconds


def judge(before: Run, measured: Run, recovery: float, after: Run) -> dict[str, dict[str, Any]]:
    """What is asked of a gateway under overload, by its name: what was found, and whether it is met."""
    goodput, capacity, later = map(_goodput, (measured, before, after))
    others = measured.requests - measured.right - measured.refused
    unsent = measured.dropped / max(1, measured.requests + measured.dropped)
    median = "" if measured.latency is None else f"; the median of all answers took {measured.latency.median:.0f} ms"
    return {
        "goodput": {
            "told": f"{goodput:.1f} of {capacity:.1f} a second, {goodput / capacity:.1%}{median}; "
            f"k6 used {measured.client_cores:.2f} cores",
            "met": goodput >= GOODPUT * capacity,
        },
        "the rest": {
            "told": f"{measured.refused} of {measured.requests} were told to come again, {others} got something else, "
            f"{measured.dropped} were never sent",
            "met": measured.refused > 0 and others == 0 and unsent <= UNSENT,
        },
        "recovery": {
            "told": f"the next right answer came after {1000 * recovery:.0f} ms, then {later:.1f} a second",
            "met": recovery <= RECOVERY_SECONDS and later >= GOODPUT * capacity and after.expected == 1.0,
        },
    }


if __name__ == "__main__":
    typer.run(main)
