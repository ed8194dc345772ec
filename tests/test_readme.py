"""Every command, answer and link of the README is tried; a line that no test knows how to try is a failure."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from app.fidelity import psnr
from app.token_format import unpack
from tests.gateway import environment, gateway

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [
    ROOT / name
    for name in subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
]
REQUIRING = "VITRINE_REQUIRE=triton,prometheus,chromium make "
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def commands(start: str) -> list[str]:
    """The command lines that begin so, without their remarks."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [re.sub(r"\s{2,}#.*", "", line) for line in lines if line.startswith(start)]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway on the bundled models, reached through a link so that its log is not written beside it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "model_repository").symlink_to(ROOT / "model_repository")
    with gateway(folder / "model_repository") as url:
        yield url


def run(command: str, url: str, folder: Path = ROOT) -> str:
    line = command.replace(ADDRESS, url).replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    if line.startswith("curl"):
        line = line.replace("curl", "curl --silent --show-error --fail-with-body --max-time 20", 1)
    variables = environment() | {"VITRINE_URL": url}
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout


def shape(value: Any) -> Any:
    """A JSON value with numbers and strings replaced by their types."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    return [shape(member) for member in value] if isinstance(value, list) else type(value).__name__


def test_every_line_of_the_shell_blocks_is_tried_here() -> None:
    tried = ("make ", REQUIRING, "curl ", ".venv/bin/vitrine ", ".venv/bin/python -m export ")
    assert not [line for block in blocks("sh") for line in block.splitlines() if not line.startswith(tried)]
    assert len(commands("curl ")) >= 4


def test_no_figure_is_left_blank() -> None:
    assert "…" not in README.read_text()


def test_the_first_commands_are_make_run_and_make_test() -> None:
    assert [line.strip() for line in commands("make ")[:2]] == ["make run", "make test"]


@pytest.mark.parametrize("command", [*commands("make "), *commands(REQUIRING)])
def test_make_knows_its_targets(command: str) -> None:
    arguments = shlex.split(command)
    target = arguments[arguments.index("make") + 1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ci_runs_what_the_readme_says() -> None:
    assert f"make check\n{REQUIRING}test\n" in blocks("sh")
    assert (ROOT / ".ci/run").read_text().endswith(f"make check\n{REQUIRING}test\n")


def test_the_first_answer_is_the_one_shown(url: str) -> None:
    shown = json.loads(blocks("json")[0])
    answer = json.loads(run(commands("curl ")[0], url))
    assert shape(answer) == shape(shown)
    for known in ("task", "model", "warnings"):
        assert answer[known] == shown[known]
    (item,), (expected,) = answer["results"], shown["results"]
    assert item["image"].keys() == expected["image"].keys()
    assert item["predictions"][0]["label"] == expected["predictions"][0]["label"]
    assert item["predictions"][0]["class_id"] == expected["predictions"][0]["class_id"]


@pytest.mark.parametrize("command", [command for command in commands("curl ") if " -o " not in command])
def test_curl(url: str, command: str) -> None:
    answer = json.loads(run(command, url))
    items = answer.get("results") or answer["data"]
    assert not [item for item in items if "error" in item or item.get("problems")]


def test_a_photo_goes_through_the_tokens_and_back(url: str, tmp_path: Path) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    tokenize, detokenize = [command for command in commands("curl ") if " -o " in command]
    run(tokenize, url, tmp_path)
    run(detokenize, url, tmp_path)
    said = re.search(r"([\d,]+) bytes, (\d+)x(\d+) tokens of (\d+) bits", README.read_text())
    assert said is not None
    size, *grid, bits = (int(number.replace(",", "")) for number in said.groups())
    container = (tmp_path / "espresso.vtok").read_bytes()
    assert (len(container), container[5]) == (size, bits)
    assert list(unpack(container).tokens.shape) == [1, 1, *grid]
    restored = Image.open(tmp_path / "espresso.png")
    photo = Image.open(ROOT / "docs/photos/espresso.jpg")
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    square = photo.resize((256, 256), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    assert (restored.size, restored.mode) == ((256, 256), "RGB")
    assert psnr(np.asarray(restored), np.asarray(square)) > 23


@pytest.mark.parametrize(("photo", "label"), [("espresso.jpg", "espresso")])
def test_everyday_photos_get_their_label(url: str, photo: str, label: str) -> None:
    answer = json.loads(run(f"curl --data-binary @docs/photos/{photo} {ADDRESS}/v1/classify", url))
    assert answer["results"][0]["predictions"][0]["label"] == label


def test_the_command_line(url: str) -> None:
    classified, listed = (run(command, url) for command in commands(".venv/bin/vitrine "))
    assert "espresso" in classified
    assert "convnext-50 (default)" in listed


def test_the_openai_client(url: str) -> None:
    program = next(block for block in blocks("python") if "OpenAI(" in block).replace(ADDRESS, url)
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "crescent" in said


def test_the_python_client(url: str) -> None:
    program = next(block for block in blocks("python") if "Client(" in block).replace(ADDRESS, url)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("espresso: ")
    assert len(done.stdout.splitlines()) == 3


@pytest.fixture(scope="module")
def own_network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the README's mynet.py, its trained weights, its labels, and the same network as an ONNX file."""
    folder = tmp_path_factory.mktemp("mynet")
    source = next(block for block in blocks("python") if "def make(" in block)
    (folder / "mynet.py").write_text(source)
    namespace: dict[str, Any] = {}
    exec(compile(source, "mynet.py", "exec"), namespace)
    torch.manual_seed(0)
    network = namespace["make"]().eval()
    torch.save(network.state_dict(), folder / "mynet.pth")
    (folder / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    batch = {0: torch.export.Dim("batch")}
    example = (torch.rand(2, 3, 32, 32),)
    torch.onnx.export(network, example, folder / "mynet.onnx", dynamo=True, dynamic_shapes=(batch,), verbose=False)
    return folder


@pytest.mark.parametrize("kind", ["python", "onnx"])
def test_exporting_your_own(own_network: Path, kind: str) -> None:
    (command,) = [line for line in commands(".venv/bin/python -m export ") if f" {kind}/" in line]
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=own_network,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    manifests = sorted((own_network / "model_repository").glob("*/*/manifest.json"), key=lambda file: file.stat().st_mtime)
    manifest = json.loads(manifests[-1].read_text())
    assert manifest["labels"] == ["ant", "bee", "cat", "dog"]
    assert manifest["source"]["library"] == kind


def test_the_exporter_knows_every_option_that_is_shown() -> None:
    """Pretrained weights come from a hub; those lines are only held against the exporter's own list of options."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    bundled = [line for line in makefile.splitlines() if "-m export" in line]
    shown = [part for line in [*commands(".venv/bin/python -m export "), *bundled] for part in shlex.split(line)]
    options = {part for part in shown if part.startswith("--")}
    help_text = subprocess.run(
        [sys.executable, "-m", "export", "--help"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "--pretrained" in options
    assert not {option for option in options if option not in help_text}


def anchors(document: Path) -> set[str]:
    """The headings of a Markdown file as GitHub's anchors."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
