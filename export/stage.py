"""Fifth stage of a model: a complete version directory, outside the repository root but on its file system."""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from app import generate
from app.manifest import NAME_PATTERN, ArtifactFile, EngineSpec, Manifest
from export.config import CONFIG_FILE, render_config
from export.files import write_manifest, writing
from export.golden import travelling
from export.spec import (
    TOKENIZER_FILE,
    AnyLoaded,
    Build,
    Engine,
    ExportError,
    ExportRequest,
    LoadedChat,
    LoadedDetector,
    LoadedDualEncoder,
    LoadedGrounder,
    Staged,
)

GOLDEN = "golden"
TRITON_CHAT = Path(__file__).with_name("triton_chat.py")


@contextmanager
def stage(engines: Sequence[Engine], loaded: AnyLoaded, request: ExportRequest) -> Iterator[tuple[Staged, ...]]:
    """Lay out `SCRATCH/NAME/{config.pbtxt, 1/}` for each engine of one build beside the repository; what is still there when the
    block ends is removed.

    The directory is a sibling of the repository root and never inside it: Triton loads whatever lies in the root as a model.

    Raises:
        ExportError: no valid name, another file system beside the repository, disk full, no permission.
    """
    name = model_name(request)
    root = request.repository.resolve()
    with writing(root.parent):
        root.parent.mkdir(parents=True, exist_ok=True)
        scratch = TemporaryDirectory(prefix=f".staging-{name}-", dir=root.parent)
    with scratch:
        with writing(root.parent):
            build = _build(engines)
            manifests = [_describe(name, engine, build, loaded, request) for engine in engines]
            filled = zip(engines, manifests, strict=True)
            staged = tuple(_fill(Path(scratch.name), root, engine, manifest) for engine, manifest in filled)
            if isinstance(loaded, LoadedGrounder | LoadedDetector | LoadedDualEncoder) and loaded.vocabulary is not None:
                for part in staged:
                    if part.manifest.text is not None:
                        (part.path / TOKENIZER_FILE).write_bytes(loaded.vocabulary.file)
            elif isinstance(loaded, LoadedChat):
                for part in staged:
                    (part.path / TOKENIZER_FILE).write_bytes(loaded.tokenizer)
                write_triton_model(staged[-1].path)
        yield staged


def write_triton_model(version: Path) -> None:
    """Lay the Python model of Triton into the version directory of a decoder, with the loop that it imports."""
    (version / "app").mkdir()
    shutil.copyfile(TRITON_CHAT, version / "model.py")
    shutil.copyfile(generate.__file__, version / "app" / "generate.py")


def model_name(request: ExportRequest) -> str:
    """The name asked for, or one made of the source: `timm/convnext_atto.d2_in1k` gives `convnext-atto-d2-in1k`.

    Raises:
        ExportError: not a name that a model can have.
    """
    name = _default_name(request.source) if request.name is None else request.name
    if not NAME_PATTERN.fullmatch(name):
        raise ExportError(
            f"{name!r} cannot be a model's name: it takes 1 to 100 of a-z, 0-9, '-' and '_', a letter or digit first; give --name."
        )
    return name


def _default_name(source: str) -> str:
    """The last part of the source without its file suffix or factory, in the letters that a name may have."""
    library, _, rest = source.partition("/")
    last = (rest or library).rstrip("/").rpartition("/")[2]
    if library in ("python", "onnx"):
        last = re.sub(r"\.(py|onnx)(:\w+)?$", "", last)
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:100]


def _build(engines: Sequence[Engine]) -> Build:
    created = datetime.now(UTC).replace(microsecond=0)
    first = _artifact(engines[0].path, engines[0].path.name)
    roles = tuple(engine.interface.role for engine in engines)
    return Build(f"{created:%Y%m%d-%H%M%S}-{first.sha256[:8]}", created, roles)


def _describe(name: str, engine: Engine, build: Build, loaded: AnyLoaded, request: ExportRequest) -> Manifest:
    """The manifest as far as it is known before verification."""
    artifact = _artifact(engine.path, f"model{engine.path.suffix}")
    reads = any(spec.name == "input_ids" for spec in engine.interface.inputs)
    return Manifest(
        model=name,
        role=engine.interface.role,
        roles=build.roles,
        build=build.id,
        created=build.created,
        description=request.description,
        engine=EngineSpec(
            kind=engine.kind,
            external_data=tuple(_artifact(path, path.name) for path in engine.external_data),
            opset=engine.opset,
            ir_version=engine.ir_version,
            max_batch=request.max_batch,
            **artifact.model_dump(),
        ),
        inputs=engine.interface.inputs,
        outputs=engine.interface.outputs,
        preprocessing=loaded.preprocessing.model_copy(update={"scaled_decoding": False}),
        **{field: answer for field, answer in loaded.answers.items() if reads or field != "text"},
        source=loaded.source,
        precision=engine.precision,
        parameters=engine.parameters,
        macs=engine.macs,
        tensorrt=engine.tensorrt,
    )


def _artifact(path: Path, file: str) -> ArtifactFile:
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return ArtifactFile(file=file, sha256=digest, size=path.stat().st_size)


def _fill(scratch: Path, root: Path, engine: Engine, manifest: Manifest) -> Staged:
    """Write everything but the verification and the golden outputs. The version is a first guess, publishing decides."""
    if root.exists() and root.stat().st_dev != scratch.stat().st_dev:
        raise ExportError(
            f"{root} and {scratch.parent} are on two file systems, so that a version cannot be moved in at once; "
            "let --repository be a directory inside the mounted one."
        )
    model = scratch / manifest.entry_name
    version = model / "1"
    (version / GOLDEN).mkdir(parents=True)
    (model / CONFIG_FILE).write_text(render_config(manifest), encoding="utf-8")
    # Contents only: the engine's own file may be readable by its owner alone, the server is another user.
    shutil.copyfile(engine.path, version / manifest.engine.file)
    for path in engine.external_data:
        shutil.copyfile(path, version / path.name)
    for image in travelling() if any(spec.name == "image" for spec in engine.interface.inputs) else ():
        (version / GOLDEN / image.name).write_bytes(image.data)
    write_manifest(version, manifest)
    return Staged(version, manifest)
