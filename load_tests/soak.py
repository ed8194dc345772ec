"""Whether gateways hold what they hold after half an hour as after some minutes: `python -m load_tests.soak`, needs k6.

Clients in a closed loop ask every task that the bundled models answer, in every form of a body, with broken requests among the
good ones: of two gateways side by side, one with the embedded engine and one before a local Triton. Memory, open files and
threads of each are read all along; `results/soak.json` and `.png` keep them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app import local_triton
from load_tests import images
from load_tests.cache import RESULTS, ROOT, cache
from load_tests.k6.runner import K6Error, Plan, Run, run
from load_tests.mix import mixed, warm
from load_tests.observer import Drift, Observer, Sample, drift
from load_tests.processes import Server, ServerError, unwind_on_sigterm
from load_tests.report import describe
from load_tests.servers import free_port, vitrine

BUNDLED = ROOT / "model_repository"
GROWTH = 0.05  # of memory
SLACK = 4  # open files and threads; connections to Triton and of k6 come and go
LEAST_SAMPLES = 10
COLOURS = ("#1f6f54", "#b5542b")
Backend = Literal["onnxruntime", "triton"]
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "triton")


def main(
    *,
    minutes: Annotated[float, typer.Option(min=0.05)] = 30.0,
    backend: Annotated[
        Literal["both", "onnxruntime", "triton"], typer.Option(help="The gateways'; for triton a local one is started.")
    ] = "both",
    clients: Annotated[int, typer.Option(min=1)] = 8,
    step: Annotated[float, typer.Option(min=0.1, help="Seconds between two samples.")] = 10.0,
    repository: Annotated[Path, typer.Option(help="Models; all of them are asked.", show_default="model_repository")] = BUNDLED,
    output: Annotated[Path, typer.Option(help="Directory of the results.", show_default="load_tests/results")] = RESULTS,
) -> None:
    if 60 * minutes < LEAST_SAMPLES * step:
        raise typer.BadParameter(
            f"At {step:g} s a sample, {minutes:g} minutes are too short to tell a drift.", param_hint="--minutes"
        )
    unwind_on_sigterm()
    images.make_all()
    backends = BACKENDS if backend == "both" else (backend,)
    try:
        with ExitStack() as held:
            gateways = {name: held.enter_context(gateway(name, repository)) for name in backends}
            each_asked = [[replace(each, name=f"{name} {each.name}") for each in mixed(url)] for name, (_, url) in gateways.items()]
            sent = [each for turn in zip(*each_asked, strict=True) for each in turn]
            warm(sent)
            with ExitStack() as watched:
                observed = {name: watched.enter_context(Observer(server, step)) for name, (server, _) in gateways.items()}
                measured = run(Plan(sent, 60 * minutes, limit=10_000, clients=clients, stages=False, timeout=30))
    except (ServerError, K6Error, local_triton.LocalTritonError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    samples: dict[str, Sequence[Sample]] = {name: each.samples for name, each in observed.items()}
    verdicts = judge(measured, samples)
    about = {name: value for name, value in describe().items() if name not in ("command", "seeds")}
    asked = {"minutes": minutes, "clients": clients, "shots": [each.name for each in sent]}
    figures = {"run": asdict(measured), "samples": {name: [asdict(sample) for sample in each] for name, each in samples.items()}}
    output.mkdir(parents=True, exist_ok=True)
    (output / "soak.json").write_text(json.dumps({"about": about, **asked, "verdicts": verdicts, **figures}, indent=1) + "\n")
    plot(samples, f"{minutes:g} minutes, {clients} clients, {measured.requests:,} requests", output / "soak.png")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['told']} ({'met' if verdict['met'] else 'MISSED'})")
    for line in measured.log:
        print(f"  {line}")
    if not all(verdict["met"] for verdict in verdicts.values()):
        raise typer.Exit(1)


@contextmanager
def gateway(backend: Backend, repository: Path) -> Iterator[tuple[Server, str]]:
    """A gateway on `repository`, ready, and its address; behind it a local Triton where the backend is that.

    Raises:
        ServerError: it does not start.
        LocalTritonError: there is no local Triton, or it does not start.
    """
    port, logs = free_port(), cache() / "logs"
    logs.mkdir(exist_ok=True)
    settings = {"VITRINE_REPOSITORY": str(repository.resolve()), "VITRINE_BACKEND": backend}
    with ExitStack() as held:
        if backend == "triton":
            home = local_triton.find(ROOT / local_triton.HOME)
            log = held.enter_context((logs / "endurance-tritonserver.log").open("wb"))
            triton = held.enter_context(local_triton.LocalTriton(repository, local_triton.free_ports(), home, log))
            settings["VITRINE_TRITON_URL"] = triton.url
        server = held.enter_context(vitrine(port, 1, logs / f"endurance-{backend}.log", settings))
        server.wait(f"http://127.0.0.1:{port}/readyz")
        yield server, f"http://127.0.0.1:{port}"


def judge(measured: Run, samples: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """What is asked of a soak, by its name: what was found, and whether it is met. `samples` are each gateway's, by its name."""
    wrong = measured.requests - measured.right
    verdicts = {
        "answers": {
            "told": f"{wrong} of {measured.requests} were not what they must be, {measured.server_errors} of them a 5xx",
            "met": measured.requests > 0 and not wrong and not measured.server_errors,
        }
    }
    for name, each in samples.items():
        memory, files, threads = (drift([getattr(sample, figure) for sample in each]) for figure in ("memory", "files", "threads"))
        verdicts[f"{name}, memory"] = {
            "told": f"{memory.first / 2**20:.1f} MiB -> {memory.last / 2**20:.1f} MiB, {memory.growth:+.1%}",
            "met": memory.growth < GROWTH,
        }
        verdicts |= {f"{name}, open files": _flat(files), f"{name}, threads": _flat(threads)}
    return verdicts


def _flat(found: Drift) -> dict[str, Any]:
    return {"told": f"{found.first:g} -> {found.last:g}", "met": found.last - found.first <= SLACK}


def plot(samples: Mapping[str, Sequence[Sample]], title: str, file: Path) -> None:
    """Memory, open files and threads over minutes, one below the other, a line for each gateway."""
    import matplotlib as mpl  # noqa: PLC0415 -- only a report needs it

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    panels = {"memory": "memory, MiB", "files": "open files", "threads": "threads"}
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 6), sharex=True, layout="constrained")
    for (field, told), axis in zip(panels.items(), axes, strict=True):
        scale = 2**20 if field == "memory" else 1
        for (name, each), colour in zip(samples.items(), COLOURS, strict=False):
            minutes = [sample.seconds / 60 for sample in each]
            axis.plot(minutes, [getattr(sample, field) / scale for sample in each], color=colour, label=name)
        axis.set_ylabel(told, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_title(title, loc="left", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    axes[-1].set_xlabel("minutes", fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
