"""The log on standard error, as text or as JSON, one object per line; records know the request they belong to."""

import logging
from contextvars import ContextVar
from typing import Literal

LogFormat = Literal["text", "json"]

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being handled, also in the tasks it starts; None outside of requests."""

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
TELLTALES = ("httpx2", "httpcore2")
"""Write the address of every request that they send, and what a client asks to be fetched may be signed: never below a warning."""

JSON_NAMES = {"levelname": "level", "name": "logger", "exc_info": "exception", "stack_info": "stack"}


def configure(level: str, log_format: LogFormat) -> None:
    """Send every record of `level` and above, uvicorn's too, to standard error."""
    handler = logging.StreamHandler()
    handler.addFilter(add_request_id)
    handler.setFormatter(json_formatter() if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for name in TELLTALES:
        logging.getLogger(name).setLevel(logging.WARNING)


def add_request_id(record: logging.LogRecord) -> bool:
    """Puts `request_id` on the record, where it was not given; keeps every record."""
    if not hasattr(record, "request_id") and (request_id := REQUEST_ID.get()) is not None:
        record.request_id = request_id
    return True


def json_formatter() -> logging.Formatter:
    """`time` (ISO 8601, UTC), `level`, `logger`, `message`; `request_id` and `exception` where there is one."""
    from pythonjsonlogger.core import RESERVED_ATTRS  # noqa: PLC0415 -- who logs text does not wait for it
    from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415

    return JsonFormatter(
        ["levelname", "name", "message"],
        rename_fields=JSON_NAMES,
        rename_fields_keep_missing=False,
        timestamp="time",
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's second message, with terminal colours
        json_ensure_ascii=False,
    )
