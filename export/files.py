"""Writing beside the repository: the manifest file, and what is said when the disk refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.manifest import MANIFEST_FILE, Manifest
from export.spec import ExportError


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes under `directory`, into an ExportError (disk full, no permission, ...)."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"Cannot write under {directory}: {error.strerror or error}. Nothing was published.") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `directory/manifest.json`."""
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
