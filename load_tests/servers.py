"""The servers of the comparison: how each is started, with which settings, and how it wants to be asked."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load_tests.cache import ROOT, cache
from load_tests.models import Model, repository
from load_tests.processes import Server
from load_tests.wrk import Form

PEERS = ROOT / "load_tests/peers"


@dataclass(frozen=True)
class Tuning:
    """Settings that the sweep tries: processes, largest batch, seconds that a batch may wait, threads of one inference."""

    workers: int = 1
    batch: int = 1
    wait: float = 0.0
    threads: int = 1

    def __str__(self) -> str:
        wait = f", wait {1000 * self.wait:g} ms" if self.batch > 1 else ""
        workers, threads = (f"{n} {noun}{'s' * (n > 1)}" for n, noun in ((self.workers, "worker"), (self.threads, "thread")))
        return f"{workers}, batch {self.batch}{wait}, {threads}"


@dataclass(frozen=True)
class Contender:
    """A row of the comparison. `kind` is the directory in `peers`, or `vitrine`; `tunings` are the cells of its sweep."""

    name: str
    kind: str
    decode: str = "usual"
    form: Form = "raw"
    tunings: tuple[Tuning, ...] = (Tuning(),)
    sweep_of: str = ""  # the row whose best settings are this one's too

    @property
    def path(self) -> str:
        return {"vitrine": "/v1/classify", "mlserver": "/v2/models/classify/infer"}.get(self.kind, "/classify")

    def ask(self, tuning: Tuning) -> tuple[Form, str]:
        """The form of the body and the name of its field; BentoML takes batches by form only."""
        if self.kind == "bentoml" and tuning.batch > 1:
            return "multipart", "images"
        return self.form, "image"


_POOL = (Tuning(1), Tuning(2), Tuning(1, threads=2))
_QUEUE = (Tuning(1), Tuning(2), Tuning(1, threads=2), Tuning(2, 8, 0.002), Tuning(1, 8, 0.005, 2), Tuning(2, 16, 0.01))

CONTENDERS = {
    each.name: each
    for each in (
        Contender("vitrine", "vitrine", tunings=(Tuning(1), Tuning(2))),
        Contender("vitrine, one process", "vitrine"),
        Contender("vitrine, multipart", "vitrine", form="multipart", sweep_of="vitrine"),
        Contender("vitrine, base64", "vitrine", form="base64", sweep_of="vitrine"),
        Contender("fastapi", "fastapi_plain", tunings=_POOL),
        Contender("fastapi, vitrine's decoding", "fastapi_plain", "vitrine", sweep_of="fastapi"),
        Contender("litserve", "litserve", form="multipart", tunings=_QUEUE),
        Contender("litserve, vitrine's decoding", "litserve", "vitrine", form="multipart", sweep_of="litserve"),
        Contender("bentoml", "bentoml", tunings=(*_POOL, Tuning(2, 8, 0.01), Tuning(1, 16, 0.01, 2))),
        Contender("ray serve", "ray_serve", tunings=(*_POOL, Tuning(2, 8, 0.002), Tuning(2, 16, 0.01))),
        Contender("mlserver", "mlserver", form="infer", tunings=(*_POOL, Tuning(2, 8, 0.005), Tuning(1, 16, 0.01, 2))),
    )
}


def free_port() -> int:
    """A port that nothing listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment_of(kind: str) -> Path:
    """The Python of a peer's own environment; made and filled the first time, when its requirements changed too.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    home = cache() / "venvs" / kind
    requirements = PEERS / kind / "requirements.txt"
    stamp = home / "requirements.txt"
    if not stamp.is_file() or stamp.read_text() != requirements.read_text():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)  # noqa: S603
        pip = [str(home / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, "--requirement", str(requirements)], check=True)  # noqa: S603
        stamp.write_text(requirements.read_text())
    return home / "bin/python"


def start(contender: Contender, tuning: Tuning, model: Model, **more: str) -> tuple[Server, str]:
    """A server, not started yet, and the address that answers images with `model`. `more` are settings of Vitrine."""
    port = free_port()
    url = f"http://127.0.0.1:{port}{contender.path}"
    log = cache() / "logs" / f"{contender.name.replace(' ', '-').replace(',', '').replace(chr(39), '')}-{model.name}.log"
    if contender.kind == "vitrine":
        settings = {"VITRINE_REPOSITORY": str(repository()), "VITRINE_DEFAULT_CLASSIFY": model.name, **more}
        return vitrine(port, tuning.workers, log, settings), url
    python = environment_of(contender.kind)
    directory = PEERS / contender.kind
    settings = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(python.parent.parent),
        "BENCH_MODEL": str(model.onnx),
        "BENCH_MANIFEST": str(model.manifest),
        "BENCH_DECODE": contender.decode,
        "BENCH_PORT": str(port),
        **{f"BENCH_{name.upper()}": str(value) for name, value in asdict(tuning).items()},
        **_SETTINGS.get(contender.kind, lambda *_: {})(port, tuning),
    }
    command = _COMMANDS.get(contender.kind, lambda *_: ["server.py"])(port, tuning)
    return Server([str(python), *command], {**_everywhere(), **settings}, directory, log), url


def vitrine(port: int, workers: int, log: Path, settings: Mapping[str, str]) -> Server:
    """A gateway of this working tree, not started yet, with nothing set but `settings`."""
    command = [sys.executable, "-m", "app.cli", "serve"]
    command += ["--workers", str(workers)] if workers > 1 else []
    fixed = {"PYTHONPATH": str(ROOT), "VITRINE_PORT": str(port), "VITRINE_LOG_LEVEL": "warning"}
    return Server(command, {**_everywhere(), **fixed, **settings}, cache(), log)


def _everywhere() -> dict[str, str]:
    """For every server alike: no hidden threads, no reports home."""
    return {"OMP_NUM_THREADS": "1", "DO_NOT_TRACK": "1", "BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0"}


def _bentoml(port: int, tuning: Tuning) -> list[str]:
    service = "Batched" if tuning.batch > 1 else "Single"
    return ["-m", "bentoml", "serve", f"server:{service}", "--host", "127.0.0.1", "--port", str(port)]


def _mlserver(port: int, tuning: Tuning) -> dict[str, str]:
    """One worker is no pool: MLServer then infers in the server's own process."""
    others = {f"MLSERVER_{name}_PORT": str(free_port()) for name in ("GRPC", "METRICS")}
    return {
        "MLSERVER_HOST": "127.0.0.1",
        "MLSERVER_HTTP_PORT": str(port),
        "MLSERVER_PARALLEL_WORKERS": str(tuning.workers if tuning.workers > 1 else 0),
        "MLSERVER_MODEL_MAX_BATCH_SIZE": str(tuning.batch if tuning.batch > 1 else 0),
        "MLSERVER_MODEL_MAX_BATCH_TIME": str(tuning.wait),
        "MLSERVER_DEBUG": "false",
        **others,
    }


_COMMANDS: dict[str, Any] = {
    "bentoml": _bentoml,
    "mlserver": lambda port, tuning: ["-m", "mlserver.cli.main", "start", "."],
}
_SETTINGS: dict[str, Any] = {"mlserver": _mlserver}


def predictions(kind: str, answer: bytes) -> list[int]:
    """The class ids of an answer, likeliest first.

    Raises:
        KeyError, ValueError: it has another shape.
    """
    content = json.loads(answer)
    if kind == "vitrine":
        content = content["results"][0]
    elif kind == "mlserver":
        content = json.loads(content["outputs"][0]["data"][0])
    elif isinstance(content, list):
        content = content[0]
    return [each["class_id"] for each in content["predictions"]]
