"""The `vitrine` command as people run it: a process of its own, its output and its exit code."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

from app.cli import welcome
from app.settings import Settings
from tests.detector_repository import add_detector, add_grounder, in_frame, letterbox
from tests.factories import encode
from tests.gateway import VITRINE, environment, free_port, gateway
from tests.repository import add_entry, make_repository

Ran = CompletedProcess[str]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = make_repository(tmp_path_factory.mktemp("cli") / "repository")
    (add_entry(repository, "broken").path / "model.onnx").unlink()
    add_detector(repository, in_frame([[4, 6, 30, 20]], letterbox(), (40, 30)), [0.9], [1])
    add_detector(repository, in_frame([[4, 6, 30, 20]], letterbox(), (40, 30)), [10], [1], name="open", phrases=2)
    add_grounder(repository, in_frame([[4, 6, 30, 20]], letterbox("centre"), (40, 30)), too_long="truncate")
    return repository


@pytest.fixture(scope="module")
def url(repository: Path) -> Iterator[str]:
    with gateway(repository, default_classify="colours", default_detect="shapes") as url:
        yield url


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A directory with a red PNG, below it a blue JPEG in capitals, and a text file that is no photo."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "red.png").write_bytes(encode(Image.new("RGB", (40, 30), (200, 10, 10)), "PNG"))
    (folder / "more/[blue].JPG").write_bytes(encode(Image.new("RGB", (30, 40), (10, 10, 200)), "JPEG"))
    (folder / "notes.txt").write_text("nothing to see")
    return folder


def vitrine(*arguments: object, cwd: Path, **variables: object) -> Ran:
    command = [VITRINE, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=60, check=False)


def is_one_sentence(ran: Ran, code: int = 1) -> bool:
    """Whether the command failed as commands should: that exit code, nothing on stdout, one line on stderr."""
    assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (code, "", 1), ran
    return ran.stderr.startswith("vitrine: ") and ran.stderr.rstrip().endswith((".", ")"))


def test_a_table_of_a_directory(url: str, photos: Path) -> None:
    ran = vitrine("classify", "photos", "--top-k", 2, "--url", url, cwd=photos.parent)
    assert ran.returncode == 0, ran
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ran.stdout.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["photos/more/[blue].JPG", "", "photos/red.png", ""]
    assert [rows[0][1], rows[2][1]] == ["blue", "red"]
    assert all(row[2].endswith("%") for row in rows)
    assert "colours@1" in ran.stdout


def test_json_has_one_object_per_photo(url: str, photos: Path) -> None:
    ran = vitrine("classify", "red.png", "*/?blue?.JPG", "--json", cwd=photos, url=url)
    red, blue = map(json.loads, ran.stdout.splitlines())
    assert (red["file"], red["model"], red["predictions"][0]["label"]) == ("red.png", "colours@1", "red")
    assert (blue["file"], blue["image"]["format"]) == ("more/[blue].JPG", "JPEG")


def test_a_photo_without_an_answer_does_not_stop_the_others(url: str, photos: Path) -> None:
    ran = vitrine("classify", "notes.txt", "red.png", "--json", "--url", url, cwd=photos)
    assert ran.returncode == 1
    notes, red = map(json.loads, ran.stdout.splitlines())
    assert notes["error"]["code"] == "unsupported_media"
    assert red["predictions"][0]["label"] == "red"
    table = vitrine("classify", "notes.txt", "red.png", "--url", url, cwd=photos)
    assert table.returncode == 1
    assert notes["error"]["detail"] in table.stdout


def test_what_is_detected_is_printed_and_drawn(url: str, photos: Path) -> None:
    ran = vitrine("detect", "photos", "-o", "drawn", "--threshold", 0.5, "--url", url, cwd=photos.parent)
    assert ran.returncode == 0, ran
    assert all(words in ran.stdout for words in ("red.png", "[blue].JPG", "square", "90.0%", "4 6 30 20"))
    assert sorted(str(file.relative_to(photos.parent)) for file in (photos.parent / "drawn").rglob("*.png")) == [
        "drawn/photos/more/[blue].png",
        "drawn/photos/red.png",
    ]
    with Image.open(photos.parent / "drawn/photos/red.png") as drawn:
        assert drawn.size == (40, 30)
        assert drawn.getpixel((20, 19)) != (200, 10, 10)


def test_detections_as_json(url: str, photos: Path) -> None:
    ran = vitrine("detect", "photos/red.png", "--class", "square", "--class", "circle", "--json", "--url", url, cwd=photos.parent)
    (row,) = map(json.loads, ran.stdout.splitlines())
    assert (row["file"], row["model"], row["detections"][0]["box"]) == ("photos/red.png", "shapes@1", [4, 6, 30, 20])


def test_phrases_are_looked_for(url: str, photos: Path) -> None:
    asked = ("detect", "photos/red.png", "--model", "open", "--threshold", 0.1, "--url", url)
    ran = vitrine(*asked, "--phrases", "left", "--phrases", "red circle", cwd=photos.parent)
    assert ran.returncode == 0, ran
    assert all(words in ran.stdout for words in ("red circle", "40.0%", "4 6 30 20"))
    assert is_one_sentence(vitrine(*asked, cwd=photos.parent))


def test_a_photo_in_which_nothing_can_be_looked_for_does_not_stop_the_others(url: str, photos: Path) -> None:
    (photos / "cut.png").write_bytes((photos / "red.png").read_bytes()[:60])
    ran = vitrine("detect", "photos", "-o", "drawn", "--url", url, cwd=photos.parent)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 1)
    assert "photos/cut.png: " in ran.stderr
    assert len(list((photos.parent / "drawn").rglob("*.png"))) == 2


def test_a_phrase_is_looked_for_and_drawn(url: str, photos: Path) -> None:
    ran = vitrine("ground", "the red circle", "photos/red.png", "-o", "new/out.png", "--url", url, cwd=photos.parent)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "the red circle" in ran.stdout
    assert "4 6 30 20" in ran.stdout
    with Image.open(photos.parent / "new/out.png") as drawn:
        assert drawn.size == (40, 30)
        assert drawn.getpixel((20, 19)) != (200, 10, 10)
    long = vitrine("ground", "the red circle left of that", "photos/red.png", "--json", "--url", url, cwd=photos.parent)
    assert json.loads(long.stdout)["truncated"]
    assert "its last words were not read" in long.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("ground", "red", "photos/red.png", "-o", "photos/red.png"),
        ("ground", "red", "photos/red.png", "-o", "out.jpg"),
        ("detect", "photos", "-o", "."),
    ],
)
def test_no_photo_is_drawn_over(photos: Path, arguments: tuple[str, ...]) -> None:
    assert is_one_sentence(vitrine(*arguments, cwd=photos.parent), code=2)


def test_models(url: str, tmp_path: Path) -> None:
    ran = vitrine("models", "--url", url, cwd=tmp_path)
    assert ran.returncode == 0
    assert "colours (default)" in ran.stdout
    assert "model.onnx is missing" in ran.stdout
    rows = map(json.loads, vitrine("models", "--url", url, "--json", cwd=tmp_path).stdout.splitlines())
    states = {"colours": "ready", "broken": "failed", "open": "ready", "phrases": "ready", "shapes": "ready"}
    assert {row["id"]: row["status"] for row in rows} == states


def test_local_needs_no_server(repository: Path, photos: Path) -> None:
    ran = vitrine("classify", "red.png", "--model", "colours", "--local", "--repository", repository, "--json", cwd=photos)
    assert json.loads(ran.stdout)["predictions"][0]["label"] == "red"
    assert (ran.returncode, ran.stderr.count("\n")) == (0, 1), "only the warning about the broken model is logged"


def test_local_without_a_repository_says_so(photos: Path) -> None:
    assert is_one_sentence(vitrine("classify", "red.png", "--local", cwd=photos))


@pytest.mark.parametrize("command", [("models",), ("classify", "red.png")])
def test_a_refused_connection_is_one_sentence(photos: Path, command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ran = vitrine(*command, "--url", url, cwd=photos)
    assert is_one_sentence(ran)
    assert f"Nothing answers at {url}. Start a gateway with `vitrine serve`" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("none.jpg",), "There is no photo at none.jpg."),
        (("*.webp",), "There is no photo at *.webp."),
        (("red.png", "--model", "nothing"), "There is no model 'nothing'."),
        (("red.png", "--top-k", "99"), "top_k must be between 1 and 6"),
        (("red.png", "--url", "nowhere"), "'nowhere' is not an address"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(url: str, photos: Path, arguments: tuple[str, ...], words: str) -> None:
    ran = vitrine("classify", *arguments, cwd=photos, url=url)
    assert is_one_sentence(ran)
    assert words in ran.stderr


@contextmanager
def serving(repository: Path, *arguments: object, **variables: object) -> Iterator["subprocess.Popen[str]"]:
    command = [VITRINE, "serve", "--repository", repository, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment(**variables), cwd=repository.parent, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_serve_prints_a_curl_line_that_works(repository: Path) -> None:
    """The option wins over the variable; the line is printed when the gateway is ready, not before."""
    port = free_port()
    with serving(repository, "--port", port, "--default-classify", "colours", port=1) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        assert f"answers on http://127.0.0.1:{port} (onnxruntime" in lines[0]
        command = shlex.split(lines[1].partition("ask it:")[2])
        assert "golden" in command[2]
        asked = subprocess.run([*command, "--silent"], capture_output=True, text=True, check=True)
        assert json.loads(asked.stdout)["results"][0]["predictions"][0]["label"]


def test_serve_on_a_port_that_is_taken_ends(url: str, repository: Path) -> None:
    with serving(repository, "--port", url.rpartition(":")[2]) as process:
        _, log = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "address already in use" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (("--backend", "magic"), {}, "backend: Input should be"),
        ((), {"max_images": 0}, "max_images: Input should be greater"),
    ],
)
def test_serve_with_settings_out_of_range(
    tmp_path: Path, arguments: tuple[str, ...], variables: dict[str, object], words: str
) -> None:
    ran = vitrine("serve", *arguments, cwd=tmp_path, **variables)
    assert is_one_sentence(ran, code=2)
    assert words in ran.stderr


def test_triton_that_was_not_built(repository: Path, tmp_path: Path) -> None:
    ran = vitrine("triton", "--repository", repository, "--home", tmp_path, cwd=tmp_path)
    assert is_one_sentence(ran)
    assert "make .triton" in ran.stderr


@pytest.mark.parametrize(
    ("host", "shown"), [("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"), ("box.example", "http://box.example:80")]
)
def test_the_address_shown_is_one_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, shown: str) -> None:
    monkeypatch.chdir(tmp_path)
    text = welcome(Settings(_env_file=None, host=host, port=80, repository=tmp_path))
    assert f"curl --data-binary @photo.jpg {shown}/v1/classify" in text


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        (
            "app.cli",
            ("app.main", "app.token_files", "fastapi", "httpx2", "numpy", "onnxruntime", "pydantic", "rich.table", "uvicorn"),
        ),
        ("app.main", ("rich.table", "tritonclient.grpc", "typer")),
    ],
)
def test_imports_that_would_slow_the_start_wait(module: str, spared: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not set(spared) & set(loaded)


def test_version_and_help(tmp_path: Path) -> None:
    assert vitrine("--version", cwd=tmp_path).stdout.startswith("vitrine ")
    shown = vitrine(cwd=tmp_path)
    assert all(
        command in shown.stdout
        for command in ("serve", "models", "classify", "detect", "ground", "tokenize", "detokenize", "triton")
    )
