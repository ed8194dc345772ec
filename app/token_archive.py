"""A file of the tokens of many images: a tar of token containers that grows by whole records and survives an interruption.

    photos/espresso.jpg.vtok      modified when the photo was

A new file, and what is added to one, is written to FILE.part beside it, which takes FILE's place when all is done. The part is a
whole tar after every record; one that was cut off in the middle of a record goes on from the record before.
"""

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from app.errors import MalformedTokensError
from app.token_format import TokenGrids, pack, unpack

SUFFIX = ".vtok"
END = bytes(2 * tarfile.BLOCKSIZE)


class TokenArchiveError(Exception):
    """The file cannot be read, written or added to; the message is a sentence for people."""


@dataclass(frozen=True)
class Record:
    """Where the container of the image `name` lies in the file; `time`: when that was last changed, in seconds since 1970."""

    name: str
    time: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """Where the next record begins."""
        return self.start + -(-self.length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def read(self, file: BinaryIO) -> bytes:
        file.seek(self.start)
        return file.read(self.length)


class TokenArchive:
    """The file `path`, to add to: a context manager that completes the file, unless the block is left by an exception.

    Raises:
        TokenArchiveError: entering: `path` is something else, or cannot be read. Adding and leaving: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self._file: BinaryIO | None = None  # the part, once there is one
        self._times: dict[str, int] = {}
        self._codebook: str | None = None
        self._end = 0  # of the last record
        self._size = 0  # of the part, as it was left

    def __len__(self) -> int:
        """Images in it."""
        return len(self._times)

    def __enter__(self) -> "TokenArchive":
        with _sentences(self.path):
            if self.part.exists():
                self._file = self.part.open("r+b")
                self._learn(self._file)
                self._write(b"")
            elif self.path.exists():
                with self.path.open("rb") as file:
                    self._learn(file)
                    file.seek(self._end)
                    if file.read(len(END)) != END:
                        raise TokenArchiveError(f"{self.path} is no tar of token containers, or a damaged one; name another.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is None:
            return
        with self._file as file, _sentences(self.part):
            os.fsync(file.fileno())
        if kind is None:
            with _sentences(self.path):
                self.part.replace(self.path)

    def time(self, name: str) -> int | None:
        """When the image `name` was last changed before its tokens were added; None when it has none."""
        return self._times.get(name)

    def add(self, name: str, time: int, grids: TokenGrids) -> None:
        """Add the tokens of an image; those that it had under the name are superseded, as in any tar."""
        if self._codebook not in (None, grids.codebook):
            raise TokenArchiveError(
                f"{self.path} has tokens of the codebook {self._codebook}, the model gives those of {grids.codebook}; "
                "name another file, or another model."
            )
        data = pack(grids)
        header = tarfile.TarInfo(name + SUFFIX)
        header.size, header.mtime = len(data), time
        with _sentences(self.part):
            if self._file is None:
                self._file = self._begin()
            self._write(header.tobuf(tarfile.PAX_FORMAT, "utf-8") + data + bytes(-len(data) % tarfile.BLOCKSIZE))
        self._times[name], self._codebook = time, grids.codebook

    def _learn(self, file: BinaryIO) -> None:
        """Take in what the file has, up to its end or the first record that is not whole."""
        for record in _records(file):
            try:
                grids = unpack(record.read(file))
            except MalformedTokensError:
                break
            self._times[record.name], self._codebook, self._end = record.time, grids.codebook, record.end
        self._size = file.seek(0, os.SEEK_END)

    def _begin(self) -> BinaryIO:
        """The part of a new file, or the copy of a whole one; a copy is a part only once it is whole."""
        if self.path.exists():
            copy = self.part.with_name(f"{self.part.name}.copy")
            shutil.copyfile(self.path, copy)
            copy.replace(self.part)
            return self.part.open("r+b")
        return self.part.open("x+b")

    def _write(self, record: bytes) -> None:
        """Put a record after the last one, in place of the tar's end, and the end after it."""
        assert self._file is not None
        if os.fstat(self._file.fileno()).st_size != self._size:
            raise TokenArchiveError(f"{self.part} has grown: another process writes to it.")
        self._file.seek(self._end)
        self._file.write(record + END)
        self._file.truncate()
        self._file.flush()
        self._end += len(record)
        self._size = self._end + len(END)


def read_archive(path: Path) -> dict[str, Record]:
    """Where the tokens of every image lie, by its name; the later of two records of one name.

    Raises:
        TokenArchiveError: it cannot be read, or has none.
    """
    with _sentences(path), path.open("rb") as file:
        records = {record.name: record for record in _records(file)}
    if not records:
        raise TokenArchiveError(f"{path} is neither a tar of token containers nor one token container.")
    return records


def _records(file: BinaryIO) -> Iterator[Record]:
    """Every container of the tar that is there in full, up to the tar's end or the first thing that is no part of one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    return
                if member.isreg() and not member.issparse() and member.name.endswith(SUFFIX):
                    yield Record(member.name.removesuffix(SUFFIX), int(member.mtime), member.offset_data, member.size)
    except (tarfile.TarError, ValueError):
        return


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TokenArchiveError(f"{error.filename or path}: {error.strerror}.") from error
