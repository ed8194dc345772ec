"""What `make .triton` checks before it builds, and what it builds with."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.repository import make_engine
from tests.triton import ROOT

DEPLOY = ROOT / "deploy" / "triton"


def install(tmp_path: Path, **commands: str) -> subprocess.CompletedProcess[str]:
    """Run the script for an empty home where `commands`, by name, print what is given and nothing else."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    for name, says in commands.items():
        (bin_directory / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (bin_directory / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}", "TRITON_HOME": str(tmp_path / "home")}
    return subprocess.run([DEPLOY / "install.sh"], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("commands", "sentence"),
    [
        ({"uname": "Darwin arm64"}, "needs Linux on x86-64, this is Darwin arm64"),
        ({"uname": "Linux aarch64"}, "needs Linux on x86-64, this is Linux aarch64"),
        (
            {"uname": "Linux x86_64", "getconf": "glibc 2.31"},
            "needs glibc 2.35 or newer (Debian 12, Ubuntu 22.04), this is glibc 2.31",
        ),
        ({"uname": "Linux x86_64", "getconf": ""}, "this is another C library"),
    ],
)
def test_an_unsupported_platform_is_named(tmp_path: Path, commands: dict[str, str], sentence: str) -> None:
    outcome = install(tmp_path, **commands)
    assert outcome.returncode == 2
    assert sentence in outcome.stderr
    assert "docker compose up triton" in outcome.stderr
    assert not (tmp_path / "home").exists()


def test_the_smoke_engine_is_the_one_that_the_tests_make() -> None:
    assert (DEPLOY / "smoke" / "colours" / "1" / "model.onnx").read_bytes() == make_engine(size=4)
