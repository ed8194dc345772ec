"""Finds each peer's best settings: `python -m load_tests.sweep`, about 12 minutes, goes on where it was interrupted.

Throughput: the small net at 32 clients. Latency: the medium net at 1 client, where a batch only waits. `results/sweep.json` keeps
every cell; a bench run takes the best of them. Of Vitrine's settings only the number of processes is tried.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from load_tests import images, models
from load_tests.cache import RESULTS, cache
from load_tests.images import PHOTOS
from load_tests.models import MODELS
from load_tests.processes import ServerError, unwind_on_sigterm
from load_tests.servers import CONTENDERS, Contender, Tuning, predictions, start
from load_tests.wrk import WrkError, body, run

FILE = RESULTS / "sweep.json"
GOALS = {"throughput": ("small", 32), "latency": ("medium", 1)}


def main(
    seconds: Annotated[float, typer.Option(help="Of one cell.")] = 6.0,
    only: Annotated[str | None, typer.Option(help="The name of one server.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there.")] = False,
) -> None:
    unwind_on_sigterm()
    images.make_all()
    models.make_all()
    cells = [] if fresh else load()
    done = {(cell["server"], cell["goal"], Tuning(**cell["tuning"])) for cell in cells}
    for contender in CONTENDERS.values():
        if (only and contender.name != only) or len(contender.tunings) == 1 or contender.sweep_of:
            continue
        for goal, (model, clients) in GOALS.items():
            for tuning in contender.tunings:
                if (contender.name, goal, tuning) in done or (goal == "latency" and tuning.batch > 1):
                    continue
                cell = {"server": contender.name, "goal": goal, "tuning": asdict(tuning)}
                cell |= _measure(contender, tuning, model, clients, seconds)
                print(f"{contender.name}, {goal}, {tuning}: {cell.get('failure') or _figures(cell)}", flush=True)
                cells.append(cell)
                FILE.write_text(json.dumps(cells, indent=1) + "\n")


def load(file: Path = FILE) -> list[dict[str, Any]]:
    """The cells that were measured; none when there is no file."""
    found: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return found


def best(cells: list[dict[str, Any]], contender: Contender, goal: str) -> Tuning:
    """The setting with the most images per second, or the lowest p50; the first of the sweep where nothing was measured."""
    name = contender.sweep_of or contender.name
    mine = [cell for cell in cells if (cell["server"], cell["goal"]) == (name, goal) and not cell.get("failure")]
    if not mine:
        return contender.tunings[0]
    chosen = max(mine, key=lambda cell: cell["rate"]) if goal == "throughput" else min(mine, key=lambda cell: cell["p50"])
    return Tuning(**chosen["tuning"])


def _measure(contender: Contender, tuning: Tuning, model: str, clients: int, seconds: float) -> dict[str, Any]:
    form, field = contender.ask(tuning)
    sent = body(PHOTOS["500x334"], form, field)
    server, url = start(contender, tuning, MODELS[model])
    try:
        with server:
            predictions(contender.kind, server.wait(url, sent))
            run(url, sent, clients, 1, cache() / "wrk")
            server.settle()
            load = run(url, sent, clients, seconds, cache() / "wrk")
    except (ServerError, WrkError, KeyError, ValueError) as error:
        print(error, flush=True)
        return {"failure": str(error).splitlines()[0]}
    if load.errors:
        return {"failure": f"{load.errors} errors"}
    return {"rate": round(load.rate, 1), "p50": round(load.p50, 2)}


def _figures(cell: dict[str, Any]) -> str:
    return f"{cell['rate']:.1f} images/s, p50 {cell['p50']:.2f} ms"


if __name__ == "__main__":
    typer.run(main)
