"""How many requests a second each server answers in time: `python -m load_tests.goodput`, 20 minutes at most, needs k6.

Starts Vitrine and then LitServe with the best settings of the sweep, alone on the machine, and searches for the highest rate of
Poisson arrivals of which 99 % are rightly answered within 50 ms. `results/goodput.json` keeps every step.
"""

import json
from typing import Annotated, Any

import typer

from load_tests import images, models, sweep
from load_tests.cache import RESULTS
from load_tests.evaluate import judge
from load_tests.images import PHOTOS
from load_tests.k6.goodput import Found, Wanted, find
from load_tests.k6.runner import K6Error, Run
from load_tests.k6.shots import Form, shot
from load_tests.models import MODELS
from load_tests.processes import ServerError, unwind_on_sigterm
from load_tests.report import describe
from load_tests.servers import CONTENDERS, Tuning, start
from load_tests.wrk import body

OURS = "vitrine"
TARGET = 2.0  # times LitServe's
FORMS: dict[str, Form] = {"raw": "raw", "multipart": "multipart", "base64": "json"}  # k6's words for a body's form


def main(
    *,
    servers: Annotated[
        str, typer.Option(help="Comma list of rows of the comparison; ratios are of the first.")
    ] = f"{OURS},litserve",
    seconds: Annotated[float, typer.Option(min=1, help="Of one step.")] = 20.0,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements at the final rates.")] = 3,
    first: Annotated[float, typer.Option(min=1, help="The first rate, requests a second.")] = 50.0,
    max_steps: Annotated[int, typer.Option(min=1, help="Measurements of one server at most.")] = 24,
) -> None:
    names = servers.split(",")
    if unknown := [name for name in names if CONTENDERS.get(name) is None or CONTENDERS[name].form not in FORMS]:
        raise typer.BadParameter(f"There is no row {unknown[0]!r} that k6 can ask.", param_hint="--servers")
    unwind_on_sigterm()
    images.make_all()
    models.make_all()
    wanted = Wanted(seconds=seconds, repeats=repeats, start=first, max_steps=max_steps)
    print(f"At most {wanted.minutes:.0f} minutes for each of {len(names)} servers.", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            tuning, outcome = _search(name, wanted)
        except (ServerError, K6Error) as error:
            typer.echo(f"{name}: {error}", err=True)
            raise typer.Exit(2) from error
        print(f"{name} ({tuning}): {outcome}", flush=True)
        found[name] = {"setting": str(tuning), **outcome.as_json()}
    ratios = compare({name: each["rate"] for name, each in found.items()})
    about = {name: value for name, value in describe().items() if name not in ("command", "seeds")}
    document = {"about": about, "servers": found, "ratios": ratios, "target": TARGET}
    (RESULTS / "goodput.json").write_text(json.dumps(document, indent=1) + "\n")
    for name, ratio in ratios.items():
        told = "no ratio" if ratio is None else f"{ratio:.2f}"
        verdict = "" if ratio is None else "met" if judge(ratio, "at least", TARGET) else "MISSED"
        print(f"goodput of {names[0]} over {name}'s: {told} (at least {TARGET:g}) {verdict}")
    if not all(each["settled"] for each in found.values()) or None in ratios.values():
        raise typer.Exit(1)


def compare(rates: dict[str, float | None]) -> dict[str, float | None]:
    """The first rate over each of the others; None where a server holds no rate."""
    (_, ours), *others = rates.items()
    return {name: ours / theirs if ours is not None and theirs is not None else None for name, theirs in others}


def _search(name: str, wanted: Wanted) -> tuple[Tuning, Found]:
    contender = CONTENDERS[name]
    tuning = sweep.best(sweep.load(), contender, "throughput")
    form, field = contender.ask(tuning)
    server, url = start(contender, tuning, MODELS["small"])
    with server:
        server.wait(url, body(PHOTOS["500x334"], form, field))
        sent = [shot(url, PHOTOS["500x334"].path, FORMS[form], field)]
        return tuning, find(sent, wanted, lambda rate, run: _tell(name, rate, run))


def _tell(name: str, rate: float, run: Run) -> None:
    print(f"{name}: {rate:.1f}/s: {run.within:.2%} in time, {run.dropped} never sent", flush=True)


if __name__ == "__main__":
    typer.run(main)
