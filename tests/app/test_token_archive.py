"""The tar of token containers: any tar reader reads it, and wherever it is cut off it goes on from the last whole record."""

import subprocess
import tarfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from app.token_archive import END, TokenArchive, TokenArchiveError, read_archive
from app.token_format import TokenGrids, pack, unpack

CODEBOOK = "ab" * 32
LONG = "a directory with a name that is long, ünd not in ASCII/" * 3 + "photo.jpg"


def grids(seed: int, codebook: str = CODEBOOK) -> TokenGrids:
    tokens = np.random.default_rng(seed).integers(0, 16, (1, 1, 4, 4), dtype=np.int64).astype(np.int32)
    return TokenGrids(tokens, codebook, 16)


def write(path: Path, *names: str, seed: int = 0) -> None:
    with TokenArchive(path) as archive:
        for index, name in enumerate(names):
            archive.add(name, 1_000_000 + index, grids(seed + index))


def contents(path: Path) -> dict[str, bytes]:
    with path.open("rb") as file:
        return {name: record.read(file) for name, record in read_archive(path).items()}


def interrupt(path: Path, *names: str) -> None:
    """Leave the archive as an interruption does, after these."""
    with suppress(KeyboardInterrupt), TokenArchive(path) as archive:
        for index, name in enumerate(names):
            archive.add(name, 1_000_000 + index, grids(index))
        raise KeyboardInterrupt


def members(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def test_tar_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "tokens.tar"
    write(path, "photos/a.jpg", LONG)
    listed = subprocess.run(["tar", "-xvf", path, "-C", tmp_path], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines()[0] == "photos/a.jpg.vtok"
    assert listed.stderr == ""
    assert np.array_equal(unpack((tmp_path / "photos/a.jpg.vtok").read_bytes()).tokens, grids(0).tokens)
    assert (tmp_path / "photos/a.jpg.vtok").stat().st_mtime == 1_000_000
    assert (tmp_path / f"{LONG}.vtok").read_bytes() == pack(grids(1))
    assert [file.name for file in tmp_path.glob("*.part*")] == []


def test_a_later_record_wins_as_in_any_tar(tmp_path: Path) -> None:
    path = tmp_path / "tokens.tar"
    write(path, "a.jpg", "b.jpg")
    write(path, "a.jpg", seed=7)
    assert contents(path) == {"a.jpg": pack(grids(7)), "b.jpg": pack(grids(1))}
    with TokenArchive(path) as archive:
        assert (len(archive), archive.time("a.jpg"), archive.time("b.jpg"), archive.time("c.jpg")) == (
            2,
            1_000_000,
            1_000_001,
            None,
        )


def test_nothing_is_written_where_nothing_is_added(tmp_path: Path) -> None:
    path = tmp_path / "tokens.tar"
    write(path)
    assert list(tmp_path.iterdir()) == []
    write(path, "a.jpg")
    before = path.stat()
    write(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_interruption_leaves_a_whole_tar_beside_an_untouched_file(tmp_path: Path) -> None:
    path, part = tmp_path / "tokens.tar", tmp_path / "tokens.tar.part"
    interrupt(path, "a.jpg", "b.jpg")
    assert not path.exists()
    assert members(part) == ["a.jpg.vtok", "b.jpg.vtok"]
    write(path, "c.jpg")
    assert list(contents(path)) == ["a.jpg", "b.jpg", "c.jpg"]
    whole = path.read_bytes()
    interrupt(path, "d.jpg")
    assert path.read_bytes() == whole
    assert members(part)[-1] == "d.jpg.vtok"


def test_a_part_cut_off_anywhere_goes_on_from_the_last_whole_record(tmp_path: Path) -> None:
    path, part = tmp_path / "tokens.tar", tmp_path / "tokens.tar.part"
    write(tmp_path / "whole.tar", "a.jpg", LONG, "b.jpg")
    whole = (tmp_path / "whole.tar").read_bytes()
    ends = [record.start + record.length for record in read_archive(tmp_path / "whole.tar").values()]
    for length in {*range(0, len(whole), 97), *ends, *(end - 1 for end in ends), len(whole)}:
        part.write_bytes(whole[:length])
        with TokenArchive(path) as archive:
            assert len(archive) == sum(end <= length for end in ends)
            for index, name in enumerate(("a.jpg", LONG, "b.jpg")):
                if archive.time(name) is None:
                    archive.add(name, 1_000_000 + index, grids(index))
        assert path.read_bytes() == whole
        path.unlink()


@pytest.mark.parametrize("tail", [b"\0" * 700, b"\xff" * 700, b"\0" * 5000])
def test_a_part_with_a_spoilt_end_goes_on(tmp_path: Path, tail: bytes) -> None:
    path, part = tmp_path / "tokens.tar", tmp_path / "tokens.tar.part"
    interrupt(path, "a.jpg", "b.jpg")
    written = part.read_bytes()
    part.write_bytes(written[: -len(END) - 480] + tail)  # the last container is damaged
    write(path, "c.jpg")
    assert list(contents(path)) == ["a.jpg", "c.jpg"]
    assert members(path) == ["a.jpg.vtok", "c.jpg.vtok"]


def test_nothing_after_a_damaged_record_is_kept(tmp_path: Path) -> None:
    path, part = tmp_path / "tokens.tar", tmp_path / "tokens.tar.part"
    interrupt(path, "a.jpg", "b.jpg", "c.jpg")
    part.write_bytes(part.read_bytes().replace(pack(grids(1)), bytes(64)))
    write(path, "d.jpg")
    assert members(path) == ["a.jpg.vtok", "d.jpg.vtok"]


def test_tokens_of_another_codebook_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "tokens.tar"
    write(path, "a.jpg")
    with pytest.raises(TokenArchiveError, match="name another file, or another model"), TokenArchive(path) as archive:
        archive.add("b.jpg", 0, grids(1, "cd" * 32))
    assert list(contents(path)) == ["a.jpg"]


def write_both(one: TokenArchive, other: TokenArchive) -> None:
    one.add("b.jpg", 0, grids(1))
    other.add("c.jpg", 0, grids(2))


def test_two_writers_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "tokens.tar"
    with TokenArchive(path) as one:
        one.add("a.jpg", 0, grids(0))
        with pytest.raises(TokenArchiveError, match="another process writes to it"), TokenArchive(path) as other:
            write_both(one, other)
        one.add("d.jpg", 0, grids(3))
    assert list(contents(path)) == ["a.jpg", "b.jpg", "d.jpg"]


def tar(**members: bytes) -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", tar(notes=b"text"), tar(**{"a.vtok": b"text"}), tar(**{"a.vtok": pack(grids(0))})[:-9600]],
)
def test_a_file_that_is_something_else_is_not_touched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokens.tar"
    path.write_bytes(content)
    with pytest.raises(TokenArchiveError, match="is no tar of token containers"):
        write(path, "a.jpg")
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["tokens.tar"]


def test_a_header_cannot_make_reading_allocate(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg.vtok")
    member.size = 1 << 40
    path = tmp_path / "tokens.tar"
    path.write_bytes(member.tobuf() + END)
    with pytest.raises(TokenArchiveError, match="neither a tar"):
        read_archive(path)


def test_what_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(TokenArchiveError, match=r"none/tokens.tar.part: No such file or directory\."):
        write(tmp_path / "none/tokens.tar", "a.jpg")
    with pytest.raises(TokenArchiveError, match=r"none\.tar: No such file or directory\."):
        read_archive(tmp_path / "none.tar")
