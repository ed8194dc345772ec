"""What a run leaves in `load_tests/results`: a table and all figures, named like those of the other runs."""

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from load_tests.chat.answers import BARE, HTTP, LOOP, TRANSFORMERS, Record, rows, verdicts
from load_tests.chat.models import LARGE, TINY, Chat
from load_tests.evaluate import estimate
from load_tests.report import describe, files_of, interval, word

NAMES = {
    HTTP: "vitrine over HTTP, streaming",
    TRANSFORMERS: "transformers' `generate`",
    LOOP: "vitrine's loop, in process",
    BARE: "session calls alone, in process",
}


def about(command: str) -> dict[str, Any]:
    """The machine, the versions and the models."""
    found = {name: value for name, value in describe().items() if name not in ("peers", "seeds")}
    found["libraries"] |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    found["command"] = command
    found["models"] = {model.name: _describe(model) for model in (LARGE, TINY)}
    return found


def write(records: Sequence[Record], described: dict[str, Any], directory: Path) -> list[Path]:
    """Two files; an earlier run's of the same day are replaced."""
    directory.mkdir(parents=True, exist_ok=True)
    table, figures, _ = files_of("chat", described, directory)
    table.write_text(markdown(records, described))
    targets = [asdict(each) for each in verdicts(records)]
    content = {"about": described, "targets": targets, "rounds": [asdict(each) for each in records]}
    figures.write_text(json.dumps(content, indent=1) + "\n")
    return [table, figures]


def markdown(records: Sequence[Record], described: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in described["libraries"].items())
    lines = [
        f"# Chat, {described['date'][:10]}: {described['processor']}, {described['cores']} cores",
        "",
        f"`{described['command']}`.",
        f"{described['system']}, Python {described['python']}, Vitrine {described['vitrine']}, {libraries}.",
        "Medians over the rounds; in brackets the 95 % interval of the bootstrap. Tokens a second are those behind the first.",
        "",
        *(f"- {name}: {text}" for name, text in described["models"].items()),
        "",
        "| work | target | measured | |",
        "| --- | --- | --- | --- |",
        *(f"| {each.work} | {each.goal} | {interval(each.estimate)} | {word(each)} |" for each in verdicts(records)),
        "",
        "| model | | first token, ms | tokens/s |",
        "| --- | --- | --: | --: |",
        *_table(records),
    ]
    return "\n".join(lines) + "\n"


def _table(records: Sequence[Record]) -> Iterator[str]:
    for model in (LARGE.name, TINY.name):
        for way, name in NAMES.items():
            if found := rows(records, model, way):
                figures = (interval(estimate(values), 1) for values in ([r.first for r in found], [r.rate for r in found]))
                yield f"| {model} | {name} | {' | '.join(figures)} |"


def _describe(model: Chat) -> str:
    """As its manifests say it."""
    entry = model.entry
    parts = {role: entry.path.parent.parent / f"{model.name}.{role}" / "1" for role in ("vision", "embed", "decoder")}
    counts = {role: json.loads((path / "manifest.json").read_bytes())["parameters"] for role, path in parts.items()}
    sizes = ", ".join(f"{role} {count / 1e6:.1f} M" for role, count in counts.items())
    return f"{sum(counts.values()) / 1e6:.0f} M parameters ({sizes}), random weights, float32"
