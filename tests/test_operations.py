"""The settings table of docs/operations.md is what app/settings.py says; `make docs` writes it again."""

import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from app.settings import Settings, available_cpus, standard_endpoint

OPERATIONS = Path(__file__).parent.parent / "docs/operations.md"
TABLE = re.compile(r"(?<=<!-- settings: written by `make docs` -->\n).*(?=<!-- end of settings -->)", re.DOTALL)


def settings_table() -> str:
    rows = ["| variable | default | values | what |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        cells = (f"`VITRINE_{name.upper()}`", default(field), values(field), field.description or "")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return {available_cpus: "the CPUs it may use", standard_endpoint: "`OTEL_EXPORTER_OTLP_ENDPOINT`"}[field.default_factory]
    value = field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`" if value not in ("", (), {}, None) else "none"


def values(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    bounds = [bound(each) for each in field.metadata]
    if field.annotation == int | None:  # its bound lies inside
        return "whole number ≥ 1"
    kind = (
        "true, false"
        if field.annotation is bool
        else ""
        if field.annotation in (str, Path, Path | None)
        else getattr(field.annotation, "__name__", "")
    )
    kind = {"int": "whole number", "float": "number", "tuple": "comma list", "dict": "JSON"}.get(kind, kind)
    return " ".join(filter(None, (kind, *bounds)))


def bound(constraint: Any) -> str:
    match constraint:
        case Ge(ge=limit):
            return f"≥ {limit}"
        case Gt(gt=limit):
            return f"> {limit}"
        case Le(le=limit):
            return f"≤ {limit}"
    return ""


def test_the_settings_table_is_current() -> None:
    written = TABLE.search(OPERATIONS.read_text())
    assert written is not None
    assert written[0] == settings_table(), "run `make docs`"


def test_operations_names_no_variable_that_does_not_exist() -> None:
    known = {f"VITRINE_{name.upper()}" for name in Settings.model_fields} | {
        "VITRINE_URL",
        "VITRINE_API_KEY",
        "VITRINE_REQUIRE",
        "VITRINE_",
    }
    assert set(re.findall(r"VITRINE_[A-Z_]*", OPERATIONS.read_text())) <= known


if __name__ == "__main__":
    OPERATIONS.write_text(TABLE.sub(lambda _: settings_table(), OPERATIONS.read_text()))
