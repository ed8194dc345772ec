"""The command line: `vitrine serve | key | models | classify | embed | detect | ground | tokenize | detokenize | triton`.

What a command needs is imported only when that command runs.
"""

import glob
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from app import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from app.client import Classification, Client, ClientError, DetectItem, ModelInfo, Picture
    from app.settings import Settings
    from app.token_files import Failure

PHOTO_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif"))
ADDRESS = "http://127.0.0.1:8000"
PIPE_WIDTH = 200
CHECKOUT_PHOTO = Path("docs/photos/espresso.jpg")

app = typer.Typer(help="Serve vision models and ask them.", add_completion=False, pretty_exceptions_enable=False)

Repository = Annotated[Path | None, typer.Option(help="The model repository.", show_default="model_repository")]
Url = Annotated[str, typer.Option(help="The gateway to ask.", envvar="VITRINE_URL")]
Local = Annotated[bool, typer.Option("--local", help="Ask a gateway started for this command alone.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
Port = Annotated[int, typer.Option(min=1, max=65535)]


def main() -> None:
    app()


@app.callback(invoke_without_command=True, no_args_is_help=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"vitrine {__version__}")
        raise typer.Exit


@app.command()
def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to bind; 0.0.0.0 for all.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, show_default="8000")] = None,
    backend: Annotated[str | None, typer.Option(help="onnxruntime, triton or fake.", show_default="onnxruntime")] = None,
    repository: Repository = None,
    triton_url: Annotated[str | None, typer.Option(help="Triton's gRPC endpoint.", show_default="127.0.0.1:8001")] = None,
    default_classify: Annotated[str | None, typer.Option(help="Model that answers when none is named.")] = None,
    default_detect: Annotated[str | None, typer.Option(help="Detector that answers when none is named.")] = None,
    default_ground: Annotated[str | None, typer.Option(help="Grounding model that answers when none is named.")] = None,
    default_tokenizer: Annotated[str | None, typer.Option(help="Tokenizer that answers when none is named.")] = None,
    default_embed: Annotated[str | None, typer.Option(help="Model that embeds when none is named.")] = None,
    default_chat: Annotated[str | None, typer.Option(help="Model that chats when none is named.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that answer.", show_default="1")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.", show_default="text")] = None,
) -> None:
    """Start the gateway. Options win over the VITRINE_ variables of docs/operations.md."""
    settings = _settings(**locals())
    if settings.workers > 1:
        from app.workers import serve as serve_with_several  # noqa: PLC0415

        serve_with_several(settings, ready=lambda: typer.echo(welcome(settings)))
    else:
        from app.main import serve as serve_with_one  # noqa: PLC0415

        serve_with_one(settings, begun=lambda complete: typer.echo(welcome(settings)) if complete else None)


@app.command()
def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; metrics and messages name it so.")],
    *,
    kind: Annotated[str, typer.Option(help="client, monitor (reads /metrics alone) or admin (may everything).")] = "client",
    rate: Annotated[str, typer.Option(help="The requests it may send, as in 100/minute.", show_default="any number")] = "",
) -> None:
    """Make an API key. It is printed once, before the line that a gateway needs to know it by."""
    from app.keys import KINDS, make_key  # noqa: PLC0415

    if (chosen := KINDS.get(kind)) is None:
        _fail(f"A key is one of {', '.join(KINDS)}.", code=2)
    try:
        secret, known = make_key(name, chosen, rate)
    except ValueError:
        _fail("A name has letters, digits and ._- and a rate looks like 100/minute.", code=2)
    typer.echo("For whoever asks, this once:", err=True)
    typer.echo(secret)
    typer.echo("For the gateway, in VITRINE_API_KEYS or a line of VITRINE_API_KEYS_FILE:", err=True)
    typer.echo(str(known))


@app.command()
def models(url: Url = ADDRESS, local: Local = False, repository: Repository = None, as_json: AsJson = False) -> None:
    """List a gateway's models."""
    with _client(url, local, repository) as client:
        found = client.models()
    if as_json:
        _print_json(asdict(model) for model in found)
    else:
        _print_models(found)


@app.command()
def classify(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO...", help="Files, directories or patterns.")],
    *,
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION.", show_default="the gateway's default")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="How many classes to give.", show_default="5")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Classify among these, with a model that compares images with texts.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A sentence with {} for the label; of several the mean counts.", show_default="{}")
    ] = None,
    url: Url = ADDRESS,
    local: Local = False,
    repository: Repository = None,
    as_json: AsJson = False,
) -> None:
    """Classify photos. Exit code 1 when one of them has no answer."""
    files = find_photos(photos)
    failed: list[Path] = []
    named = [label.strip() for label in (labels or "").split(",") if label.strip()]
    with _client(url, local, repository) as client:
        ask = partial(client.classify, model=model, top_k=top_k, labels=named, template=template or ())
        answers = _classify_each(ask, files, failed)
        if as_json:
            _print_json(_as_json(file, answer) for file, answer in answers)
        else:
            _print_answers(list(answers))
    if failed:
        raise typer.Exit(1)


@app.command()
def embed(
    photos: Annotated[list[str] | None, typer.Argument(metavar="PHOTO...", help="Files, directories or patterns.")] = None,
    *,
    text: Annotated[list[str] | None, typer.Option(help="A text to embed; repeat it for several.")] = None,
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION.", show_default="the gateway's default")] = None,
    url: Url = ADDRESS,
    local: Local = False,
    repository: Repository = None,
) -> None:
    """Turn photos and texts into vectors: JSON, one object per line.

    Exit code 1 when one of them has no vector.
    """
    from app.client import PHOTO_FAULTS, ClientError  # noqa: PLC0415

    if not photos and not text:
        _fail("There is nothing to embed; name a photo, or give --text.", code=2)
    failed = False
    with _client(url, local, repository) as client:
        for file in find_photos(photos or ()):
            try:
                answer = client.embed(file, model=model)
            except ClientError as error:
                if error.code not in PHOTO_FAULTS:
                    raise
                failed = True
                _print_json([{"file": str(file), "error": {"code": error.code, "detail": error.detail}}])
                continue
            _print_json(
                [{"file": str(file), "model": f"{answer.model}@{answer.version}", "embedding": answer.results[0].embedding}]
            )
        if text:
            answer = client.embed(texts=text, model=model)
            for given, item in zip(text, answer.results, strict=True):
                failed |= item.error is not None
                found = (
                    {"embedding": item.embedding, "truncated": item.truncated}
                    if item.error is None
                    else {"error": asdict(item.error)}
                )
                _print_json([{"text": given, "model": f"{answer.model}@{answer.version}", **found}])
    if failed:
        raise typer.Exit(1)


@app.command()
def detect(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO...", help="Files, directories or patterns.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Draw what is found to PNG files there.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION.", show_default="the gateway's default")] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="Lowest score to give.", show_default="0.5")] = None,
    classes: Annotated[list[str] | None, typer.Option("--class", help="Give only this class; repeat it for several.")] = None,
    phrases: Annotated[
        list[str] | None, typer.Option("--phrases", metavar="PHRASE", help="What a model without classes looks for; repeat it.")
    ] = None,
    masks: Annotated[bool, typer.Option("--masks", help="Draw, or print, masks of instances too.")] = False,
    url: Url = ADDRESS,
    local: Local = False,
    repository: Repository = None,
    as_json: AsJson = False,
) -> None:
    """Find objects in photos. Exit code 1 when one of them has no answer."""
    from app.client import PHOTO_FAULTS, ClientError  # noqa: PLC0415
    from app.token_files import name_photos  # noqa: PLC0415

    with _token_faults():
        named = name_photos(find_photos(photos))
    targets = {} if output is None else _picture_files(named, output)
    failed = False
    rows: list[tuple[str, str, str, str]] = []
    with _client(url, local, repository) as client:
        for name, file in named.items():
            try:
                answer = client.detect(
                    file,
                    model=model,
                    threshold=threshold,
                    classes=classes or (),
                    phrases=phrases or (),
                    masks=masks,
                    render=name in targets,
                )
            except ClientError as error:
                if error.code not in PHOTO_FAULTS:
                    raise
                failed = True
                typer.echo(f"vitrine: {file}: {error.detail}", err=True)
                continue
            item = answer.results[0]
            if name in targets:
                _write_picture(targets[name], item.rendered)
            if as_json:
                found = [asdict(one) for one in item.detections or ()]
                _print_json([{"file": str(file), "model": f"{answer.model}@{answer.version}", "detections": found}])
            rows += _detection_rows(file, item)
    if not as_json:
        _print_table(("photo", "label", "score", "box"), rows)
    if failed:
        raise typer.Exit(1)


@app.command()
def ground(
    phrase: Annotated[str, typer.Argument(metavar="PHRASE", help="What to look for, as in 'the red circle'.")],
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="Where to look.")],
    *,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.png", help="Draw the box to this file.")] = None,
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION.", show_default="the gateway's default")] = None,
    url: Url = ADDRESS,
    local: Local = False,
    repository: Repository = None,
    as_json: AsJson = False,
) -> None:
    """Find what a phrase speaks of in a photo."""
    if output is not None and output.suffix.lower() != ".png":
        _fail(f"The picture is a PNG; {output} would not say so.", code=2)
    _keep_photos([photo], [output] if output is not None else [])
    with _client(url, local, repository) as client:
        answer = client.ground(photo, phrase, model=model, render=output is not None)
    item = answer.results[0]
    if output is not None:
        _write_picture(output, item.rendered)
    for found in item.groundings or ():
        if found.truncated:
            typer.echo("vitrine: The phrase is too long for the model; its last words were not read.", err=True)
        if as_json:
            _print_json([{"file": str(photo), "model": f"{answer.model}@{answer.version}", **asdict(found)}])
        else:
            score = "" if found.score is None else f"{found.score:.1%}"
            box = "none" if found.box is None else _box(found.box)
            _print_table(("photo", "phrase", "score", "box"), [(str(photo), phrase, score, box)])


@app.command()
def tokenize(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO...", help="Files, directories or patterns.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The tar to write, or to add to.")],
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION.", show_default="the gateway's default")] = None,
    url: Url = ADDRESS,
    local: Local = False,
    repository: Repository = None,
) -> None:
    """Turn photos into tokens: a tar with a token container for each.

    What FILE has already is left out, unless the photo has changed:
    the same command goes on where it was interrupted.
    Exit code 1 when a photo has no tokens. docs/token-format.md has more.
    """
    from app.token_archive import TokenArchive  # noqa: PLC0415
    from app.token_files import missing_photos, name_photos, tokenize_photos  # noqa: PLC0415

    found = find_photos(photos)
    with _token_faults(), TokenArchive(output) as archive:
        missing = missing_photos(archive, name_photos(found))
        with progress(len(missing)) as advance, _client(url, local, repository) as client:
            failures = tokenize_photos(client, missing, archive, model, advance)
    _report(failures, f"{output}: {len(archive)} photos, {len(missing) - len(failures)} of them new")


@app.command()
def detokenize(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A tar of `vitrine tokenize`, or one token container.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The directory for the images.")],
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION.", show_default="the gateway's default")] = None,
    url: Url = ADDRESS,
    local: Local = False,
    repository: Repository = None,
) -> None:
    """Turn tokens into images again: PNG files named like the photos.

    What DIR has already is left as it is, unless FILE is newer:
    the same command goes on where it was interrupted.
    Exit code 1 when an image cannot be made.
    """
    from app.token_files import read_saved, restore_images  # noqa: PLC0415

    with _token_faults():
        saved = read_saved(file)
        with progress(len(saved.records)) as advance, _client(url, local, repository) as client:
            restored = restore_images(client, saved, output, model, advance)
    _report(restored.failures, f"{output}: {restored.written} images written, {restored.kept} were there")


@app.command()
def triton(
    repository: Repository = None,
    http_port: Port = 8003,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    home: Annotated[Path, typer.Option(help="Where `make .triton` built it.")] = Path(".triton"),
) -> None:
    """Start the local Triton of `make .triton` on the repository."""
    from app.local_triton import LocalTritonError, run  # noqa: PLC0415

    try:
        code = run(_settings(repository=repository).repository, http_port, grpc_port, metrics_port, home)
    except LocalTritonError as error:
        _fail(str(error))
    raise typer.Exit(code)


def welcome(settings: "Settings") -> str:
    """What a gateway says when it is ready: where it is, and a line that asks it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    scheme = "http" if settings.tls_certfile is None else "https"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.port}"
    golden = sorted(settings.repository.glob(f"{settings.default_classify}/*/golden/*.[jp][pn]g"))
    photo = next((str(path) for path in (CHECKOUT_PHOTO, *golden) if path.is_file()), "photo.jpg")
    key = ' -H "Authorization: Bearer $VITRINE_API_KEY"' if settings.wants_keys else ""
    return (
        f"Vitrine {__version__} answers on {url} ({settings.backend}, {settings.repository})\n"
        f"  ask it:  curl{key} --data-binary {shlex.quote(f'@{photo}')} {url}/v1/classify\n"
        f"  docs:    {url}/docs"
    )


def find_photos(patterns: Iterable[str]) -> list[Path]:
    """The files that the arguments name: a file itself, the photos below a directory, or what a pattern matches."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(file for file in path.rglob("*") if file.suffix.lower() in PHOTO_SUFFIXES)
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 -- absolute ones too
        if not matches:
            _fail(f"There is no photo at {pattern}.")
        found += matches
    return found


@contextmanager
def _token_faults() -> Iterator[None]:
    """A file of tokens that cannot be used ends the command with a sentence, an interruption with what to do about it."""
    from app.token_archive import TokenArchiveError  # noqa: PLC0415

    try:
        yield
    except TokenArchiveError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("Interrupted. The same command goes on from here.", code=130)


@contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal, and nothing in a pipe or a log; the block is given what moves it on by one."""
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn  # noqa: PLC0415

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = total == 0 or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _report(failures: "Sequence[Failure]", done: str) -> None:
    for failure in failures:
        typer.echo(f"vitrine: {failure.name}: {failure.reason}", err=True)
    typer.echo(f"{done}, {len(failures)} failed." if failures else f"{done}.")
    if failures:
        raise typer.Exit(1)


def _settings(**given: Any) -> "Settings":
    """Settings from the environment and the options that were given; those left out are None."""
    from pydantic import ValidationError  # noqa: PLC0415

    from app.settings import Settings  # noqa: PLC0415

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])).lower()}: {fault['msg']}" for fault in error.errors(include_url=False)]
        _fail(f"Settings that cannot be used: {'; '.join(faults)}.", code=2)


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"vitrine: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def _client(url: str, local: bool, repository: Path | None) -> "Iterator[Client]":
    """A client of the gateway at `url`, or of one that lives as long as this block. Its errors end the command with a sentence."""
    from app.client import Client, ClientError  # noqa: PLC0415

    try:
        if local:
            from app.local_gateway import LocalGatewayError, local_gateway  # noqa: PLC0415

            settings = _settings(repository=repository, preload=False, repository_poll=0)
            try:
                with local_gateway(settings) as address, Client(address) as client:
                    yield client
            except LocalGatewayError as error:
                _fail(str(error))
        else:
            with Client(url, api_key=os.environ.get("VITRINE_API_KEY")) as client:
                yield client
    except ClientError as error:
        hint = " Start a gateway with `vitrine serve`, or add --local." if error.code == "unreachable" else ""
        request = f" (request {error.request_id})" if error.request_id else ""
        _fail(f"{error.detail}{hint}{request}")


def _classify_each(
    ask: "Callable[[Path], Classification]", files: Sequence[Path], failed: list[Path]
) -> "Iterator[tuple[Path, Classification | ClientError]]":
    """One request per photo, in order. An error that concerns the photo is its answer and puts it on `failed`."""
    from app.client import PHOTO_FAULTS, ClientError  # noqa: PLC0415

    for file in files:
        try:
            yield file, ask(file)
        except ClientError as error:
            if error.code not in PHOTO_FAULTS:
                raise
            failed.append(file)
            yield file, error


def _as_json(file: Path, answer: "Classification | ClientError") -> dict[str, Any]:
    if isinstance(answer, Exception):
        return {"file": str(file), "error": {"code": answer.code, "detail": answer.detail}}
    item = asdict(answer.results[0])
    return {
        "file": str(file),
        "model": f"{answer.model}@{answer.version}",
        "predictions": item["predictions"],
        "image": item["image"],
    }


def _print_json(rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False))


def _print_answers(answers: "Sequence[tuple[Path, Classification | ClientError]]") -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table("photo", "label", "score")
    table.columns[2].justify = "right"
    for file, answer in answers:
        if isinstance(answer, Exception):
            table.add_row(str(file), answer.detail, "")
        else:
            table.title = f"{answer.model}@{answer.version}"
            for rank, prediction in enumerate(answer.results[0].predictions or ()):
                table.add_row(
                    "" if rank else str(file), prediction.label, f"{prediction.score:.1%}", style="dim" if rank else "bold"
                )
        table.add_section()
    _console().print(table)


def _detection_rows(file: Path, item: "DetectItem") -> list[tuple[str, str, str, str]]:
    rows = [(found.label, f"{found.score:.1%}", _box(found.box)) for found in item.detections or ()] or [("nothing", "", "")]
    return [("" if number else str(file), *row) for number, row in enumerate(rows)]


def _box(box: Sequence[float]) -> str:
    return " ".join(f"{place:.0f}" for place in box)


def _picture_files(photos: Mapping[str, Path], directory: Path) -> dict[str, Path]:
    """Where the picture of each photo goes: `a/b.jpg` to `a/b.png`, all to `a/b.jpg.png` where that would not be one each."""
    files = {name: (directory / name).with_suffix(".png") for name in photos}
    if len(set(files.values())) < len(files):
        files = {name: directory / f"{name}.png" for name in photos}
    _keep_photos(photos.values(), files.values())
    return files


def _keep_photos(photos: Iterable[Path], targets: Iterable[Path]) -> None:
    originals = {photo.resolve() for photo in photos}
    for target in targets:
        if target.resolve() in originals:
            _fail(f"{target} is one of the photos; draw to another place.", code=2)


def _write_picture(file: Path, picture: "Picture | None") -> None:
    assert picture is not None  # it was asked for
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.data)
    except OSError as error:
        _fail(f"{file} cannot be written: {error.strerror}.")


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _print_models(found: "Sequence[ModelInfo]") -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table("model", "task", "version", "engine", "precision", "status", "problems")
    for model in found:
        name = f"{model.id} (default)" if model.default else model.id
        cells = (model.task, model.version, model.engine, model.precision, model.status)
        table.add_row(name, *("-" if cell is None else str(cell) for cell in cells), "; ".join(model.problems))
    _console().print(table)


def _console() -> "Console":
    """Labels and file names are text, not markup; what goes into a pipe is not cut to a terminal's width."""
    from rich.console import Console  # noqa: PLC0415

    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


if __name__ == "__main__":
    main()
