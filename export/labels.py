"""The names of the classes: from the user's file, or from the library that knows them."""

from pathlib import Path

from export.spec import ExportError, ExportRequest


def choose_labels(file: Path | None, known: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """The lines of `file`, else what the library knows; none when neither has `num_classes` of them.

    Raises:
        ExportError: the file cannot be read, has an empty or repeated line, or another number of lines than the network has
            classes.
    """
    if file is None:
        return known if len(known) == num_classes else ()
    labels = read_labels(file)
    if len(labels) != num_classes:
        raise ExportError(f"{file} has {len(labels)} labels, but the network has {num_classes} classes.")
    return labels


def read_labels(file: Path) -> tuple[str, ...]:
    """One label per line, UTF-8; blank lines at the end do not count."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"The labels {file} cannot be read: {error}.") from error
    labels = tuple(line.strip() for line in text.rstrip().splitlines())
    for number, label in enumerate(labels, start=1):
        if not label or label in labels[: number - 1]:
            raise ExportError(
                f"Line {number} of {file} {f'repeats {label!r}' if label else 'is empty'}; every class needs a label."
            )
    return labels


def refuse_classes(request: ExportRequest, why: str) -> None:
    """Raise ExportError where options of classifiers are given for another task; `why` begins its sentence."""
    classifying = {"--num-classes": request.num_classes, "--labels": request.labels, "--activation": request.activation}
    given = [flag for flag, value in classifying.items() if value is not None]
    if given:
        raise ExportError(f"{why}; leave {', '.join(given)} out.")
