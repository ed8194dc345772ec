"""Whether the gateway holds what it holds after half an hour as after a minute: `python -m load_tests.soak`, needs k6.

Clients in a closed loop ask every task that the bundled models answer, in every form of a body, with broken requests among the
good ones. Memory, open files and threads of the gateway are read all along; `results/soak-BACKEND.json` and `.png` keep them.
"""

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any, Literal

import typer

from app import local_triton
from load_tests import images
from load_tests.cache import RESULTS, ROOT, cache
from load_tests.images import PHOTOS
from load_tests.k6.runner import K6Error, Plan, Run, run
from load_tests.k6.shots import Form, Shot, faults, shot
from load_tests.observer import Drift, Observer, Sample, drift
from load_tests.processes import Server, ServerError, unwind_on_sigterm
from load_tests.report import describe
from load_tests.servers import free_port, vitrine

BUNDLED = ROOT / "model_repository"
GROWTH = 0.05  # of memory
SLACK = 4  # open files and threads; connections to Triton and of k6 come and go
PHOTO = "500x334"
FORMS: tuple[Form, ...] = ("raw", "multipart", "json")
Backend = Literal["onnxruntime", "triton"]


def main(
    *,
    minutes: Annotated[float, typer.Option(min=0.05)] = 30.0,
    backend: Annotated[Backend, typer.Option(help="The gateway's; for triton a local one is started.")] = "onnxruntime",
    clients: Annotated[int, typer.Option(min=1)] = 8,
    step: Annotated[float, typer.Option(min=0.1, help="Seconds between two samples.")] = 10.0,
    repository: Annotated[
        Path, typer.Option(help="Models named as the bundled ones are.", show_default="model_repository")
    ] = BUNDLED,
    output: Annotated[Path, typer.Option(help="Directory of the results.", show_default="load_tests/results")] = RESULTS,
) -> None:
    unwind_on_sigterm()
    images.make_all()
    try:
        with gateway(backend, repository) as (server, url):
            sent = shots(url)
            warm(sent)
            with Observer(server, step) as observed:
                measured = run(Plan(sent, 60 * minutes, limit=10_000, clients=clients, stages=False, timeout=30))
    except (ServerError, K6Error, local_triton.LocalTritonError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    verdicts = judge(measured, observed.samples)
    output.mkdir(parents=True, exist_ok=True)
    about = {name: value for name, value in describe().items() if name not in ("command", "seeds")}
    asked = {"minutes": minutes, "backend": backend, "clients": clients, "shots": [each.name for each in sent]}
    figures = {"run": asdict(measured), "samples": [asdict(sample) for sample in observed.samples]}
    document = {"about": about, **asked, "verdicts": verdicts, **figures}
    (output / f"soak-{backend}.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(observed.samples, f"{backend}, {clients} clients, {measured.requests} requests", output / f"soak-{backend}.png")
    for name, verdict in verdicts.items():
        print(f"{name}: {verdict['told']} ({'met' if verdict['met'] else 'MISSED'})")
    for line in measured.log:
        print(f"  {line}")
    if not all(verdict["met"] for verdict in verdicts.values()):
        raise typer.Exit(1)


@contextmanager
def gateway(backend: Backend, repository: Path, **settings: str) -> Iterator[tuple[Server, str]]:
    """A gateway on `repository`, ready, and its address; behind it a local Triton where the backend is that.

    Raises:
        ServerError: it does not start.
        LocalTritonError: there is no local Triton, or it does not start.
    """
    port = free_port()
    fixed = {"VITRINE_REPOSITORY": str(repository), "VITRINE_BACKEND": backend, **settings}
    log = cache() / "logs" / f"endurance-{backend}.log"
    if backend == "onnxruntime":
        with vitrine(port, 1, log, fixed) as server:
            yield _ready(server, port)
        return
    home = local_triton.find(ROOT / local_triton.HOME)
    with (
        TemporaryFile() as triton_log,
        local_triton.LocalTriton(repository, local_triton.free_ports(), home, triton_log) as triton,
        vitrine(port, 1, log, {**fixed, "VITRINE_TRITON_URL": triton.url}) as server,
    ):
        yield _ready(server, port)


def _ready(server: Server, port: int) -> tuple[Server, str]:
    server.wait(f"http://127.0.0.1:{port}/readyz")
    return server, f"http://127.0.0.1:{port}"


def shots(url: str) -> list[Shot]:
    """Every task of the bundled models, every form of a body, and what must be refused."""
    photo = PHOTOS[PHOTO].path
    classify = f"{url}/v1/classify"
    grid = json.loads(_post(f"{url}/v1/tokenize", photo.read_bytes(), PHOTOS[PHOTO].content_type))["results"][0]["tokens"]
    good = [
        *(_named(f"classify, {form}", shot(classify, photo, form)) for form in FORMS),
        _named("classify, 12 megapixels", shot(classify, PHOTOS["12mp"].path)),
        _named("classify, png", shot(classify, PHOTOS["png"].path)),
        _named("tokenize", shot(f"{url}/v1/tokenize", photo)),
        Shot("detokenize", f"{url}/v1/detokenize", json.dumps({"tokens": grid}).encode(), "application/json"),
        _named("reconstruct", shot(f"{url}/v1/reconstruct", photo)),
    ]
    broken = faults(classify, photo)
    return [each for pair in zip(good, [*broken, *broken], strict=False) for each in pair]


def warm(sent: Sequence[Shot]) -> None:
    """Send every good one once, so that all models are loaded."""
    for each in sent:
        if each.status == 200:
            _post(each.url, each.body, each.content_type)


def _named(name: str, sent: Shot) -> Shot:
    return Shot(name, sent.url, sent.body, sent.content_type)


def _post(url: str, body: bytes, content_type: str) -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": content_type})  # noqa: S310 -- our own server
    with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
        answer: bytes = response.read()
        return answer


def judge(measured: Run, samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """What is asked of a soak, by its name: what was found, and whether it is met."""
    memory, files, threads = (drift([getattr(sample, name) for sample in samples]) for name in ("memory", "files", "threads"))
    wrong = round(measured.requests * (1 - measured.expected))
    return {
        "answers": {
            "told": f"{wrong} of {measured.requests} were not what they must be, {measured.server_errors} of them a 5xx",
            "met": measured.requests > 0 and measured.expected == 1.0 and not measured.server_errors,
        },
        "memory": {
            "told": f"{memory.first / 2**20:.1f} MB -> {memory.last / 2**20:.1f} MB, {memory.growth:+.1%}",
            "met": memory.growth < GROWTH,
        },
        "open files": _flat(files),
        "threads": _flat(threads),
    }


def _flat(found: Drift) -> dict[str, Any]:
    return {"told": f"{found.first:g} -> {found.last:g}", "met": found.last - found.first <= SLACK}


def plot(samples: Sequence[Sample], title: str, file: Path) -> None:
    """Memory, open files and threads over minutes, one below the other."""
    import matplotlib as mpl  # noqa: PLC0415 -- only a report needs it

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    panels = {
        "memory, MB": [sample.memory / 2**20 for sample in samples],
        "open files": [sample.files for sample in samples],
        "threads": [sample.threads for sample in samples],
    }
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 6), sharex=True, layout="constrained")
    for (name, values), axis in zip(panels.items(), axes, strict=True):
        axis.plot([sample.seconds / 60 for sample in samples], values, color="#1f6f54")
        axis.set_ylabel(name, fontsize=8)
        axis.set_ylim(0, 1.15 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0].set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("minutes", fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
