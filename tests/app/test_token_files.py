"""Folders to files of tokens and back, in this process and as the commands `vitrine tokenize` and `vitrine detokenize`."""

import os
import pty
import re
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.client import Client, ClientError
from app.token_archive import TokenArchive, TokenArchiveError
from app.token_files import Failure, missing_photos, name_photos, read_saved, restore_images, tokenize_photos
from app.token_format import TokenGrids, pack
from tests.app.test_cli import is_one_sentence, vitrine
from tests.factories import encode
from tests.gateway import VITRINE, environment, free_port, gateway
from tests.repository import make_images
from tests.tokenizer_repository import CODEBOOK, add_tokenizer, image_of, tokens_of

PHOTOS, MANY = 9, 600
TOKEN_FORMAT = Path(__file__).parents[2] / "docs/token-format.md"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("tokens") / "repository"
    add_tokenizer(repository)
    add_tokenizer(repository, "others", codebook=CODEBOOK.model_copy(update={"id": "ab" * 32}))
    return repository


@pytest.fixture(scope="module")
def client(repository: Path) -> Iterator[Client]:
    with gateway(repository, default_tokenizer="greys") as url, Client(url) as client:
        yield client


def pixels_of(number: int) -> np.ndarray:
    return make_images(1, size=32, seed=number)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with photos/a/0.png to photos/a/8.png."""
    (tmp_path / "photos/a").mkdir(parents=True)
    for number in range(PHOTOS):
        (tmp_path / f"photos/a/{number}.png").write_bytes(encode(Image.fromarray(pixels_of(number)[0]), "PNG"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in (folder / "photos").rglob("*") if path.is_file())


def after(count: int) -> Callable[[], None]:
    """Interrupts, as Ctrl-C does, when so many are done."""
    left = iter([None] * (count - 1))

    def advance() -> None:
        if next(left, KeyboardInterrupt) is KeyboardInterrupt:
            raise KeyboardInterrupt

    return advance


def nothing() -> None:
    """A progress that nobody watches."""


def tokenize(
    client: Client, photos: list[Path], advance: Callable[[], None] = nothing, model: str | None = None
) -> tuple[list[str], list[Failure]]:
    """What was asked for, and what failed."""
    with TokenArchive(Path("tokens.tar")) as archive:
        missing = missing_photos(archive, name_photos(photos))
        failures = tokenize_photos(client, missing, archive, model, advance)
    return list(missing), failures


def check_images(directory: Path) -> None:
    for number in range(PHOTOS):
        shown = np.asarray(Image.open(directory / f"photos/a/{number}.png"))
        assert np.array_equal(shown, image_of(tokens_of(pixels_of(number)))[0])


def test_a_folder_and_back(client: Client, folder: Path) -> None:
    assert tokenize(client, find(folder)) == ([f"photos/a/{number}.png" for number in range(PHOTOS)], [])
    steps: list[None] = []
    restored = restore_images(client, read_saved(Path("tokens.tar")), Path("out"), None, lambda: steps.append(None))
    assert (restored.written, restored.kept, restored.failures, len(steps)) == (PHOTOS, 0, [], PHOTOS)
    check_images(Path("out"))


def test_an_interrupted_folder_goes_on_without_doing_anything_again(client: Client, folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tokenize(client, find(folder), after(4))
    assert not Path("tokens.tar").exists()
    assert tokenize(client, find(folder)) == ([f"photos/a/{number}.png" for number in range(4, PHOTOS)], [])
    assert tokenize(client, find(folder)) == ([], [])
    saved = read_saved(Path("tokens.tar"))
    with pytest.raises(KeyboardInterrupt):
        restore_images(client, saved, Path("out"), None, after(3))
    there = len(list(Path("out").rglob("*.png")))
    assert 3 <= there < PHOTOS
    restored = restore_images(client, saved, Path("out"), None, nothing)
    assert (restored.written, restored.kept) == (PHOTOS - there, there)
    check_images(Path("out"))


def test_photos_that_are_new_or_changed_are_added(client: Client, folder: Path) -> None:
    first, second = Path("photos/a/0.png"), Path("photos/a/1.png")
    tokenize(client, [first, second])
    first.write_bytes(Path("photos/a/5.png").read_bytes())
    os.utime(first, (2_000_000_000, 2_000_000_000))
    assert tokenize(client, [first, second, Path("photos/a/2.png")])[0] == ["photos/a/0.png", "photos/a/2.png"]
    restore_images(client, read_saved(Path("tokens.tar")), Path("out"), None, nothing)
    shown = np.asarray(Image.open("out/photos/a/0.png"))
    assert np.array_equal(shown, image_of(tokens_of(pixels_of(5)))[0])


def test_photos_that_fail_do_not_stop_the_others(client: Client, folder: Path) -> None:
    Path("photos/a/3.png").write_bytes(b"text")
    Path("photos/a/4.png").unlink()
    missing, failures = tokenize(client, [*find(folder), Path("photos/a/4.png")])
    assert [failure.name for failure in failures] == ["photos/a/3.png", "photos/a/4.png"]
    assert "plain text" in failures[0].reason
    assert "No such file" in failures[1].reason
    assert len(missing) - len(failures) == len(read_saved(Path("tokens.tar")).records) == PHOTOS - 2
    assert tokenize(client, find(folder))[0] == ["photos/a/3.png"], "only what failed is tried again"


def test_what_concerns_all_photos_ends_it_and_keeps_what_is_done(client: Client, folder: Path) -> None:
    with pytest.raises(ClientError, match="no model 'nothing'"):
        tokenize(client, find(folder), model="nothing")
    assert not list(Path().glob("tokens*"))
    tokenize(client, find(folder)[:2])
    with pytest.raises(TokenArchiveError, match="has tokens of the codebook c0de"):
        tokenize(client, find(folder), model="others")
    assert len(read_saved(Path("tokens.tar")).records) == 2
    with pytest.raises(ClientError, match="The tokens are of the codebook c0de"):
        restore_images(client, read_saved(Path("tokens.tar")), Path("out"), "others", nothing)


def test_photos_are_named_as_a_tar_names_them(folder: Path) -> None:
    inside = folder / "photos/a/0.png"
    assert list(name_photos([Path("photos/a/0.png"), Path("../x.jpg"), inside])) == ["photos/a/0.png", "x.jpg", str(inside)[1:]]
    assert len(name_photos([Path("photos/a/0.png"), Path("photos/../photos/a/0.png"), Path("photos/a/0.png")])) == 2
    with pytest.raises(TokenArchiveError, match=r"x\.jpg and \.\./x\.jpg would both be x\.jpg"):
        name_photos([Path("x.jpg"), Path("../x.jpg")])


def saved_as(*names: str, data: bytes | None = None) -> None:
    """tokens.tar with a container under each of these names, as it may come from anyone."""
    container = pack(TokenGrids(tokens_of(pixels_of(0))[:, None], CODEBOOK.id, CODEBOOK.size)) if data is None else data
    with tarfile.open("tokens.tar", "w") as archive:
        for name in names:
            member = tarfile.TarInfo(f"{name}.vtok")
            member.size = len(container)
            archive.addfile(member, BytesIO(container))


def test_no_image_is_written_outside_of_the_directory(client: Client, folder: Path) -> None:
    away = folder / "away"
    away.mkdir()
    Path("out").mkdir()
    Path("out/link").symlink_to(away)
    Path("out/direct.png").symlink_to(away / "direct.png")
    evil = ("../away/1.jpg", f"{away}/2.jpg", "a/../../away/3.jpg", "link/4.jpg", "..", "", "/")
    saved_as(*evil, "direct.jpg", "good/./5.jpg")
    restored = restore_images(client, read_saved(Path("tokens.tar")), Path("out"), None, nothing)
    assert {failure.name for failure in restored.failures} == set(evil)
    assert {failure.reason for failure in restored.failures} == {"Its name leads out of out."}
    assert list(away.iterdir()) == []
    assert restored.written == 2
    assert Path("out/good/5.png").is_file()
    assert not Path("out/direct.png").is_symlink()


def test_names_that_differ_by_their_suffix_keep_it(client: Client, folder: Path) -> None:
    saved_as("a/x.jpg", "a/x.webp", "y")
    assert restore_images(client, read_saved(Path("tokens.tar")), Path("out"), None, nothing).written == 3
    assert sorted(str(path) for path in Path("out").rglob("*.png")) == ["out/a/x.jpg.png", "out/a/x.webp.png", "out/y.png"]


def test_a_damaged_container_is_that_images_failure(client: Client, folder: Path) -> None:
    saved_as("x.jpg", data=pack(TokenGrids(np.zeros((1, 1, 4, 4), np.int32), CODEBOOK.id, 16))[:-1])
    (failure,) = restore_images(client, read_saved(Path("tokens.tar")), Path("out"), None, nothing).failures
    assert (failure.name, "is cut off" in failure.reason) == ("x.jpg", True)
    assert not Path("out").exists()


def test_a_single_container_has_an_image_for_each_grid(client: Client, folder: Path) -> None:
    answer = client.tokenize([Path("photos/a/0.png"), Path("photos/a/1.png")])
    Path("two.vtok").write_bytes(pack(answer.grids))
    assert restore_images(client, read_saved(Path("two.vtok")), Path("out"), None, nothing).written == 2
    shown = np.stack([np.asarray(Image.open(f"out/two-{index}.png")) for index in (0, 1)])
    assert np.array_equal(shown, image_of(answer.grids.tokens[:, 0]))


def test_an_image_that_cannot_be_written_ends_it(client: Client, folder: Path) -> None:
    saved_as("x.jpg")
    Path("out").write_text("a file")
    with pytest.raises(TokenArchiveError, match="out"):
        restore_images(client, read_saved(Path("tokens.tar")), Path("out"), None, nothing)


def test_the_commands(client: Client, folder: Path) -> None:
    """As docs/token-format.md has them."""
    (shown,) = re.findall(r"^```sh\n(.*?)^```$", TOKEN_FORMAT.read_text(), re.MULTILINE | re.DOTALL)
    tokenizing, detokenizing = (shlex.split(line, comments=True)[1:] for line in shown.splitlines())
    Path("photos/b.jpg").write_bytes(b"text")
    made = vitrine(*tokenizing, "--url", client.url, cwd=folder)
    assert (made.returncode, made.stdout) == (1, f"tokens.tar: {PHOTOS} photos, {PHOTOS} of them new, 1 failed.\n")
    assert made.stderr.startswith("vitrine: photos/b.jpg: The bytes are plain text")
    assert made.stderr.count("\n") == 1, "no progress bar in a pipe"
    restored = vitrine(*detokenizing, cwd=folder, url=client.url)
    assert (restored.returncode, restored.stdout, restored.stderr) == (0, f"images: {PHOTOS} images written, 0 were there.\n", "")
    check_images(Path("images"))


@pytest.fixture
def interrupts() -> Iterator[None]:
    """A shell tells what it runs in the background to ignore an interrupt, and its children inherit that; a handler they do not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_command_that_is_stopped_goes_on(client: Client, folder: Path, stop: signal.Signals, code: int) -> None:
    """Enough photos that it is stopped in the middle; what is there is whole, and the same command makes the rest."""
    photo = Path("photos/a/0.png")
    for number in range(MANY):
        (Path("photos") / f"{number}.png").write_bytes(photo.read_bytes())
    command = [VITRINE, "tokenize", "photos", "-o", "tokens.tar"]
    with subprocess.Popen(command, env=environment(url=client.url), stderr=subprocess.PIPE, text=True) as process:
        part = Path("tokens.tar.part")
        while process.poll() is None and not (part.exists() and part.stat().st_size > 4096):  # some records
            time.sleep(0.001)
        process.send_signal(stop)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == ("vitrine: Interrupted. The same command goes on from here.\n" if stop == signal.SIGINT else "")
    assert not Path("tokens.tar").exists()
    again = vitrine("tokenize", "photos", "-o", "tokens.tar", cwd=folder, url=client.url)
    total = PHOTOS + MANY
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith(f"tokens.tar: {total} photos, ")
    new = int(again.stdout.split(" photos, ")[1].split()[0])
    assert 0 < new < total
    with tarfile.open("tokens.tar") as archive:
        names = archive.getnames()
    assert len(names) == len(set(names)) == total, "nothing was made twice"


def test_a_terminal_sees_a_bar(client: Client, folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [VITRINE, "tokenize", "photos", "-o", "tokens.tar"]
    variables = environment(url=client.url) | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(command, env=variables, stderr=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        shown = b""
        with os.fdopen(ours, "rb", buffering=0) as terminal:
            try:
                while data := terminal.read(4096):
                    shown += data
            except OSError:  # what Linux says when the other side is closed
                pass
        said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, f"tokens.tar: {PHOTOS} photos, {PHOTOS} of them new.\n")
    assert f"{PHOTOS}/{PHOTOS}".encode() in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tokenize", "photos", "-o", "photos/a/0.png"), "photos/a/0.png is no tar of token containers"),
        (("tokenize", "none", "-o", "tokens.tar"), "There is no photo at none."),
        (("detokenize", "photos/a/0.png", "-o", "out"), "photos/a/0.png is neither a tar of token containers nor one"),
        (("detokenize", "none.tar", "-o", "out"), "none.tar: No such file or directory."),
        (("tokenize", "photos", "-o", "tokens.tar", "--url", f"http://127.0.0.1:{free_port()}"), "Nothing answers at"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(client: Client, folder: Path, arguments: tuple[str, ...], words: str) -> None:
    ran = vitrine(*arguments, cwd=folder, url=client.url)
    assert is_one_sentence(ran)
    assert words in ran.stderr


def test_local_needs_no_server(repository: Path, folder: Path) -> None:
    local = ("--local", "--repository", repository, "--model", "greys")
    assert vitrine("tokenize", "photos/a/0.png", "-o", "tokens.tar", *local, cwd=folder).returncode == 0
    assert vitrine("detokenize", "tokens.tar", "-o", "out", *local, cwd=folder).returncode == 0
    assert Path("out/photos/a/0.png").is_file()
