"""Stages `read` and `parse`: the body of a request becomes encoded images and fields.

Three forms: the image itself, multipart/form-data (`image`, repeated for a batch), or JSON. Bytes that are an image are an image,
whatever the Content-Type says: `curl --data-binary @photo.jpg` calls it a form.
"""

import asyncio
import base64
import binascii
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from app.admission import EXPIRED, Admission, Ticket
from app.api.departure import cancelled_by_departure
from app.errors import (
    DeadlineError,
    InputError,
    MalformedRequestError,
    SlowUploadError,
    TooLargeError,
    UnsupportedMediaError,
)

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a broken form must not write to the log

MAX_VALUES = 500_000  # in one JSON document, by its commas and brackets: 32 MB of empty lists would be a gigabyte of objects
MAX_FIELDS = 2064  # parts of a form that are no images: 2,048 texts, each of which is a part, and some options
PARSED_ON_THE_LOOP = 256 * 1024  # bytes; larger bodies are taken to pieces on a thread
PARTS_ON_THE_LOOP = 64  # and forms of more parts
FORM = "multipart/form-data"
IMAGE_FIELDS = frozenset({"image", "images", "file"})


@dataclass(frozen=True)
class ImageUrl:
    """An image that is still to be fetched."""

    url: str


@dataclass(frozen=True)
class SentTokens:
    """Token grids as they came: integers in an array of any shape. `codebook` and `size` where the form of the body says them."""

    tokens: NDArray[Any]
    media_type: str
    codebook: str | None = None
    size: int | None = None


@dataclass
class Parsed:
    """What a request asks for: encoded images in order or token grids, its other fields, and the media type of a raw body."""

    images: list[bytes | ImageUrl | InputError] = field(default_factory=list)
    tokens: SentTokens | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    declared: str | None = None


async def read_body(request: Request, ticket: Ticket, admission: Admission, limit: int) -> bytes:
    """The whole body. While it comes, the request leaves its place to others.

    Raises:
        TooLargeError: more than `limit` bytes, announced or sent.
        SlowUploadError: it comes more slowly than the admission's pace.
        DeadlineError: the ticket's time ran out before everything had arrived.
        CapacityError: the bodies in flight fill the memory set aside for them, or as many requests wait for a place as there are.
        UnsupportedMediaError: the body is compressed.
        MalformedRequestError: the client left before it had sent everything.
    """
    if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
        raise UnsupportedMediaError(f"Send the body without Content-Encoding ({encoding}); images are compressed already.")
    said = request.headers.get("content-length", "")
    announced = int(said) if said.isdecimal() else 0
    _check_size(announced, limit)
    chunks: list[bytes] = []
    size = 0
    started = asyncio.get_running_loop().time()
    left, pace = ticket.remaining, admission.pace
    admission.leave_place(ticket)
    try:
        async with asyncio.timeout_at(started + min(left, pace.due(0))) as timeout:
            async for chunk in request.stream():
                size += len(chunk)
                _check_size(size, limit)
                admission.take_bytes(ticket, len(chunk))
                chunks.append(chunk)
                if size != announced:
                    timeout.reschedule(started + min(left, pace.due(size)))
    except ClientDisconnect as error:
        raise MalformedRequestError("The connection closed before the whole body had arrived.") from error
    except TimeoutError as error:
        if left <= pace.due(size):
            raise DeadlineError(EXPIRED) from error
        raise SlowUploadError(
            f"{size} bytes of the body had come within {pace.due(size):.0f} s; after {pace.grace:g} s this server wants "
            f"{pace.rate:g} bytes per second."
        ) from error
    if admission.full:
        with cancelled_by_departure(request, ticket):
            await admission.await_place(ticket)
    else:
        admission.take_place(ticket)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise TooLargeError(f"The body has {size} bytes or more; this server takes {limit}.")


def parse_body(body: bytes, content_type: str, max_images: int, *, needs_image: bool = True) -> Parsed:
    """Tell the three forms apart and take them to pieces.

    Raises:
        TooLargeError: more than `max_images` images.
        MalformedRequestError: no image, broken multipart or JSON, fields of the wrong type.
    """
    kind, options = parse_options_header(content_type)
    declared = kind.decode("latin-1")
    if not body and not needs_image:
        return Parsed()
    if not body:
        raise MalformedRequestError("The body is empty; send an image as the body, as the form field `image`, or as JSON.")
    if declared == FORM:
        parsed = _parse_multipart(body, options, max_images)
    elif looks_like_json(body, declared):
        parsed = _parse_json(body, max_images, needs_image)
    else:
        return Parsed(images=[body], declared=declared)
    if not parsed.images and needs_image:
        raise MalformedRequestError("There is no image in the request; send at least one, in the field `image`.", field="image")
    return parsed


def is_heavy(body: bytes) -> bool:
    """Whether a body that is to be taken to pieces would keep the event loop for long."""
    return len(body) > PARSED_ON_THE_LOOP or body.count(b"\r\n\r\n") > PARTS_ON_THE_LOOP


def is_image(body: bytes, content_type: str) -> bool:
    """Whether the body is one image as it is, so that there is nothing to take to pieces."""
    declared = content_type.partition(";")[0].strip().lower()
    return declared != FORM and not looks_like_json(body, declared)


def looks_like_json(body: bytes, declared: str) -> bool:
    """An object is JSON under any name, other text only where it is called so; no image begins with 64 printable characters."""
    head = body[:64]
    printable = all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head)
    return head.lstrip()[:1] == b"{" or (declared == "application/json" and printable)


class _Parts:
    """Collects the parts of a multipart body from the parser's callbacks."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.parts: list[tuple[dict[bytes, bytes], bytearray]] = []
        self.ended = False
        self._name = b""

    def begin(self) -> None:
        if len(self.parts) == self.limit:
            raise TooLargeError(
                f"The form has more than {self.limit} parts; send fewer images and texts in one request.", field="image"
            )
        self.parts.append(({}, bytearray()))

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end].lower()

    def header_value(self, data: bytes, start: int, end: int) -> None:
        headers = self.parts[-1][0]
        headers[self._name] = headers.get(self._name, b"") + data[start:end]

    def header_end(self) -> None:
        self._name = b""

    def data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1][1].extend(memoryview(data)[start:end])

    def end(self) -> None:
        self.ended = True


def _parse_multipart(body: bytes, options: Mapping[bytes, bytes], max_images: int) -> Parsed:
    if not (boundary := options.get(b"boundary")):
        raise MalformedRequestError("multipart/form-data needs a boundary in its Content-Type.")
    collected = _Parts(max_images + MAX_FIELDS)
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": collected.begin,
                "on_header_field": collected.header_name,
                "on_header_value": collected.header_value,
                "on_header_end": collected.header_end,
                "on_part_data": collected.data,
                "on_end": collected.end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedRequestError(f"The multipart body cannot be read: {error}.") from error
    if not collected.ended:
        raise MalformedRequestError("The multipart body ends before its closing boundary.")
    parsed = Parsed()
    for headers, data in collected.parts:
        _, disposition = parse_options_header(headers.get(b"content-disposition", b""))
        name = disposition.get(b"name", b"").decode("utf-8", "replace")
        if name in IMAGE_FIELDS:
            parsed.images.append(bytes(data))
        elif b"filename" in disposition:
            raise MalformedRequestError(f"Files belong in the form field `image`, not {name!r}.", field=name)
        else:
            add_field(parsed.fields, name, data.decode("utf-8", "replace"))
    _check_count(len(parsed.images), max_images)
    return parsed


def add_field(fields: dict[str, Any], name: str, value: str) -> None:
    """A field that comes again becomes a list of its values, in their order."""
    if name not in fields:
        fields[name] = value
    elif isinstance(fields[name], list):
        fields[name].append(value)
    else:
        fields[name] = [fields[name], value]


def _check_count(images: int, limit: int) -> None:
    if images > limit:
        raise TooLargeError(f"{images} images in one request; this server takes {limit}.", field="image")


def read_json(body: bytes, example: str) -> dict[str, Any]:
    """The object that the body is; `example` is one for those who sent something else.

    Raises:
        TooLargeError: more than `MAX_VALUES` values.
        MalformedRequestError: no JSON, or no object.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise TooLargeError(f"The JSON has more than {MAX_VALUES} values; send less in one request.")
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedRequestError(f"The body is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise MalformedRequestError(f"The JSON body must be an object such as {example}.")
    return document


def _parse_json(body: bytes, max_images: int, needs_image: bool) -> Parsed:
    document = read_json(body, '{"image": {"base64": "..."}}')
    single, many = document.pop("image", None), document.pop("images", None)
    if single is None and many is None and not needs_image:
        return Parsed(fields=document)
    if (single is None) == (many is None):
        raise MalformedRequestError("Give either `image` or `images`.", field="image")
    if many is not None and not isinstance(many, list):
        raise MalformedRequestError("`images` must be a list.", field="images")
    values = [single] if many is None else many
    _check_count(len(values), max_images)
    return Parsed(images=[json_image(value) for value in values], fields=document)


def json_image(value: object) -> bytes | ImageUrl | InputError:
    """An image in JSON: {"base64": ...}, {"url": ...}, a data URL or an address. A broken one keeps its place as its error."""
    if isinstance(value, dict) and len(value) == 1 and isinstance(text := next(iter(value.values())), str):
        if "base64" in value:
            return _decode_base64(text)
        if "url" in value:
            value = text
    if isinstance(value, str) and value.startswith("data:"):
        head, comma, data = value.partition(",")
        if not comma or not head.endswith(";base64"):
            return MalformedRequestError("A data URL must look like data:image/jpeg;base64,... .", field="image")
        return _decode_base64(data)
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        return ImageUrl(value)
    return MalformedRequestError('An image is {"base64": "..."}, {"url": "..."} or a data URL.', field="image")


def _decode_base64(text: str) -> bytes | InputError:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return MalformedRequestError("The image is not valid base64 (standard alphabet, padded, no line breaks).", field="image")
