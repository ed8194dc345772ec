"""What a run leaves in `load_tests/results/`: the table as Markdown, every figure as JSON, the picture as PNG."""

import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app import __version__
from app.settings import available_cpus
from load_tests.cache import RESULTS, ROOT, cache
from load_tests.cells import FLOOR, Record
from load_tests.evaluate import Estimate, Table, Verdict, estimate, verdicts
from load_tests.models import MODELS

DISTRIBUTIONS = {
    "fastapi_plain": "fastapi",
    "litserve": "litserve",
    "bentoml": "bentoml",
    "ray_serve": "ray",
    "mlserver": "mlserver",
}


def write(records: Sequence[Record], kind: str, output: Path | None = None) -> list[Path]:
    """Three files whose names tell kind, day and machine; an earlier run's of the same day are replaced."""
    directory = output or RESULTS
    directory.mkdir(parents=True, exist_ok=True)
    about = describe()
    targets = verdicts(records)
    files = files_of(kind, about, directory)
    files[0].write_text(markdown(records, targets, about))
    content = {"about": about, "targets": [asdict(each) for each in targets], "cells": [each.as_json() for each in records]}
    files[1].write_text(json.dumps(content, indent=1) + "\n")
    plot(records, about, files[2])
    return files


def files_of(kind: str, about: dict[str, Any], directory: Path) -> list[Path]:
    """Table, figures and picture: kind, day and machine make their name."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{about['processor']} {about['cores']} cores".lower()).strip("-")
    return [directory / f"{kind}-{about['date'][:10]}-{slug}{suffix}" for suffix in (".md", ".json", ".png")]


def describe() -> dict[str, Any]:
    """The machine and the versions of everything that was measured."""
    versions = {name: importlib.metadata.version(name) for name in ("onnxruntime", "pillow", "numpy", "fastapi", "uvicorn")}
    peers = {name: _installed(kind, distribution) for kind, (name, distribution) in _peers().items()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": available_cpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "vitrine": f"{__version__} ({_commit()})",
        "libraries": versions,
        "peers": {name: version for name, version in peers.items() if version},
        "seeds": {model.name: model.seed for model in MODELS.values()},
        "command": " ".join(["python -m load_tests.bench", *sys.argv[1:]]),
    }


def markdown(records: Sequence[Record], targets: Sequence[Verdict], about: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    libraries = ", ".join(f"{name} {version}" for name, version in about["libraries"].items())
    rounds = len({record.round for record in records})
    lines = [
        f"# {about['date'][:10]}: {about['processor']}, {about['cores']} cores",
        "",
        f"`{about['command']}`, {rounds} round{'s' * (rounds > 1)}.",
        f"{about['system']}, Python {about['python']}, Vitrine {about['vitrine']}, {libraries}.",
        f"Peers: {peers}. Medians over the rounds; in brackets the 95 % interval of the bootstrap.",
        "",
        f"The weights are random: {', '.join(f'{name} of seed {seed}' for name, seed in about['seeds'].items())}.",
        "With most seeds the verification forbids MobileNetV3 scaled decoding, because a random network is far more sensitive than",
        "a trained one; the first seed that it allows is taken.",
        "",
        "## Targets",
        "",
        "| work | target | measured | |",
        "| --- | --- | --- | --- |",
        *(f"| {each.work} | {each.goal} | {interval(each.estimate)} | {word(each)} |" for each in targets),
    ]
    for (model, photo, clients), rows in _sections(records).items():
        lines += ["", f"## {model} net, {photo}, {clients} client{'s' * (clients > 1)}", ""]
        lines += ["| server | images/s | p50 ms | p90 ms | p99 ms | processor ms per image | memory MB | setting |"]
        lines += ["| --- | --: | --: | --: | --: | --: | --: | --- |", *(_row(row) for row in rows)]
    failed = [record for record in records if record.failure]
    if failed:
        lines += ["", "## Without a figure", ""]
        lines += [
            f"- {each.cell.server}, {each.cell.model}, {each.cell.photo}, {each.cell.clients}: {_line(each)}" for each in failed
        ]
    return "\n".join(lines) + "\n"


def plot(records: Sequence[Record], about: dict[str, Any], file: Path) -> None:
    """Images per second at 32 clients as horizontal bars, a panel per model and photo."""
    import matplotlib as mpl  # noqa: PLC0415 -- only a report needs it

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    panels = {key: rows for key, rows in _sections(records).items() if key[2] == 32}
    if not panels:
        return
    heights = [len(rows) + 1.2 for rows in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.36 * sum(heights) + 0.8), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for (model, photo, clients), axis in zip(panels, axes[:, 0], strict=True):
        rows = sorted(panels[model, photo, clients], key=lambda row: _median(row, _rate).value)
        rates = [_median(row, _rate) for row in rows]
        names = [row[0].cell.server for row in rows]
        errors = [[each.value - each.low for each in rates], [each.high - each.value for each in rates]]
        axis.barh(
            names, [each.value for each in rates], xerr=errors, color=[_colour(name) for name in names], ecolor="#444444", capsize=2
        )
        for position, each in enumerate(rates):
            text = f"{each.value:.0f}" if each.value >= 20 else f"{each.value:.1f}"
            axis.annotate(text, (each.high, position), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_title(f"{model} net, {photo}, {clients} clients", loc="left", fontsize=10)
        axis.set_xlim(0, 1.12 * max(each.high for each in rates))
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel(f"images per second; {about['processor']}, {about['cores']} cores, {about['date'][:10]}", fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _sections(records: Sequence[Record]) -> dict[tuple[str, str, int], list[list[Record]]]:
    """Records by (model, photo, clients), and there the rounds of each server."""
    sections: dict[tuple[str, str, int], list[list[Record]]] = {}
    for cell, rounds in Table(records).cells.items():
        sections.setdefault((cell.model, cell.photo, cell.clients), []).append([rounds[number] for number in sorted(rounds)])
    return sections


def _row(rounds: list[Record]) -> str:
    def middle(figure: Callable[[Record], float], digits: int, scale: float = 1.0) -> str:
        value = scale * statistics.median(figure(record) for record in rounds)
        return f"{value:.{digits}f}" if value else ""

    latencies = (middle(lambda r: r.p50, 2), middle(lambda r: r.p90, 2), middle(lambda r: r.p99, 2))
    others = (middle(lambda r: r.cpu, 2, 1000), middle(lambda r: r.memory, 0, 2**-20))
    setting = rounds[-1].setting + (f"decoding and resizing {middle(lambda r: r.prepare, 2)} ms" if rounds[-1].prepare else "")
    return f"| {' | '.join((rounds[0].cell.server, interval(_median(rounds, _rate), 1), *latencies, *others, setting))} |"


def _rate(record: Record) -> float:
    return record.rate


def _median(rounds: list[Record], figure: Callable[[Record], float]) -> Estimate:
    return estimate([figure(record) for record in rounds])


def interval(found: Estimate | None, digits: int = 2) -> str:
    """A median and its interval, for a table."""
    return "not measured" if found is None else f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def word(verdict: Verdict) -> str:
    """Whether it was met, for a table."""
    return "" if verdict.met is None else "met" if verdict.met else "**MISSED**"


def _line(record: Record) -> str:
    return record.failure.splitlines()[0]


def _colour(name: str) -> str:
    return "#9aa0a6" if name == FLOOR else "#1f6f54" if name.startswith("vitrine") else "#c9832e" if "'" in name else "#d8b26a"


def _peers() -> dict[str, tuple[str, str]]:
    return {kind: (kind.replace("_plain", "").replace("_", " "), distribution) for kind, distribution in DISTRIBUTIONS.items()}


def _installed(kind: str, distribution: str) -> str:
    places = [str(path) for path in (cache() / "venvs" / kind).glob("lib/python*/site-packages")]
    return next((found.version for found in importlib.metadata.distributions(name=distribution, path=places)), "")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or "no commit"  # noqa: S603
