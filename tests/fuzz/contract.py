"""The campaign that reads the gateway's OpenAPI: Schemathesis asks every operation what it may be asked, and what it may not."""

import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.fuzz.campaign import Campaign
from tests.fuzz.served import Watched

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
UNCHECKED = "positive_data_acceptance"  # whether a model is there and an image decodes is more than a schema can say
REFUSED = """\
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 408, 411, 413, 415, 422, 429]
"""  # the size of a request, or how many images it has, is looked at before their fields are
CASES = re.compile(r"(\d+) generated(?:, (\d+) passed)?")


def check(campaign: Campaign, gateway: Watched, **_: object) -> None:
    """Every status, media type and body is one that the description has, and what it forbids is refused."""
    command = [
        SCHEMATHESIS,
        "--config-file",
        "schemathesis.toml",
        "run",
        f"http://127.0.0.1:{gateway.port}/openapi.json",
        "--phases",
        "examples,coverage,fuzzing",
        "--seed",
        str(campaign.seed),
    ]
    command += ["--max-time", str(max(1, round(campaign.seconds))), "--checks", "all", "--exclude-checks", UNCHECKED]
    command += ["--continue-on-failure", "--warnings", "off", "--no-color"]
    with TemporaryDirectory(prefix="schemathesis-") as directory:  # it keeps what it found where it runs
        Path(directory, "schemathesis.toml").write_text(REFUSED)
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    cases = CASES.search(done.stdout)
    if cases is not None:
        campaign.outcomes["as described"] = int(cases[2] or 0)
        campaign.outcomes["otherwise"] = int(cases[1]) - int(cases[2] or 0)
    if done.returncode != 0 or cases is None:
        campaign.fault(f"Schemathesis ended with {done.returncode}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
