"""Folders of images to a file of tokens and back: the work of `vitrine tokenize` and `vitrine detokenize`."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from app.ahead import ahead
from app.client import PHOTO_FAULTS, Client, ClientError, read_grids
from app.token_archive import Record, TokenArchive, TokenArchiveError, read_archive
from app.token_format import MAGIC, TokenGrids

REQUESTS = 4
"""Requests in flight, which is what lets a gateway form batches."""


@dataclass(frozen=True)
class Failure:
    """Why the image `name` has no answer."""

    name: str
    reason: str


def name_photos(photos: Iterable[Path]) -> dict[str, Path]:
    """Photos by the name that a tar gives them: the path as it was written, without what leads out of a directory.

    Raises:
        TokenArchiveError: two photos would have one name.
    """
    named: dict[str, Path] = {}
    for photo in photos:
        name = "/".join(part for part in photo.parts if part not in (photo.anchor, ".."))
        if named.setdefault(name, photo).resolve() != photo.resolve():
            raise TokenArchiveError(f"{named[name]} and {photo} would both be {name} there; give them in two commands.")
    return named


def missing_photos(archive: TokenArchive, photos: Mapping[str, Path]) -> dict[str, Path]:
    """Those photos that the archive does not have, or has of another time."""
    return {name: photo for name, photo in photos.items() if (time := _changed(photo)) is None or time != archive.time(name)}


def tokenize_photos(
    client: Client, photos: Mapping[str, Path], archive: TokenArchive, model: str | None, advance: Callable[[], None]
) -> list[Failure]:
    """Add the tokens of every photo to the archive, and tell those that have none; `advance` is called after each.

    Raises:
        ClientError: something that does not concern one photo alone.
        TokenArchiveError: the archive takes no more.
    """

    def ask(photo: Path) -> tuple[int, TokenGrids]:
        return _changed(photo) or 0, client.tokenize(photo, model=model).grids

    failures = []
    for (name, photo), answer in ahead(lambda item: ask(item[1]), photos.items(), REQUESTS):
        try:
            archive.add(name, *answer.result())
        except ClientError as error:
            failures.append(_failure(str(photo), error))
        advance()
    return failures


@dataclass(frozen=True)
class SavedTokens:
    """A file of tokens, of which an image can be made for each of `records`: their names, and where the container lies."""

    path: Path
    records: Mapping[str, Record]

    def grids(self, name: str) -> TokenGrids:
        """
        Raises:
            ClientError: the container is damaged.
        """
        with self.path.open("rb") as file:
            return read_grids(self.records[name].read(file))


def read_saved(path: Path) -> SavedTokens:
    """An archive, or a single container as `/v1/tokenize` answers it, which has the name of the file.

    Raises:
        TokenArchiveError: it is neither, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            single = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise TokenArchiveError(f"{path}: {error.strerror}.") from error
    return SavedTokens(path, {path.name: Record(path.name, 0, 0, path.stat().st_size)} if single else read_archive(path))


@dataclass
class Restored:
    """What became of a file's images: how many were written, how many were there already, and those that failed."""

    written: int = 0
    kept: int = 0
    failures: list[Failure] = field(default_factory=list)


def restore_images(client: Client, saved: SavedTokens, directory: Path, model: str | None, advance: Callable[[], None]) -> Restored:
    """Write a PNG below `directory` for every image of the file, unless one is there that is newer than the file.

    Raises:
        ClientError: something that does not concern one image alone.
        TokenArchiveError: an image cannot be written.
    """
    restored = Restored()
    restore = partial(_restore, client, saved, directory, model)
    for (name, _), answer in ahead(restore, _targets(saved.records, directory).items(), REQUESTS):
        try:
            written, kept = answer.result()
        except ClientError as error:
            restored.failures.append(_failure(name, error))
        else:
            restored.written += written
            restored.kept += kept
        advance()
    return restored


def _restore(
    client: Client, saved: SavedTokens, directory: Path, model: str | None, named: tuple[str, Path | None]
) -> tuple[int, int]:
    """How many images of the container `named` were written to its target or beside it, and how many were there."""
    name, target = named
    if target is None or not target.parent.resolve().is_relative_to(directory.resolve()):
        raise ClientError(f"Its name leads out of {directory}.", code="unreadable")
    grids = saved.grids(name)
    written = 0
    for index, tokens in enumerate(grids.tokens):
        file = target if len(grids.tokens) == 1 else target.with_stem(f"{target.stem}-{index}")
        if not _is_newer(file, saved.path):
            picture = client.detokenize(replace(grids, tokens=tokens[None]), model=model).results[0].reconstruction
            assert picture is not None  # a request for one grid has its image, or was refused
            _write(file, picture.data)
            written += 1
    return written, len(grids.tokens) - written


def _targets(names: Iterable[str], directory: Path) -> dict[str, Path | None]:
    """Where the image of each name goes; None for a name that is none or leads out of the directory: a tar may come from anyone.

    `a/b.jpg` becomes `a/b.png`. Where that would not be one for each, as with `a/b.webp` beside it, all have `.png` added.
    """
    paths = {name: PurePosixPath(name) for name in names}
    targets = {
        name: directory / path.with_suffix(".png")
        for name, path in paths.items()
        if path.name and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    }
    if len(set(targets.values())) < len(targets):
        targets = {name: directory / f"{name}.png" for name in targets}
    return {name: targets.get(name) for name in paths}


def _is_newer(image: Path, file: Path) -> bool:
    return image.is_file() and image.stat().st_mtime_ns > file.stat().st_mtime_ns


def _write(file: Path, data: bytes) -> None:
    """The whole file or none."""
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(file)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise TokenArchiveError(f"{error.filename or file}: {error.strerror}.") from error


def _changed(photo: Path) -> int | None:
    """When the photo was last changed, in whole seconds since 1970, as a tar has it; None when it cannot be told."""
    try:
        return int(photo.stat().st_mtime)
    except OSError:
        return None


def _failure(name: str, error: ClientError) -> Failure:
    """The error as that of one image, when it is."""
    if error.code not in PHOTO_FAULTS:
        raise error
    return Failure(name, error.detail)
