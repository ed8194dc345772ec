"""The token container: what is packed comes back, what is not exactly that is refused, and a header cannot make it allocate."""

import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.errors import InvalidValueError, MalformedTokensError
from app.token_format import TokenGrids, bits_per_token, pack, read_header, unpack

DOCUMENT = (Path(__file__).parents[2] / "docs/token-format.md").read_text()
CODEBOOK = "00112233445566778899aabbccddeeff" * 2
EXAMPLE = TokenGrids(np.array([[[[0, 1, 2], [499, 998, 999]]]], np.int32), CODEBOOK, 1000)
HEADER = struct.Struct("<4sBBH32sIIHH")
FIELDS = ("magic", "version", "bits", "codebooks", "codebook", "size", "count", "height", "width")
FIELD_LIMITS = {"version": 0xFF, "bits": 0xFF, "codebooks": 0xFFFF, "size": 2**32 - 1, "count": 2**32 - 1} | dict.fromkeys(
    ("height", "width"), 0xFFFF
)
SLACK = 1 << 20  # bytes that reading may take on top of its result

QUICK = settings(max_examples=150, deadline=None, derandomize=True)
LONG = settings(max_examples=4_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def same(one: TokenGrids, other: TokenGrids) -> bool:
    return np.array_equal(one.tokens, other.tokens) and (one.codebook, one.size) == (other.codebook, other.size)


def with_crc(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def changed(container: bytes, **fields: Any) -> bytes:
    """The container with fields of its header replaced and its CRC made right again."""
    values = dict(zip(FIELDS, HEADER.unpack_from(container), strict=True)) | fields
    return with_crc(HEADER.pack(*values.values()) + container[HEADER.size : -4])


@st.composite
def grids(draw: st.DrawFn) -> TokenGrids:
    """Grids of every width, small, with the first and the last token among them."""
    bits = draw(st.integers(1, 24) | st.just(31))
    size = draw(st.integers(max(2, (1 << bits - 1) + 1), 1 << bits))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = random.integers(0, size, shape, dtype=np.int64).astype(np.int32)
    tokens[0, 0, 0, 0], tokens[-1, -1, -1, -1] = 0, size - 1
    return TokenGrids(tokens, random.bytes(32).hex(), size)


@st.composite
def damaged(draw: st.DrawFn) -> tuple[TokenGrids, bytes]:
    """Grids, and their container after one to three accidents; some make the CRC right again, as an attacker would."""
    original = draw(grids())
    container = pack(original)
    other = pack(draw(grids()))
    for _ in range(draw(st.integers(1, 3))):
        accident = draw(st.sampled_from((_flip, _truncate, _extend, _splice, _set_field, _set_token_bits)))
        container = accident(draw, container, other)
    return original, container


def _flip(draw: st.DrawFn, container: bytes, other: bytes) -> bytes:
    if not container:
        return other
    position = draw(st.integers(0, len(container) * 8 - 1))
    mutated = bytearray(container)
    mutated[position // 8] ^= 1 << position % 8
    return bytes(mutated)


def _truncate(draw: st.DrawFn, container: bytes, other: bytes) -> bytes:
    return container[: draw(st.integers(0, len(container)))]


def _extend(draw: st.DrawFn, container: bytes, other: bytes) -> bytes:
    tail = draw(st.binary(min_size=1, max_size=9) | st.just(other))
    return container + tail if draw(st.booleans()) else with_crc(container[:-4] + tail)


def _splice(draw: st.DrawFn, container: bytes, other: bytes) -> bytes:
    cut = draw(st.integers(0, min(len(container), len(other))))
    joined = container[:cut] + other[cut:]
    return joined if draw(st.booleans()) else with_crc(joined[:-4])


def _set_field(draw: st.DrawFn, container: bytes, other: bytes) -> bytes:
    if len(container) < HEADER.size + 4:
        return container
    name = draw(st.sampled_from(list(FIELD_LIMITS)))
    limit = FIELD_LIMITS[name]
    value = min(limit, draw(st.integers(0, 3) | st.integers(0, limit) | st.sampled_from((limit, limit // 2 + 1))))
    container = changed(container, **{name: value})
    return _resize(container) if draw(st.booleans()) else container


def _resize(container: bytes) -> bytes:
    """The tokens made as long as the header says, so that a reader has only the fields themselves to judge by."""
    _, _, bits, codebooks, _, _, count, height, width = HEADER.unpack_from(container)
    length = min(-(-bits * codebooks * count * height * width // 8), 4096)
    return with_crc(container[:-4][: HEADER.size + length].ljust(HEADER.size + length, b"\0"))


def _set_token_bits(draw: st.DrawFn, container: bytes, other: bytes) -> bytes:
    """The last bytes of the tokens all ones: padding that is set, or tokens out of range."""
    return with_crc(container[: max(0, len(container) - 5)] + b"\xff")


def hold_round_trip(original: TokenGrids) -> None:
    container = pack(original)
    again = unpack(container)
    assert same(again, original)
    assert again.tokens.dtype == np.int32
    header = read_header(container)
    assert (header.codebook, header.size, header.shape) == (original.codebook, original.size, original.tokens.shape)
    assert len(container) == 56 + -(-header.count * header.bits // 8)


def hold_damage(case: tuple[TokenGrids, bytes]) -> None:
    """Refused with the declared error, or the one container of what it says: never another exception, never much memory."""
    original, container = case
    tracemalloc.start()
    try:
        read, refused = unpack(container), None
    except MalformedTokensError as error:
        read, refused = None, error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= 32 * len(container) + SLACK
    if read is None:
        assert refused is not None
        assert refused.field
        assert refused.detail.endswith(".")
    else:
        assert pack(read) == container
        assert same(read, original) == (container == pack(original))


@QUICK
@given(grids())
@example(EXAMPLE)
def test_what_is_packed_comes_back(original: TokenGrids) -> None:
    hold_round_trip(original)


@QUICK
@given(damaged())
def test_damage_is_refused(case: tuple[TokenGrids, bytes]) -> None:
    hold_damage(case)


@QUICK
@given(st.binary(max_size=100) | st.binary(max_size=60).map(lambda tail: with_crc(b"VTOK\x01" + tail)))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedTokensError):
        unpack(data)


@pytest.mark.conformance
@LONG
@given(grids())
def test_what_is_packed_comes_back_for_long(original: TokenGrids) -> None:
    hold_round_trip(original)


@pytest.mark.conformance
@LONG
@given(damaged())
def test_damage_is_refused_for_long(case: tuple[TokenGrids, bytes]) -> None:
    hold_damage(case)


@pytest.mark.parametrize("bits", range(1, 32))
def test_every_width_over_the_seams_of_its_blocks(bits: int) -> None:
    """More tokens than are worked on at once, and a remainder that fills no byte."""
    size = 1 << bits
    tokens = np.random.default_rng(bits).integers(0, size, (3, 1, 41, 301), dtype=np.int64).astype(np.int32)
    container = pack(TokenGrids(tokens, CODEBOOK, size))
    assert np.array_equal(unpack(container).tokens, tokens)
    stream = int.from_bytes(container[HEADER.size : -4], "little")
    places = (0, 1, 7, 8, 32_767, 32_768, tokens.size - 1)
    assert [stream >> place * bits & size - 1 for place in places] == tokens.reshape(-1)[list(places)].tolist()
    assert stream >> tokens.size * bits == 0


@pytest.mark.parametrize(
    ("spoil", "field", "words"),
    [
        (lambda data: b"", "magic", "does not begin with VTOK"),
        (lambda data: b"\x89PNG" + data, "magic", "does not begin with VTOK"),
        (lambda data: data[:3], "length", "cut off in its header"),
        (lambda data: data[:55], "length", "cut off in its header"),
        (lambda data: data[:-1], "length", "is cut off: it has 63 bytes"),
        (lambda data: data + b"\0", "length", "has bytes after its end: it has 65 bytes"),
        (lambda data: data * 2, "length", "has bytes after its end"),
        (lambda data: changed(data, version=2), "version", "of version 2; version 1 is read"),
        (lambda data: b"VTOK\x02", "version", "of version 2"),
        (lambda data: changed(data, bits=11), "bits", "a token of 1000 codes has 10 bits"),
        (lambda data: changed(data, size=1), "size", "2 to 2147483648 codes"),
        (lambda data: changed(data, size=2**32 - 1, bits=32), "size", "2 to 2147483648 codes"),
        (lambda data: changed(data, codebooks=0), "codebooks", "codebooks is 0"),
        (lambda data: changed(data, count=0), "count", "count is 0"),
        (lambda data: changed(data, height=0), "height", "height is 0"),
        (lambda data: changed(data, width=0), "width", "width is 0"),
        (lambda data: changed(data, count=2**32 - 1, height=65535, width=65535), "length", "is cut off"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "crc", "damaged"),
        (lambda data: data[:-5] + b"\x0e" + data[-4:], "crc", "damaged"),
        (lambda data: with_crc(data[:-5] + b"\x1f"), "padding", "not zero"),
        (lambda data: changed(data, size=999), "tokens", "a token 999; 998 is the last"),
    ],
)
def test_what_is_wrong_is_named(spoil: Callable[[bytes], bytes], field: str, words: str) -> None:
    with pytest.raises(MalformedTokensError) as caught:
        unpack(spoil(pack(EXAMPLE)))
    assert caught.value.field == field
    assert words in caught.value.detail


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tokens": EXAMPLE.tokens.astype(np.int64)}, "tokens"),
        ({"tokens": EXAMPLE.tokens[0]}, "tokens"),
        ({"tokens": EXAMPLE.tokens[:0]}, "tokens"),
        ({"tokens": EXAMPLE.tokens - 1}, "tokens"),
        ({"size": 999}, "tokens"),
        ({"size": 1}, "size"),
        ({"size": 2**31 + 1}, "size"),
        ({"codebook": CODEBOOK[1:]}, "codebook"),
        ({"codebook": CODEBOOK.upper()}, "codebook"),
    ],
)
def test_grids_that_no_container_holds(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        pack(TokenGrids(**({"tokens": EXAMPLE.tokens, "codebook": CODEBOOK, "size": 1000} | fields)))
    assert caught.value.field == field


def test_tokens_that_are_a_view_are_packed_in_their_order() -> None:
    turned = TokenGrids(EXAMPLE.tokens.transpose(0, 1, 3, 2), CODEBOOK, 1000)
    assert np.array_equal(unpack(pack(turned)).tokens, turned.tokens)


@pytest.mark.parametrize(("size", "bits"), [(2, 1), (3, 2), (16384, 14), (16385, 15), (100_000, 17), (1 << 31, 31)])
def test_bits_per_token(size: int, bits: int) -> None:
    assert bits_per_token(size) == bits


def test_the_documented_bytes_are_those_written() -> None:
    (shown,) = blocks("hex")
    lines = [bytes.fromhex(line[6:]) for line in shown.splitlines()]
    assert [int(line[:4], 16) for line in shown.splitlines()] == [0, 16, 32, 48]
    assert b"".join(lines) == pack(EXAMPLE)


def test_the_documented_table_is_the_header() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+|⌈.*⌉) \| `(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert [name for *_, name in rows] == [*FIELDS, "tokens"]
    starts = [int(start) for start, *_ in rows]
    assert [end - start for start, end in pairwise(starts)] == [int(size) for _, size, _ in rows[:-1]]
    assert starts[-1] == HEADER.size


@settings(QUICK, max_examples=50)
@given(grids())
def test_the_documented_reader_reads(original: TokenGrids) -> None:
    namespace: dict[str, Any] = {}
    (program,) = blocks("python")
    exec(program, namespace)
    codebook, size, shape, tokens = namespace["read_tokens"](pack(original))
    assert (codebook, size, shape) == (original.codebook, original.size, original.tokens.shape)
    assert tokens == original.tokens.reshape(-1).tolist()


def test_the_documented_reader_refuses() -> None:
    namespace: dict[str, Any] = {}
    exec(blocks("python")[0], namespace)
    container = pack(EXAMPLE)
    for spoilt in (container[:-1], with_crc(container[:-4] + b"\0"), changed(container, version=2)):
        with pytest.raises(ValueError, match="token container"):
            namespace["read_tokens"](spoilt)
