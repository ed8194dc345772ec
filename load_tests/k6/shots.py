"""What is sent: the requests of a scenario, each with the answer that it must get."""

import base64
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2

from load_tests.images import PHOTOS

Form = Literal["raw", "multipart", "json"]

SIZES = tuple(photo.file for photo in PHOTOS.values())
MEDIA_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}
BOUNDARY = "k6-boundary-7f3c1d"
TOO_WIDE = 60_000  # pixels; as a square far above any sensible limit, and 60 bytes of file


@dataclass(frozen=True)
class Shot:
    """One request, a POST of `body` to `url`, and the answer it must get: `status` and, for an error, its problem `code`."""

    name: str
    url: str
    body: bytes
    content_type: str
    status: int = 200
    code: str | None = None


def shot(url: str, image: Path, form: Form = "raw", field: str = "image") -> Shot:
    """The good request: `image` as the body itself, as the file `field` of a form, or as {field: {"base64": ...}}."""
    data = image.read_bytes()
    media_type = MEDIA_TYPES.get(image.suffix.lower(), "application/octet-stream")
    if form == "multipart":
        return Shot(image.name, url, multipart(data, field, image.name), f"multipart/form-data; boundary={BOUNDARY}")
    if form == "json":
        document = {field: {"base64": base64.b64encode(data).decode()}}
        return Shot(image.name, url, json.dumps(document).encode(), "application/json")
    return Shot(image.name, url, data, media_type)


def faults(url: str, image: Path) -> list[Shot]:
    """Requests to a Vitrine route that it must refuse, one per kind of fault, made of the JPEG `image`."""
    data = image.read_bytes()
    form = f"multipart/form-data; boundary={BOUNDARY}"
    unknown = str(httpx2.URL(url).copy_set_param("model", "no-such-model"))
    return [
        Shot("truncated JPEG", url, data[: len(data) // 2], "image/jpeg", 422, "undecodable_image"),
        Shot(
            "text file", url, b"This is not an image, however long one looks at it.\n" * 8, "text/plain", 415, "unsupported_media"
        ),
        Shot("empty body", url, b"", "image/jpeg", 400, "malformed_request"),
        Shot("unknown model", unknown, data, "image/jpeg", 404, "model_not_found"),
        Shot("too many pixels", url, png_header(TOO_WIDE, TOO_WIDE), "image/png", 413, "too_large"),
        Shot("wrong form field", url, multipart(data, "picture", image.name), form, 400, "malformed_request"),
        Shot("unfinished form", url, multipart(data, "image", image.name)[:-32], form, 400, "malformed_request"),
    ]


def multipart(data: bytes, field: str, filename: str) -> bytes:
    """A form of one file, with BOUNDARY."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{filename}"\r\n\r\n'
    return head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()


def png_header(width: int, height: int) -> bytes:
    """The beginning of a grey PNG of that size, and its end: no pixels, since none should be read."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)) for kind, content in chunks
    )
