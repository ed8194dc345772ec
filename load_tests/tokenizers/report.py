"""What a run leaves in `load_tests/results/`: table, figures and picture, named like those of the other runs."""

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load_tests.evaluate import Verdict
from load_tests.report import describe, files_of, interval, word
from load_tests.tokenizers.records import ENGINES, Peak, Record, median, models, rows, verdicts
from load_tests.tokenizers.ways import WAYS, Tokenizer, Way

NAMES = {"http": "vitrine over HTTP, 8 clients", "floor": "floor, in process", "torch": "torch, forward alone"}
COLOURS = {"http": "#1f6f54", "floor": "#9aa0a6", "torch": "#d8b26a"}


def about(tokenizers: Sequence[Tokenizer], options: str) -> dict[str, Any]:
    """The machine, the versions and the models; no path of this machine."""
    found = {name: value for name, value in describe().items() if name not in ("peers", "seeds")}
    found["libraries"] |= {"torch": importlib.metadata.version("torch")}
    found["command"] = f"python -m load_tests.tokenizers {' '.join(each.name for each in tokenizers)} {options}".strip()
    found["models"] = {each.name: _describe(each) for each in tokenizers}
    return found


def write(records: Sequence[Record], peaks: Sequence[Peak], described: dict[str, Any], directory: Path) -> list[Path]:
    """Three files; an earlier run's of the same day are replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    files = files_of("tokenizers", described, directory)
    targets = verdicts(records)
    files[0].write_text(markdown(records, peaks, targets, described))
    content = {
        "about": described,
        "targets": [asdict(each) for each in targets],
        "cells": [asdict(each) for each in records],
        "memory": [asdict(each) for each in peaks],
    }
    files[1].write_text(json.dumps(content, indent=1) + "\n")
    plot(records, described, files[2])
    return files


def markdown(records: Sequence[Record], peaks: Sequence[Peak], targets: Sequence[Verdict], described: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in described["libraries"].items())
    rounds = len({record.round for record in records})
    lines = [
        f"# Tokenizers, {described['date'][:10]}: {described['processor']}, {described['cores']} cores",
        "",
        f"`{described['command']}`, {rounds} round{'s' * (rounds > 1)}.",
        f"{described['system']}, Python {described['python']}, Vitrine {described['vitrine']}, {libraries}.",
        "Medians over the rounds; in brackets the 95 % interval of the bootstrap. Detokenizing to JPEG is the headline: a PNG of",
        "the same pixels costs more to encode. Torch computes the forward pass alone.",
        "",
        *(f"- {name}: {text}" for name, text in described["models"].items()),
        "",
        "## Targets",
        "",
        "| work | target | measured | |",
        "| --- | --- | --- | --- |",
        *(f"| {each.work} | {each.goal} | {interval(each.estimate)} | {word(each)} |" for each in targets),
    ]
    for model, way in _panels(records):
        lines += ["", f"## {model}, {way}", "", "| engine | images/s | p50 ms | p99 ms | processor ms per image | setting |"]
        lines += ["| --- | --: | --: | --: | --: | --- |", *_table(records, model, way)]
    lines += [
        "",
        "## Memory",
        "",
        "Resident memory once loaded, and how much more it was at the peak of 1 and of 8 images at a time.",
    ]
    lines += [
        "Over HTTP 8 images are one request, and the pixels come back as `.npy`. The gateway computes its largest batch once when"
    ]
    lines += ["it loads an engine that is fast enough, so that much of its peak is there already.", ""]
    lines += ["| model | engine | loaded MB | 1 image | 8 images |", "| --- | --- | --: | --: | --: |", *map(_peak, peaks)]
    everything: list[Record | Peak] = [*records, *peaks]
    failed = dict.fromkeys(_failure(each) for each in everything if each.failure)
    return "\n".join([*lines, *(["", "## Without a figure", "", *failed] if failed else [])]) + "\n"


def plot(records: Sequence[Record], described: dict[str, Any], file: Path) -> None:
    """Images per second as horizontal bars, a panel per model and way."""
    import matplotlib as mpl  # noqa: PLC0415 -- only a report needs it

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    panels = list(_panels(records))
    figure, axes = pyplot.subplots(
        max(1, len(panels)), 1, figsize=(9, 1.3 * len(panels) + 0.8), squeeze=False, layout="constrained"
    )
    for (model, way), axis in zip(panels, axes[:, 0], strict=False):
        measured = {engine: found for engine in reversed(ENGINES) if (found := rows(records, model, way, engine))}
        rates = {engine: median(found, lambda record: record.rate) for engine, found in measured.items()}
        errors = [[each.value - each.low for each in rates.values()], [each.high - each.value for each in rates.values()]]
        axis.barh(
            [NAMES[engine] for engine in rates],
            [each.value for each in rates.values()],
            xerr=errors, color=[COLOURS[engine] for engine in rates], ecolor="#444444", capsize=2,
        )  # fmt: skip
        for position, each in enumerate(rates.values()):
            text = f"{each.value:.0f}" if each.value >= 20 else f"{each.value:.2f}"
            axis.annotate(text, (each.high, position), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_title(f"{model}, {way}", loc="left", fontsize=10)
        axis.set_xlim(0, 1.15 * max((each.high for each in rates.values()), default=1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    text = f"images per second; {described['processor']}, {described['cores']} cores, {described['date'][:10]}"
    axes[-1, 0].set_xlabel(text, fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _describe(model: Tokenizer) -> str:
    manifest, codebook = model.tokenize.manifest, model.codebook
    frame = f"{manifest.preprocessing.height} x {manifest.preprocessing.width}"
    grid = f"{codebook.count} x {codebook.grid[0]} x {codebook.grid[1]} tokens of {codebook.size} codes"
    return f"{frame}, {grid}, {manifest.source.architecture}, {manifest.source.weights} weights, {manifest.precision}"


def _panels(records: Sequence[Record]) -> Iterator[tuple[str, Way]]:
    for model in models(records):
        for way in WAYS:
            if any(rows(records, model, way, engine) for engine in ENGINES):
                yield model, way


def _table(records: Sequence[Record], model: str, way: Way) -> Iterator[str]:
    for engine in ENGINES:
        if found := rows(records, model, way, engine):
            middle = [median(found, figure).value for figure in (lambda r: r.p50, lambda r: r.p99, lambda r: 1000 * r.cpu)]
            figures = " | ".join(f"{value:.2f}" if value else "" for value in middle)
            yield f"| {NAMES[engine]} | {interval(median(found, lambda r: r.rate))} | {figures} | {found[-1].setting} |"


def _peak(each: Peak) -> str:
    figures = " | ".join((f"{each.loaded / 2**20:.0f}", f"+{each.above_1 / 2**20:.0f}", f"+{each.above_8 / 2**20:.0f}"))
    return f"| {each.model}, {each.role} | {NAMES[each.engine]} | {'' if each.failure else figures} |"


def _failure(each: Record | Peak) -> str:
    return f"- {each.model}, {each.way if isinstance(each, Record) else each.role}, {each.engine}: {each.failure.splitlines()[0]}"
