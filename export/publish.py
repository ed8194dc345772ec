"""Last stage of a model: one rename puts a verified version into the repository, whole or not at all."""

import errno
from collections.abc import Callable
from pathlib import Path

from app.manifest import Manifest, ManifestError, read_entry
from export.config import CONFIG_FILE
from export.files import writing
from export.spec import ExportError, Published, Staged


def publish(staged: Staged, repository: Path) -> Published:
    """Move the staged version in as the next integer of its model, or the whole model directory when it is the first.

    Two publishes at once each get a version of their own: a rename onto a directory that is there fails, and the next
    number is tried. Nothing else is ever written into the repository root, where Triton would take it for a model.

    Raises:
        ExportError: not verified; the model of that name has other tensors, another engine or another maximum batch, or is
            not one of this exporter's; disk full, no permission.
    """
    manifest = staged.manifest
    if manifest.verification is None or not manifest.verification.passed:
        raise ExportError("Only a verified engine is published.")
    model = repository.resolve() / manifest.entry_name
    with writing(model.parent):
        model.parent.mkdir(parents=True, exist_ok=True)
        path = _publish_first(staged, model) or _publish_next(staged, model)
    return Published(manifest.entry_name, int(path.name), path, manifest)


def next_version(model: Path) -> int:
    """One more than the highest number in the model's directory."""
    return 1 + max((int(path.name) for path in model.iterdir() if path.name.isdecimal()), default=0)


def _publish_first(staged: Staged, model: Path) -> Path | None:
    """Move the model's directory in; None when there is one already."""
    return model / staged.path.name if not model.exists() and _move(staged.path.parent, model) else None


def _publish_next(staged: Staged, model: Path) -> Path:
    check_fits(model, staged.manifest)
    config = staged.path.parent / CONFIG_FILE
    while not _move(staged.path, path := model / str(next_version(model))):
        pass
    if not (model / CONFIG_FILE).exists() or (model / CONFIG_FILE).read_bytes() != config.read_bytes():
        config.replace(model / CONFIG_FILE)
    return path


def _move(source: Path, target: Path) -> bool:
    """Rename a directory; False when the target is there."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True


def check_fits(model: Path, manifest: Manifest) -> None:
    """Hold `manifest` against the newest readable version of the model directory: all versions share one `config.pbtxt`.

    Raises:
        ExportError: they differ in what is shared, or there are versions and none of them has a manifest.
    """
    versions = sorted((path for path in model.iterdir() if path.name.isdecimal()), key=lambda path: -int(path.name))
    readable = [known for known in map(_read, versions) if known is not None]
    if versions and not readable:
        raise ExportError(f"{model} holds versions without a readable manifest, so it is not replaced; give another --name.")
    for known in readable[:1]:
        differing = [what for what, of in _SHARED.items() if of(known) != of(manifest)]
        if differing:
            raise ExportError(
                f"The versions of {model.name} have {' and '.join(differing)} other than this one, and clients rely on them; "
                "give another --name."
            )


_SHARED: dict[str, Callable[[Manifest], object]] = {
    "inputs": lambda m: m.inputs,
    "outputs": lambda m: m.outputs,
    "an engine": lambda m: (m.engine.kind, m.engine.file),
    "a --max-batch": lambda m: m.engine.max_batch,
    "roles": lambda m: m.roles,
}


def _read(version: Path) -> Manifest | None:
    try:
        return read_entry(version).manifest
    except ManifestError:
        return None
