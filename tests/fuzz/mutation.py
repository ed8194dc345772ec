"""Valid bytes, changed: the ways in which files arrive broken, and those that people break them in."""

import random
import struct
import zlib
from collections.abc import Callable, Sequence

PNG = b"\x89PNG\r\n\x1a\n"
HEAD = 200  # bytes; half of the changes fall here, where the headers are
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)

Change = Callable[[bytearray, random.Random, Sequence[bytes]], None]


def mutate(data: bytes, chance: random.Random, others: Sequence[bytes]) -> bytes:
    """`data` with one to four changes; `others` are files to take pieces of. A PNG's checksums are made right again, mostly."""
    broken = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        chance.choice(CHANGES)(broken, chance, others)
    if broken.startswith(PNG) and chance.random() < 0.8:
        return with_checksums(bytes(broken))
    return bytes(broken)


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks, as far as they are whole, have the right checksums."""
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            break
        parts += [data[position:end], struct.pack(">I", zlib.crc32(data[position + 4 : end]))]
        position = end + 4
    return b"".join([*parts, data[position:]])


def _place(data: bytearray, chance: random.Random) -> int:
    reach = min(HEAD, len(data)) if chance.random() < 0.5 else len(data)
    return chance.randrange(reach + 1)


def _piece(data: Sequence[int] | bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data) + 1)
    return bytes(data[start : start + chance.choice((1, 4, 16, 64, 256, 4096))])


def _flip(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    for _ in range(chance.randint(1, 8)):
        if data:
            data[min(_place(data, chance), len(data) - 1)] = chance.randrange(256)


def _number(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    """A number of 1 to 4 bytes where one may stand, at an end of its range."""
    place, size = _place(data, chance), chance.choice((1, 2, 4))
    value = chance.choice(NUMBERS) & (256**size - 1)
    data[place : place + size] = value.to_bytes(size, chance.choice(("big", "little")))


def _cut(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    del data[_place(data, chance) :]


def _remove(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    place = _place(data, chance)
    del data[place : place + chance.choice((1, 2, 4, 12, 64, 1024))]


def _repeat(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    place = _place(data, chance)
    data[place:place] = _piece(data, chance) * chance.choice((1, 2, 8, 64))


def _splice(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    place = _place(data, chance)
    data[place:place] = _piece(chance.choice(others), chance)


def _graft(data: bytearray, chance: random.Random, others: Sequence[bytes]) -> None:
    """The beginning of one file and the rest of another."""
    other = chance.choice(others)
    data[_place(data, chance) :] = other[chance.randrange(len(other) + 1) :]


CHANGES: Sequence[Change] = (_flip, _flip, _number, _number, _cut, _remove, _repeat, _splice, _graft)
