"""The compact binary form of token grids: a fixed header, bit-packed tokens, a CRC; byte by byte in `docs/token-format.md`.

One container holds a batch of grids of one tokenizer. Reading is strict: a container is exactly what `pack` writes, or it is
refused, and what reading allocates is bounded by the length of the data, whatever the header claims.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from app.errors import InvalidValueError, MalformedTokensError

MEDIA_TYPE = "application/vnd.vitrine.tokens"
MAGIC = b"VTOK"
VERSION = 1
LARGEST_SIZE = 1 << 31
"""A token is an int32, so a codebook has at most this many codes."""

Scalar = TypeVar("Scalar", bound=np.generic)

_HEADER = struct.Struct("<4sBBH32sIIHH")
_CRC = struct.Struct("<I")
_CODEBOOK_ID = re.compile(r"[0-9a-f]{64}")
_GROUP = 8  # tokens that together fill whole bytes, at any width
_CHUNK = 1 << 12  # groups worked on at once: the working set stays in the cache, and small


@dataclass(frozen=True)
class TokenGrids:
    """A batch of B grids of h x w positions, with one token of each of K codebooks at every position."""

    tokens: NDArray[np.int32]
    """int32 [B,K,h,w], each 0 to `size` - 1."""
    codebook: str
    """The id of the codebook, as in the manifest: a SHA-256 in 64 lower-case hex digits."""
    size: int
    """Codes in each of the K codebooks."""


@dataclass(frozen=True)
class TokenHeader:
    """What a container says of itself: the codebook, and the shape [B,K,h,w] of the tokens that follow."""

    codebook: str
    size: int
    shape: tuple[int, int, int, int]

    @property
    def bits(self) -> int:
        return bits_per_token(self.size)

    @property
    def count(self) -> int:
        """Tokens in the container."""
        batch, codebooks, height, width = self.shape
        return batch * codebooks * height * width


def bits_per_token(size: int) -> int:
    """The binary logarithm of `size`, rounded up."""
    return (size - 1).bit_length()


def pack(grids: TokenGrids) -> bytes:
    """One container with `grids`.

    Raises:
        InvalidValueError: tokens of another shape or dtype, or out of range; no codebook id, or a size that no container holds.
    """
    _check(grids)
    batch, codebooks, height, width = grids.tokens.shape
    bits = bits_per_token(grids.size)
    identity = bytes.fromhex(grids.codebook)
    header = _HEADER.pack(MAGIC, VERSION, bits, codebooks, identity, grids.size, batch, height, width)
    body = header + _pack_bits(grids.tokens.reshape(-1), bits)
    return body + _CRC.pack(zlib.crc32(body))


def read_header(data: bytes) -> TokenHeader:
    """The header of a container, checked against the length of `data`; the tokens are not looked at.

    Raises:
        MalformedTokensError: as `unpack`, for everything that the header and the length can show.
    """
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise MalformedTokensError(f"This is no token container: it does not begin with {MAGIC.decode()}.", field="magic")
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise MalformedTokensError(
            f"The token container is of version {data[len(MAGIC)]}; version {VERSION} is read here.", field="version"
        )
    if len(data) < _HEADER.size + _CRC.size:
        raise MalformedTokensError(f"The token container is cut off in its header: {len(data)} bytes.", field="length")
    _, _, bits, codebooks, identity, size, batch, height, width = _HEADER.unpack_from(data)
    if not 2 <= size <= LARGEST_SIZE:
        raise MalformedTokensError(f"size is {size}; a codebook has 2 to {LARGEST_SIZE} codes.", field="size")
    if bits != bits_per_token(size):
        raise MalformedTokensError(f"bits is {bits}; a token of {size} codes has {bits_per_token(size)} bits.", field="bits")
    for name, value in (("codebooks", codebooks), ("count", batch), ("height", height), ("width", width)):
        if value == 0:
            raise MalformedTokensError(f"{name} is 0; a token container holds at least one token.", field=name)
    header = TokenHeader(identity.hex(), size, (batch, codebooks, height, width))
    expected = _HEADER.size + _packed_length(header.count, bits) + _CRC.size
    if len(data) != expected:
        fault = "is cut off" if len(data) < expected else "has bytes after its end"
        tokens = f"{batch} x {codebooks} x {height} x {width} tokens of {bits} bits"
        raise MalformedTokensError(
            f"The token container {fault}: it has {len(data)} bytes, {tokens} take {expected}.", field="length"
        )
    return header


def unpack(data: bytes) -> TokenGrids:
    """The grids of one container. Allocates at most 32 bytes for each byte of `data` (tokens of one bit as int32) and 1 MiB.

    Raises:
        MalformedTokensError: no container, one of another version, cut off, continued or damaged; `field` names the field of the
            header, or `length`, `crc`, `padding` or `tokens`.
    """
    header = read_header(data)
    end = len(data) - _CRC.size
    if zlib.crc32(memoryview(data)[:end]) != _CRC.unpack_from(data, end)[0]:
        raise MalformedTokensError("The token container is damaged: its CRC is of other bytes.", field="crc")
    packed = np.frombuffer(data, np.uint8, end - _HEADER.size, _HEADER.size)
    tokens, padding = _unpack_bits(packed, header.count, header.bits)
    if padding:
        raise MalformedTokensError("The bits after the last token of the token container are not zero.", field="padding")
    largest = int(tokens.max())
    if largest >= header.size:
        raise MalformedTokensError(f"The token container has a token {largest}; {header.size - 1} is the last.", field="tokens")
    return TokenGrids(tokens.reshape(header.shape), header.codebook, header.size)


def _check(grids: TokenGrids) -> None:
    if not 2 <= grids.size <= LARGEST_SIZE:
        raise InvalidValueError(f"size is {grids.size}; a codebook has 2 to {LARGEST_SIZE} codes.", field="size")
    if not _CODEBOOK_ID.fullmatch(grids.codebook):
        raise InvalidValueError("codebook must be a SHA-256 in 64 lower-case hex digits.", field="codebook")
    tokens = grids.tokens
    if tokens.dtype != np.int32:
        raise InvalidValueError(f"tokens must be int32, not {tokens.dtype}.", field="tokens")
    limits = (0xFFFFFFFF, 0xFFFF, 0xFFFF, 0xFFFF)
    if tokens.ndim != 4 or not all(1 <= side <= limit for side, limit in zip(tokens.shape, limits, strict=True)):
        raise InvalidValueError(f"tokens must be [batch,codebooks,height,width], not {list(tokens.shape)}.", field="tokens")
    if tokens.min() < 0 or tokens.max() >= grids.size:
        raise InvalidValueError(f"tokens must be 0 to {grids.size - 1}.", field="tokens")


def _packed_length(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _overlaps(bits: int) -> Iterator[tuple[int, int, int]]:
    """Which byte of a group holds a part of which token: (token, byte, how far left of the token's the byte's lowest bit is)."""
    for token in range(_GROUP):
        first, last = token * bits // 8, ((token + 1) * bits - 1) // 8
        for byte in range(first, last + 1):
            yield token, byte, byte * 8 - token * bits


def _pack_bits(tokens: NDArray[np.int32], bits: int) -> bytes:
    """Tokens [N] one after the other, lowest bit first, the first in the lowest bits of the first byte; zeros fill the last."""
    groups = -(-len(tokens) // _GROUP)
    packed = np.zeros((groups, bits), np.uint8)
    for start in range(0, groups, _CHUNK):
        part = _groups(tokens[start * _GROUP : (start + _CHUNK) * _GROUP].astype(np.uint32), _GROUP)
        into = packed[start : start + _CHUNK]
        for token, byte, left in _overlaps(bits):
            shifted = part[:, token] >> left if left >= 0 else part[:, token] << -left
            into[:, byte] |= shifted.astype(np.uint8)
    return packed.reshape(-1)[: _packed_length(len(tokens), bits)].tobytes()


def _unpack_bits(packed: NDArray[np.uint8], count: int, bits: int) -> tuple[NDArray[np.int32], bool]:
    """The first `count` tokens of what `_pack_bits` gives, and whether a bit after the last of them is set."""
    groups = -(-count // _GROUP)
    tokens = np.zeros((groups, _GROUP), np.uint32)
    mask = np.uint32((1 << bits) - 1)
    for start in range(0, groups, _CHUNK):
        part = _groups(packed[start * bits : (start + _CHUNK) * bits], bits)
        into = tokens[start : start + _CHUNK]
        for token, byte, left in _overlaps(bits):
            wide = part[:, byte].astype(np.uint32)
            into[:, token] |= wide << left if left >= 0 else wide >> -left
        into &= mask
    flat = tokens.reshape(-1).view(np.int32)
    return flat[:count], bool(flat[count:].any())


def _groups(values: NDArray[Scalar], width: int) -> NDArray[Scalar]:
    """Values [N] as [ceil(N / width),width], with zeros at the end."""
    missing = -len(values) % width
    return (np.concatenate((values, np.zeros(missing, values.dtype))) if missing else values).reshape(-1, width)
