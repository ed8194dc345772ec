"""Requests that are hostile by their form: the bytes that go over the wire, and the statuses that may answer them."""

import base64
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from app import token_format
from tests.factories import make_jpeg

MALFORMED, LARGE, UNKNOWN, WRONG = 400, 413, 415, 422
BOUNDARY = "b0undary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
JSON = "application/json"
IMAGE = make_jpeg(40, 30)
DATA = base64.b64encode(IMAGE).decode()
SURROGATE = "\ud800"  # half of a character, which JSON can escape and UTF-8 cannot hold


@dataclass(frozen=True)
class HostileRequest:
    """`content` as it is written to the socket; `statuses` may answer it, None among them for a connection closed without one."""

    name: str
    content: bytes
    statuses: frozenset[int | None]


def http(path: str, body: bytes, content_type: str = "image/jpeg", **headers: str) -> bytes:
    """A well-formed POST; `x_name="v"` is the header `x-name: v`."""
    lines = {"Host": "fuzz", "Content-Type": content_type, "Content-Length": str(len(body))}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


def multipart(*parts: tuple[str, bytes], boundary: str = BOUNDARY) -> bytes:
    """A form; each part is its headers, without the last line's end, and its content."""
    return b"".join(f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n" for head, content in parts) + (
        f"--{boundary}--\r\n".encode()
    )


def part(name: str, content: bytes, filename: str = "") -> tuple[str, bytes]:
    file = f'; filename="{filename}"' if filename else ""
    return f'Content-Disposition: form-data; name="{name}"{file}', content


def hostile() -> Sequence[HostileRequest]:
    return [
        HostileRequest(name, content, frozenset(statuses))
        for make in (_forms, _documents, _base64, _tokens, _texts, _headers, _lengths, _addresses)
        for name, content, *statuses in make()
    ]


Row = tuple[Any, ...]
"""Name, content, statuses."""


def _forms() -> Iterator[Row]:
    def send(body: bytes, content_type: str = FORM) -> bytes:
        return http("/v1/classify", body, content_type)

    image = part("image", IMAGE, "a.jpg")
    whole = multipart(image)
    yield "form without a boundary", send(whole, "multipart/form-data"), MALFORMED
    yield "form of an empty boundary", send(whole, "multipart/form-data; boundary="), MALFORMED
    yield "form of another boundary", send(whole, "multipart/form-data; boundary=other"), MALFORMED
    yield (
        "form of a boundary of 10,000",
        send(multipart(image, boundary="b" * 10_000), f"multipart/form-data; boundary={'b' * 10_000}"),
        200,
        MALFORMED,
    )
    yield "form of a quoted half boundary", send(whole, 'multipart/form-data; boundary="b0und'), MALFORMED
    yield "flood of boundaries", send(f"--{BOUNDARY}\r\n".encode() * 100_000), MALFORMED, LARGE
    yield "flood of almost boundaries", send(multipart(part("image", b"\r\n--b0undar" * 800_000))), UNKNOWN
    yield "flood of line ends", send(multipart(part("image", b"\r\n" * 4_000_000))), UNKNOWN
    yield "form of 1,000 images", send(multipart(*[image] * 1000)), LARGE
    yield "form of 10,000 empty parts", send(multipart(*[part("a", b"")] * 10_000)), LARGE
    yield "form of 100 fields", send(multipart(image, *[part("top_k", b"1")] * 100)), WRONG
    yield "form of 3,000 fields", send(multipart(image, *[part("top_k", b"1")] * 3000)), LARGE
    yield "part without headers", send(f"--{BOUNDARY}\r\n\r\nx\r\n--{BOUNDARY}--\r\n".encode()), MALFORMED
    yield "part of 10,000 headers", send(multipart(("X-A: b\r\n" * 10_000 + image[0], IMAGE))), 200, MALFORMED
    yield "part with a header of 1 MB", send(multipart((image[0] + "\r\nX-A: " + "b" * 1_000_000, IMAGE))), 200, MALFORMED
    yield "part of a name of 1 MB", send(multipart(part("a" * 1_000_000, b""))), WRONG, MALFORMED
    yield "part of a name that is no UTF-8", send(whole.replace(b'"image"', b'"\xff\xfe"')), MALFORMED, WRONG
    yield "part whose name has line ends", send(multipart(part("a%0d%0aSet-Cookie: b", b""), image)), WRONG
    yield "form in a form", send(multipart((f"{image[0]}\r\nContent-Type: {FORM}", whole))), MALFORMED, UNKNOWN
    yield "form that does not end", send(whole[:-6]), MALFORMED
    yield "form that ends twice", send(whole + whole), 200, MALFORMED
    yield "field that is no UTF-8", send(multipart(image, part("top_k", b"\xff\xfe"))), WRONG
    yield "field that is not a number", send(multipart(image, part("top_k", b"NaN"))), WRONG
    yield "field of 8 MB", send(multipart(image, part("model", b"a" * 8_000_000))), WRONG


def _documents() -> Iterator[Row]:
    def send(body: bytes | str, path: str = "/v1/classify") -> bytes:
        return http(path, body.encode() if isinstance(body, str) else body, JSON)

    def with_image(more: str) -> str:
        return f'{{"image": {{"base64": "{DATA}"}}, {more}}}'

    yield "no document", send(""), MALFORMED
    for name, opening, closing in (("lists", "[", "]"), ("objects", '{"a":', "}")):
        deep = opening * 100_000 + "1" + closing * 100_000
        yield f"100,000 {name} deep", send(deep), MALFORMED
        yield f"an image 100,000 {name} deep", send(f'{{"image": {deep}}}'), MALFORMED
        yield f"an image 900 {name} deep", send(f'{{"image": {opening * 900}1{closing * 900}}}'), MALFORMED
        yield f"a question 900 {name} deep", send(f'{{"messages": {opening * 900}1{closing * 900}}}', "/v1/chat/completions"), WRONG
        yield f"a text 900 {name} deep", send(f'{{"input": {opening * 900}1{closing * 900}}}', "/v1/embeddings"), MALFORMED
    for value in (
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        "1" * 4000,
        "1" * 100_000,
        "1.5",
        "true",
        "null",
        '"\\u0000"',
        "[]",
    ):
        statuses = (200, MALFORMED, WRONG) if value in ("null", "true") else (MALFORMED, WRONG)
        yield f"top_k of {value[:12]}", send(with_image(f'"top_k": {value}')), *statuses
        question = f'{{"messages": [{{"role": "user", "content": "a"}}], "max_tokens": 2, "temperature": {value}}}'
        yield f"temperature of {value[:12]}", send(question, "/v1/chat/completions"), 200, MALFORMED, WRONG
    yield "a text of 400,000 commas", send(json.dumps({"input": "," * 400_000}), "/v1/embeddings"), WRONG
    yield "invalid UTF-8", send(b'{"image": "\xff\xfe"}'), MALFORMED
    yield "UTF-16", send(with_image('"top_k": 1').encode("utf-16")), UNKNOWN, MALFORMED, 200
    yield "a byte order mark", send(b"\xef\xbb\xbf" + with_image('"top_k": 1').encode()), UNKNOWN, MALFORMED
    yield "half a character as a name", send(with_image('"\\ud800": 1')), WRONG
    yield "half a character as a parameter", send('{"messages": [], "\\ud800": 1}', "/v1/chat/completions"), WRONG
    yield (
        "half a character in a message",
        send('{"messages": [{"role": "user", "content": "a", "\\ud800": 1}]}', "/v1/chat/completions"),
        WRONG,
    )
    yield "half a character beside an input", send('{"input": "a", "\\ud800": 1}', "/v1/embeddings"), WRONG
    yield (
        "half a character as a chat model",
        send('{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}', "/v1/chat/completions"),
        404,
        WRONG,
    )
    yield "half a character as a model", send(with_image('"model": "\\ud800"')), 404, WRONG
    yield "half a character as an image", send('{"image": "\\ud800"}'), MALFORMED
    yield "a name of 1 MB", send(with_image(f'"{"a" * 1_000_000}": 1')), WRONG
    yield "a name that comes 100,000 times", send(with_image(", ".join(['"top_k": 1'] * 100_000))), 200
    yield "300,000 names", send(with_image(", ".join(f'"{n}": 1' for n in range(300_000)))), WRONG
    yield "a million images that are null", send(json.dumps({"images": [None] * 1_000_000})), LARGE
    yield "32 images that are null", send(json.dumps({"images": [None] * 32})), WRONG
    yield "10 million lists", send('{"images": [' + ",".join(["[]"] * 10_000_000) + "]}"), LARGE
    yield "an image and images", send(f'{{"image": {{"base64": "{DATA}"}}, "images": []}}'), MALFORMED
    yield "an address", send('{"image": {"url": "http://169.254.169.254/latest/meta-data"}}'), WRONG, MALFORMED, UNKNOWN, 403
    yield "an address of a file", send('{"image": {"url": "file:///etc/passwd"}}'), MALFORMED
    yield "a model outside", send(with_image('"model": "../../etc/passwd"')), 404, WRONG
    yield "a model with a zero", send(with_image('"model": "a\\u0000b"')), 404, WRONG
    yield (
        "150,000 messages",
        send(json.dumps({"messages": [{"role": "user", "content": "a"}] * 150_000}), "/v1/chat/completions"),
        MALFORMED,
        LARGE,
        WRONG,
    )


def _base64() -> Iterator[Row]:
    def send(value: object) -> bytes:
        return http("/v1/classify", json.dumps({"image": value}).encode(), JSON)

    noisy = {
        "line ends": "\n".join(DATA[start : start + 76] for start in range(0, len(DATA), 76)),
        "noise": DATA[:50] + "!#" + DATA[50:],
        "no padding": DATA.rstrip("=") + "A" * (len(DATA) % 4 + 1),
        "the other alphabet": DATA.replace("/", "_").replace("+", "-"),
        "wide letters": DATA[:50] + "Ａ" + DATA[50:],
        "half a character": DATA[:50] + SURROGATE + DATA[50:],
        "a zero": DATA[:50] + "\0" + DATA[50:],
    }
    for name, text in noisy.items():
        yield f"base64 with {name}", send({"base64": text}), MALFORMED
        yield f"data URL with {name}", send(f"data:image/jpeg;base64,{text}"), MALFORMED
    yield "base64 of nothing", send({"base64": ""}), MALFORMED, WRONG
    yield "base64 of 20 MB of zeros", send({"base64": "A" * 28_000_000}), UNKNOWN
    yield "data URL that is none", send("data:,"), MALFORMED
    yield (
        "data URL in a data URL",
        send("data:text/plain;base64," + base64.b64encode(b"data:image/png;base64,AAAA").decode()),
        UNKNOWN,
    )


def _tokens() -> Iterator[Row]:
    def send(body: bytes, content_type: str = token_format.MEDIA_TYPE) -> bytes:
        return http("/v1/detokenize", body, content_type)

    def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\0") -> bytes:
        length = struct.pack("<H" if version == b"\x01\0" else "<I", len(header))
        return send(b"\x93NUMPY" + version + length + header + data, "application/x-npy")

    def document(tokens: str) -> bytes:
        return send(f'{{"tokens": {tokens}}}'.encode(), JSON)

    head = struct.Struct("<4sBBH32sIIHH")
    vast = head.pack(b"VTOK", 1, 4, 1, bytes.fromhex("c0de" * 16), 16, 2**32 - 1, 65_535, 65_535)
    yield "container of 18 billion tokens", send(vast + bytes(4)), WRONG
    yield "container of no bytes but its name", send(b"VTOK"), WRONG
    yield "npy of a header of 60,000 brackets", npy(b"(" * 60_000), WRONG
    yield "npy of a header of 9,000 brackets", npy(b"(" * 9_000), WRONG
    yield "npy of a header that calls", npy(b"{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (4, 4)}"), WRONG
    yield "npy of objects", npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (4, 4)}", b"\x80\x04."), WRONG
    yield "npy of a shape of 2**62", npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (4611686018427387904, 4)}"), WRONG
    yield "npy of a negative shape", npy(b"{'descr': '<i8', 'fortran_order': False, 'shape': (-4, -4)}", bytes(128)), WRONG
    yield "npy of version 2 and 4 GB of header", send(b"\x93NUMPY\x02\0\xff\xff\xff\xff", "application/x-npy"), WRONG
    yield "tokens 200 lists deep", document("[" * 200 + "1" + "]" * 200), WRONG
    yield "400,000 tokens", document(json.dumps([[0] * 400] * 1000)), WRONG
    yield "a million tokens", document(json.dumps([[0] * 1000] * 1000)), LARGE
    yield "200,000 lists", document(json.dumps([[]] * 200_000)), WRONG
    yield "tokens of different lengths", document("[[1, 2], [3]]"), WRONG
    yield "tokens beyond 64 bits", document(json.dumps([[10**30] * 4] * 4)), WRONG
    yield "tokens that are NaN", document("[[NaN, NaN]]"), WRONG


def _texts() -> Iterator[Row]:
    """What a tokenizer of texts has to read, or must not."""
    texts = {
        "half a character": ("\\ud800", (MALFORMED, WRONG)),
        "a zero": ("\\u0000", (200, WRONG)),
        "10,000 marks on one letter": ("a" + "\\u0301" * 10_000, (200, WRONG, LARGE)),
        "1 MB": ("red " * 250_000, (200, WRONG, LARGE)),
        "a word of 20 MB": ("a" * 20_000_000, (WRONG, LARGE)),
    }
    for name, (text, statuses) in texts.items():
        allowed = (*statuses, MALFORMED)
        yield f"embedding of {name}", http("/v1/embeddings", f'{{"input": "{text}"}}'.encode(), JSON), *allowed
        yield f"text of {name}", http("/v1/embed", f'{{"texts": ["{text}"]}}'.encode(), JSON), *allowed
        image = f'"image": {{"base64": "{DATA}"}}'
        yield (
            f"label of {name}",
            http("/v1/classify?model=colour-clip", f'{{{image}, "labels": ["{text}", "b"]}}'.encode(), JSON),
            *allowed,
        )
        yield f"phrase of {name}", http("/v1/ground", f'{{{image}, "phrase": "{text}"}}'.encode(), JSON), *allowed
        question = f'{{"messages": [{{"role": "user", "content": "{text}"}}], "max_tokens": 2}}'
        yield f"question of {name}", http("/v1/chat/completions", question.encode(), JSON), *allowed
    yield "100,000 texts", http("/v1/embeddings", json.dumps({"input": ["a"] * 100_000}).encode(), JSON), LARGE, WRONG
    yield "texts that are numbers", http("/v1/embeddings", b'{"input": [1, 2]}', JSON), MALFORMED
    yield "an image of half a character", http("/v1/embeddings", b'{"input": [{"image": "\\ud800"}]}', JSON), MALFORMED


def _headers() -> Iterator[Row]:
    def send(**headers: str) -> bytes:
        return http("/v1/classify", IMAGE, **headers)

    for encoding in ("gzip", "br", "deflate", "zstd", "identity, gzip", "x"):
        yield f"body in {encoding}", send(Content_Encoding=encoding), UNKNOWN
    for content_type in (
        "text/html",
        "application/json",
        "image/png",
        "",
        ";",
        "a" * 10_000,
        "multipart/form-data; " + "a=b; " * 5000,
        "\xff",
    ):
        yield f"image called {content_type[:20]!r}", send(Content_Type=content_type), 200, MALFORMED
    for timeout in ("NaN", "inf", "-1", "0", "1e999", "", "1_0", "\xb2", "0x10"):
        yield f"timeout of {timeout!r}", send(X_Request_Timeout=timeout), WRONG, 200
    for accept in ("image/png", "a" * 10_000, ",".join(["a/b;q=0.1"] * 5000), ";q=NaN", "*/*;q=1e999", "\xff"):
        yield f"answer as {accept[:20]!r}", send(Accept=accept), 200, 406, MALFORMED
    yield "header of 200 KB", send(X_A="b" * 200_000), 200, MALFORMED, 431, None
    yield "header of 8 MB", send(X_A="b" * 8_000_000), 431
    yield "headers of 8 MB", http("/v1/classify", IMAGE, **{f"X_{n}": "a" * 8000 for n in range(1000)}), 431
    yield "5,000 headers", http("/v1/classify", IMAGE, **{f"X_{n}": "a" for n in range(5000)}), 200, MALFORMED, 431
    yield "a zero in a header", send(X_A="a\0b"), MALFORMED
    yield "a line end in a header", send(X_A="a\rb"), MALFORMED
    yield "an id that is a script", send(X_Request_ID="<script>" * 100), 200
    yield "expects something else", send(Expect="the-unexpected"), 200, 417
    yield (
        "wants to speak otherwise",
        send(Connection="Upgrade, HTTP2-Settings", Upgrade="h2c", HTTP2_Settings="AAMAAABkAAQAAP"),
        200,
        MALFORMED,
    )
    yield "trace of nonsense", send(Traceparent="00-" + "f" * 10_000), 200
    yield "host of nonsense", send(Host="]["), 200, MALFORMED
    yield "key of 8 KB", send(Authorization="Bearer " + "k" * 8000), 200, 401


def _lengths() -> Iterator[Row]:
    head = b"POST /v1/classify HTTP/1.1\r\nHost: fuzz\r\nContent-Type: image/jpeg\r\n"

    def chunked(*chunks: bytes) -> bytes:
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks)

    def chunk(data: bytes, extension: bytes = b"") -> bytes:
        return b"%x%s\r\n%s\r\n" % (len(data), extension, data)

    last = b"0\r\n\r\n"
    yield "chunks", chunked(chunk(IMAGE), last), 200
    yield "chunks of a byte", chunked(*(chunk(IMAGE[n : n + 1]) for n in range(len(IMAGE))), last), 200
    yield "chunks with extensions of 8 KB", chunked(chunk(IMAGE, b";a=" + b"b" * 8000), last), 200, MALFORMED
    yield "chunk of a negative size", chunked(b"-1\r\n", IMAGE), MALFORMED
    yield "chunk of 2**64", chunked(b"1" + b"0" * 16 + b"\r\n", IMAGE), MALFORMED
    yield "chunk of no number", chunked(b"zz\r\n", IMAGE), MALFORMED
    yield "chunks longer than they say", chunked(b"5\r\n", IMAGE), MALFORMED
    yield (
        "chunks and a length",
        head + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(IMAGE) + last,
        200,
        MALFORMED,
    )
    yield "chunks under another name", head + b"Transfer-Encoding: xchunked\r\n\r\n" + chunk(IMAGE) + last, MALFORMED, 501
    yield "no length", head + b"\r\n", MALFORMED
    for length in (b"-1", b"abc", b"1e3", b"+5", b"0x10", b"9" * 40, b"5, 6", b""):
        yield f"length of {length.decode()!r}", head + b"Content-Length: " + length + b"\r\n\r\n" + IMAGE, MALFORMED, LARGE
    yield "two lengths", head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + IMAGE, MALFORMED
    yield "length of 10 GB", head + b"Content-Length: 10000000000\r\n\r\n" + IMAGE, LARGE
    yield "length beyond the limit", head + b"Content-Length: 33554433\r\n\r\n" + IMAGE, LARGE
    yield "40 MB in chunks", chunked(*[chunk(bytes(1_000_000))] * 40, last), LARGE
    yield "two requests in one", http("/v1/classify", b"") + http("/v1/classify", IMAGE), MALFORMED
    yield "no HTTP", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(500), MALFORMED
    yield "HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", MALFORMED
    yield "HTTP/9.9", b"POST /v1/classify HTTP/9.9\r\nHost: fuzz\r\n\r\n", MALFORMED, 505
    yield "HTTP/1.0", b"POST /v1/classify HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE, 200


def _addresses() -> Iterator[Row]:
    def send(path: str, method: str = "POST") -> bytes:
        return http(path, IMAGE).replace(b"POST", method.encode(), 1)

    for value in ("NaN", "1e999", "-1", "0", "1.5", "%00", "%ff", "%ED%A0%80", "٣", "1" * 5000, ""):
        quoted = "".join(f"%{byte:02x}" for byte in value.encode()) if not value.isascii() else value
        yield f"top_k={value[:12]}", send(f"/v1/classify?top_k={quoted}"), WRONG
    for name in (
        "../../etc/passwd",
        "%2e%2e%2f%2e%2e",
        "%ED%A0%80",
        "%00",
        "colours@-1",
        "colours@99999999999999999999",
        "colours@%D9%A3",
        "a" * 300,
    ):
        yield f"model={name[:30]}", send(f"/v1/classify?model={name}"), 404, WRONG
        yield f"the manifest of {name[:30]}", send(f"/v1/models/{name}", "GET"), 404
    yield "an address of 100 KB", send("/v1/classify?top_k=" + "1" * 100_000), MALFORMED, WRONG, 414, 431
    yield "10,000 parameters", send("/v1/classify?" + "a=b&" * 10_000), MALFORMED, WRONG, 414
    yield "an address of another host", send("http://169.254.169.254/v1/classify"), 200, MALFORMED, 404
    yield "an address without a slash", send("v1/classify"), MALFORMED, 404, 200
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        yield f"{method} on a POST", send("/v1/classify", method), 405
    yield "a method that is none", send("/v1/classify", "FUZZ"), MALFORMED, 405
    yield "CONNECT", send("169.254.169.254:80", "CONNECT"), MALFORMED, 404, 405


def documents() -> dict[str, tuple[str, dict[str, Any]]]:
    """Good JSON bodies by the name of what they ask: the path, and the document."""
    image = {"base64": DATA}
    return {
        "classify": ("/v1/classify", {"image": image, "top_k": 3}),
        "labels": ("/v1/classify", {"image": image, "model": "colour-clip", "labels": ["red", "green"], "template": "a {}"}),
        "detect": ("/v1/detect", {"images": [image], "threshold": 0.5, "max_detections": 3, "classes": ["a"], "render": False}),
        "ground": ("/v1/ground", {"image": f"data:image/jpeg;base64,{DATA}", "phrase": ["the red one", "a cat"]}),
        "tokenize": ("/v1/tokenize", {"image": image, "psnr": True}),
        "detokenize": ("/v1/detokenize", {"tokens": [[0, 1, 2, 3]] * 4, "quality": 90}),
        "reconstruct": ("/v1/reconstruct", {"image": image, "quality": 80}),
        "embed": ("/v1/embed", {"texts": ["red", "a green"]}),
        "similarity": ("/v1/similarity", {"images": [image], "texts": ["red", "blue"]}),
        "embeddings": (
            "/v1/embeddings",
            {"input": ["red", {"image": f"data:image/jpeg;base64,{DATA}"}], "encoding_format": "base64"},
        ),
        "chat": (
            "/v1/chat/completions",
            {
                "model": "counter",
                "messages": [
                    {"role": "system", "content": "be short"},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "what?"},
                            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{DATA}"}},
                        ],
                    },
                ],
                "max_tokens": 4,
                "temperature": 0.5,
                "top_p": 0.9,
                "seed": 1,
                "stop": ["z"],
                "stream": False,
            },
        ),
    }
