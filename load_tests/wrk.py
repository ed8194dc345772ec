"""One closed-loop run of wrk: the body that every request carries, the command, and what its report says."""

import base64
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from load_tests.images import Photo

Form = Literal["raw", "multipart", "base64", "infer"]
BOUNDARY = "vitrine-bench-8f14e45fceea167a"
MARK = "REPORT "
LUA = """\
wrk.method = "POST"
wrk.headers["Content-Type"] = "{content_type}"
local file = io.open("{body}", "rb")
wrk.body = file:read("*a")
file:close()

function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '{mark}{{"requests": %d, "microseconds": %d, "status": %d, "socket": %d, "timeout": %d, "p50": %d, "p90": %d, "p99": %d}}\\n',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write, e.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99)))
end
"""


class WrkError(Exception):
    """wrk did not run or did not report."""


@dataclass(frozen=True)
class Load:
    """What wrk saw. Latencies are milliseconds; `errors`: answers from 400 on, broken connections, timeouts."""

    requests: int
    seconds: float
    errors: int
    p50: float
    p90: float
    p99: float

    @property
    def rate(self) -> float:
        """Right answers per second."""
        return max(0, self.requests - self.errors) / self.seconds


@dataclass(frozen=True)
class Body:
    """What a request carries. `accept`: the form of the answer; wrk leaves it to the server."""

    content_type: str
    data: bytes
    accept: str = "*/*"


def body(photo: Photo, form: Form, field: str = "image") -> Body:
    """The photo as `form` sends it; `field` is the name of the part of a multipart form."""
    data = photo.path.read_bytes()
    if form == "multipart":
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{photo.file}"\r\n'
        head += f"Content-Type: {photo.content_type}\r\n\r\n"
        return Body(f"multipart/form-data; boundary={BOUNDARY}", head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode())
    if form == "base64":
        return _json({"image": {"base64": base64.b64encode(data).decode()}})
    if form == "infer":  # the Open Inference Protocol
        text = base64.b64encode(data).decode()
        one = {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"content_type": "base64"}, "data": [text]}
        return _json({"inputs": [one]})
    return Body(photo.content_type, data)


def run(url: str, sent: Body, clients: int, seconds: float, directory: Path) -> Load:
    """Keep `clients` requests in flight for `seconds`, from one thread, which fills far less than a core.

    Raises:
        WrkError: wrk is not installed, failed, or its report is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file, script = directory / "body", directory / "post.lua"
    file.write_bytes(sent.data)
    script.write_text(LUA.format(content_type=sent.content_type, body=file, mark=MARK))
    command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "120s", "-s", str(script), url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 180)  # noqa: S603
    except FileNotFoundError as error:
        raise WrkError("wrk is not installed; on Debian and Ubuntu: apt install wrk.") from error
    if done.returncode:
        raise WrkError(f"wrk ended with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return parse(done.stdout)


def parse(output: str) -> Load:
    """The report that the script's `done` wrote.

    Raises:
        WrkError: there is none.
    """
    line = next((line for line in output.splitlines() if line.startswith(MARK)), None)
    if line is None:
        raise WrkError(f"wrk gave no report: {output[-500:]!r}")
    report = json.loads(line.removeprefix(MARK))
    errors = report["status"] + report["socket"] + report["timeout"]
    latencies = (report[name] / 1000 for name in ("p50", "p90", "p99"))
    return Load(report["requests"], report["microseconds"] / 1e6, errors, *latencies)


def _json(value: object) -> Body:
    return Body("application/json", json.dumps(value).encode())
