"""Last stage of a model: one rename puts a verified version into the repository, whole or not at all."""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from app.manifest import Manifest, ManifestError, read_entry
from export.config import CONFIG_FILE
from export.files import writing
from export.spec import ExportError, Published, Staged


def publish(build: Sequence[Staged], repository: Path) -> Published:
    """Move the staged engines in as the next version of their model, whole model directories when they are the first.

    Two publishes at once each get a version of their own: a rename onto a directory that is there fails, and the next
    number is tried. Who has a number for the first engine has it for all; an engine that cannot follow takes those before it back
    out. Until the last one is there, the gateway does not serve the version. Nothing else is ever written into the repository root,
    where Triton would take it for a model.

    Raises:
        ExportError: not verified; the model of that name has other tensors, another engine or another maximum batch, or is
            not one of this exporter's; disk full, no permission.
    """
    for staged in build:
        if staged.manifest.verification is None or not staged.manifest.verification.passed:
            raise ExportError("Only a verified engine is published.")
    root, first = repository.resolve(), build[0].manifest
    models = [root / staged.manifest.entry_name for staged in build]
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        _check_name(root, first.model, models)
        for staged, model in zip(build, models, strict=True):
            check_fits(model, staged.manifest)
        version = _take_version(build[0], models)
        paths = [model / str(version) for model in models]
        for index, staged in enumerate(build[1:], 1):
            try:
                if not _place(staged, models[index], version):
                    raise ExportError(f"{paths[index]} is there although no engine of the model should have it; remove it.")
            except (OSError, ExportError):
                for path in paths[:index]:
                    _take_back(build[0].path.parent.parent, path)
                raise
    return Published(first.model, version, tuple(paths), tuple(staged.manifest for staged in build))


def next_version(*models: Path) -> int:
    """One more than the highest number in any of the models' directories."""
    versions = (int(path.name) for model in models if model.is_dir() for path in model.iterdir() if path.name.isdecimal())
    return 1 + max(versions, default=0)


def _check_name(root: Path, name: str, models: Sequence[Path]) -> None:
    """All directories of one model's name are taken for engines of one build, so a classifier and a tokenizer cannot share it."""
    others = {path.name for path in root.iterdir() if path.name.partition(".")[0] == name} - {model.name for model in models}
    if others:
        raise ExportError(f"The repository has a model {name} of other engines ({', '.join(sorted(others))}); give another --name.")


def _take_version(staged: Staged, models: Sequence[Path]) -> int:
    """Move the first engine in under a number that no engine of the model has had."""
    while not _place(staged, models[0], version := next_version(*models)):
        pass
    return version


def _place(staged: Staged, model: Path, version: int) -> bool:
    """Move one engine in, with its model's directory where there is none; False when that version is there."""
    if not model.exists():
        numbered = staged.path.with_name(str(version))
        if numbered != staged.path:
            staged.path.rename(numbered)
        if _move(numbered.parent, model):
            return True
        if numbered != staged.path:
            numbered.rename(staged.path)
    check_fits(model, staged.manifest)
    if not _move(staged.path, model / str(version)):
        return False
    config = staged.path.parent / CONFIG_FILE
    if not (model / CONFIG_FILE).exists() or (model / CONFIG_FILE).read_bytes() != config.read_bytes():
        config.replace(model / CONFIG_FILE)
    return True


def _take_back(scratch: Path, path: Path) -> None:
    """Move a version out again, with its model's directory where it is the only one."""
    model = path.parent
    alone = not any(other.name.isdecimal() for other in model.iterdir() if other != path)
    (model if alone else path).rename(scratch / f"{model.name}-withdrawn")


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
    numbered = (path for path in model.iterdir() if path.name.isdecimal()) if model.is_dir() else ()
    versions = sorted(numbered, key=lambda path: -int(path.name))
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
    "classes or masks": lambda m: m.detection and (m.detection.classes, m.detection.masks),
    "a codebook grid": lambda m: m.codebook and (m.codebook.count, m.codebook.grid),
}


def _read(version: Path) -> Manifest | None:
    try:
        return read_entry(version).manifest
    except ManifestError:
        return None
