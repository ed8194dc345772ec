"""What a person sees of an export: the stages as they pass, and the closing summary."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.manifest import Check, Codebook, Detection, Generation, Manifest, Verification
from export.pipeline import Progress as Listener
from export.pipeline import export
from export.spec import ExportError, ExportRequest, Published, WeightsReport

_STAGES = {
    "load": "load the network and its weights",
    "fuse": "fuse pre- and postprocessing into the graph",
    "to_onnx": "export to ONNX",
    "to_tensorrt": "build the TensorRT plan",
    "verify": "verify against torch",
    "publish": "publish",
}
_TOLD = (
    *("logits", "probabilities", "agreement", "level", "margin", "codes", "boxes", "scores", "masks"),
    *("strings", "box", "cosine", "vectors"),
)  # ends of the names of the checks that the summary shows
NEXT: dict[str, str] = {
    "classify": "classify PHOTO",
    "detect": "detect PHOTO --output DIR",
    "ground": "ground PHRASE PHOTO --output FOUND.png",
    "tokenize": "tokenize PHOTO --output TOKENS.tar",
    "image": "classify PHOTO --labels cat,dog",
}  # by the role of the first engine
_LONG_PHRASES = {"refuse": "refused", "truncate": "cut off"}


def run(request: ExportRequest, out: Console, err: Console, *, debug: bool = False) -> int:
    """Export with the stages shown on `err` and the summary on `out`; gives the exit code."""
    try:
        with _stages(err) as listener:
            published = export(request, listener)
    except ExportError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        reason = (str(error).splitlines() or [""])[0]
        err.print(f"[bold red]error:[/] {escape(f'{type(error).__name__}: {reason}')}", soft_wrap=True)
        err.print("The network or the exporter did not expect this; --debug shows where. Nothing was published.", soft_wrap=True)
        return ExportError.exit_code
    out.print(_summary(published))
    out.print("Try it:", highlight=False)
    out.print(f"  {_next_command(published, request)}", highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _stages(console: Console) -> Iterator[Listener]:
    """A line per stage with the time it took; the last one spins."""
    columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:

        def listen(stage: str) -> None:
            finish()
            progress.add_task(_STAGES[stage], total=1)

        def finish() -> None:
            for task in progress.task_ids:
                progress.update(task, completed=1)

        try:
            yield listen
        except ExportError:
            for task in progress.tasks[-1:]:
                progress.update(task.id, description=f"[red]{task.description}[/]")
            raise
        finish()


def _next_command(published: Published, request: ExportRequest) -> str:
    if published.manifest.role not in NEXT:
        return f"vitrine models --local --repository {request.repository}"
    return f"vitrine {NEXT[published.manifest.role]} --local --repository {request.repository} --model {published.name}"


def _summary(published: Published) -> Table:
    table = Table(title=f"{published.name}@{published.version}", show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in _rows(published):
        table.add_row(key, escape(value))
    return table


def _rows(published: Published) -> Iterator[tuple[str, str]]:
    manifest = published.manifest
    yield "source", f"{manifest.source.library}/{manifest.source.architecture}"
    yield "weights", _weights(manifest, published.weights)
    if manifest.codebook is not None:
        yield "tokens", _tokens(manifest.codebook)
    elif manifest.detection is not None:
        yield "rows", _detections(manifest.detection, labelled=bool(manifest.labels))
    elif manifest.embedding is not None:
        yield "vectors", _vectors(published.manifests[-1])
    elif manifest.text is not None:
        yield "phrases", f"of at most {manifest.text.length} tokens; longer ones are {_LONG_PHRASES[manifest.text.too_long]}"
    elif manifest.generation is not None:
        yield "context", _generation(manifest.generation)
    else:
        yield "classes", f"{manifest.outputs[0].shape[1]}, {'with' if manifest.labels else 'without'} labels, {manifest.activation}"
    yield "parameters", f"{manifest.parameters:,}"
    for part in published.manifests:
        yield from _engine_rows(part)
    yield "preprocessing", _preprocessing(manifest)
    yield "rewritten", ", ".join(published.rewrites) or "nothing"
    yield "published", "\n".join(map(str, published.paths))


def _engine_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What differs between the engines of a build; where there are several, the first row says which one follows."""
    yield "engine", _engine(manifest)
    if manifest.macs is not None:
        yield "multiply-adds", f"{manifest.macs:,} an image"
    yield "TensorRT", _tensorrt(manifest)
    if manifest.verification is not None:
        yield "verified", "\n".join(_verification(manifest.verification))


def _tokens(codebook: Codebook) -> str:
    height, width = codebook.grid
    count = f"{codebook.count} x " if codebook.count > 1 else ""
    return f"{count}{height}x{width} of {codebook.size:,} codes, {codebook.bits} bits each; codebook {codebook.id[:16]}"


def _detections(detection: Detection, *, labelled: bool) -> str:
    masks = "" if detection.masks is None else f", masks of {detection.masks.count} coefficients"
    classes = f"{detection.classes} classes {'with' if labelled else 'without'} labels"
    return (
        f"the best {detection.queries}, of {classes}, {detection.score}{masks}; padding {'' if detection.content else 'not '}masked"
    )


def _vectors(manifest: Manifest) -> str:
    """Of the engine for texts."""
    embedding, text = manifest.embedding, manifest.text
    assert embedding is not None
    assert text is not None
    bias = f" and bias {embedding.bias:g}" if embedding.bias else ""
    return (
        f"{embedding.dimensions} dimensions, {embedding.activation} of scale {embedding.scale:.4g}{bias}; "
        f"texts of at most {text.length} tokens, longer ones are cut off"
    )


def _generation(generation: Generation) -> str:
    sizes = f"images of {generation.min_pixels:,} to {generation.max_pixels:,} pixels"
    return f"{generation.max_length:,} tokens of {generation.vocabulary:,}; {sizes}"


def _weights(manifest: Manifest, report: WeightsReport | None) -> str:
    if report is None:
        random = manifest.source.weights == "random"
        return "random: never make it the default model" if random else manifest.source.weights
    lines = [report.file]
    if report.wrapper is not None:
        lines.append(f"taken from its key {report.wrapper!r}")
    if report.prefix is not None:
        lines.append(f"prefix {report.prefix!r} taken off")
    lines += [
        f"{what}: {', '.join(keys)}" for what, keys in (("missing", report.missing), ("unexpected", report.unexpected)) if keys
    ]
    return "\n".join(lines)


def _engine(manifest: Manifest) -> str:
    engine = manifest.engine
    size = sum(file.size for file in (engine, *engine.external_data))
    versions = "" if engine.opset is None else f", opset {engine.opset}, IR {engine.ir_version}"
    role = f"{manifest.role}: " if len(manifest.roles) > 1 else ""
    return f"{role}{engine.kind} {manifest.precision}, {decimal(size)}{versions}, batches up to {engine.max_batch}"


def _preprocessing(manifest: Manifest) -> str:
    p = manifest.preprocessing
    if p.policy == "native":
        return f"near its own size, sides of whole {p.height} pixels, {p.interpolation}"
    target = f"shortest edge {p.resize_height}" if p.policy == "shortest_edge" else f"{p.policy} {p.resize_height}x{p.resize_width}"
    scaled = "allowed" if p.scaled_decoding else "not allowed"
    return f"{target}, {p.interpolation}, centre {p.height}x{p.width}; scaled JPEG decoding {scaled}"


def _tensorrt(manifest: Manifest) -> str:
    report = manifest.tensorrt
    if report is None:
        return "not checked"
    verdict = f"{'fits' if report.convertible else 'does not fit'} the table of {report.parser}; not built"
    if manifest.engine.kind == "tensorrt":
        verdict = "built"
    return "\n".join((verdict, *(f"{f.severity}: {f.count} x {f.operator} {f.message}" for f in report.findings)))


def _verification(verification: Verification) -> Iterator[str]:
    """The worst of each kind of check, over the batch sizes."""
    batches = ", ".join(map(str, verification.batch_sizes))
    yield f"{len(verification.checks)} checks on {verification.images} images at batch {batches}"
    groups: dict[str, list[Check]] = {}
    for check in verification.checks:
        groups.setdefault(_without_batch(check.name), []).append(check)
    for name, checks in groups.items():
        if name.endswith(_TOLD):
            yield _worst(name, checks)


def _without_batch(name: str) -> str:
    what, colon, figure = name.partition(":")
    return f"{what.partition(', batch')[0].partition(' of ')[0]}{colon}{figure}" if what.startswith(("engine", "alone")) else name


def _worst(name: str, checks: Iterable[Check]) -> str:
    at_least = name.startswith("sees") or name.endswith(("agreement", "codes", "neighbouring boxes"))
    worst = min(checks, key=lambda check: check.value) if at_least else max(checks, key=lambda check: check.value)
    verdict = "" if worst.passed else " (off)" if not worst.required else " FAILED"
    return f"{name} {worst.value:.3g} ({'at least' if at_least else 'at most'} {worst.limit:g}){verdict}"
