"""The root is a table of contents, and nothing in the repository speaks of one person's machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    ".dockerignore",
    ".gitignore",
    "CHANGELOG.md",
    "Dockerfile",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "docker-compose.yml",
    "pyproject.toml",
}
FOLDERS = {".ci", "app", "deploy", "docs", "export", "load_tests", "model_repository", "recipes", "tests"}
NO_UTILITY_DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc", "manager"}
LARGEST = 15 * 1024 * 1024
BINARY = {".jpg", ".npz", ".onnx", ".png"}


def tracked() -> list[Path]:
    """What git tracks here and the working tree still has; outside of git, a source archive say, every file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def files() -> list[Path]:
    return tracked()


def test_only_these_lie_at_the_top(files: list[Path]) -> None:
    assert {file.name for file in files if len(file.parts) == 1} == FILES
    assert {file.parts[0] for file in files if len(file.parts) > 1} <= FOLDERS


def test_a_module_is_a_noun_of_the_domain(files: list[Path]) -> None:
    assert not {str(file) for file in files if NO_UTILITY_DRAWERS & {*file.parts[:-1], file.stem}}


@pytest.mark.parametrize("folder", ["app", "export"])
def test_every_package_is_found_by_python(files: list[Path], folder: str) -> None:
    packages = {file.parent for file in files if file.suffix == ".py" and file.parts[0] == folder}
    assert not {str(package) for package in packages if not (ROOT / package / "__init__.py").is_file()}


def test_every_module_opens_with_its_place(files: list[Path]) -> None:
    modules = [file for file in files if file.suffix == ".py" and file.parts[0] in ("app", "export", "recipes")]
    assert not {str(file) for file in modules if not (ROOT / file).read_text().startswith(('"""', "#!", 'r"""'))}


def test_no_file_is_large(files: list[Path]) -> None:
    assert not {str(file) for file in files if (ROOT / file).stat().st_size > LARGEST}


def test_nothing_is_left_for_later_and_no_path_is_of_one_machine(files: list[Path]) -> None:
    words = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b|/(root|Users)/\w|" + re.escape(str(ROOT)))
    texts = [file for file in files if file.suffix not in BINARY and file.name != "LICENSE"]
    found = {f"{file}: {match[0]}" for file in texts if (match := words.search((ROOT / file).read_text(errors="replace")))}
    assert not found


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.lstrip().startswith("Apache License")
    assert "END OF TERMS AND CONDITIONS" in text


def test_ci_installs_what_is_missing_and_calls_make() -> None:
    script = re.sub(r"^install_missing\(\) \{.*?^\}$", "", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert lines[:2] == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."']
    assert lines[2:] == [
        "install_missing prometheus chromium wrk",
        "make check",
        "VITRINE_REQUIRE=triton,prometheus,chromium make test",
    ]


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    shown = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets
