"""Token grids in the body of a request: JSON, NumPy's `.npy` or the container of `app/token_format.py`; the bytes tell which."""

import math
import warnings
from io import BytesIO
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from python_multipart.multipart import parse_options_header

from app import token_format
from app.api.body import Parsed, SentTokens, looks_like_json, read_json
from app.errors import InvalidValueError, MalformedRequestError, UnsupportedMediaError
from app.manifest import Codebook
from app.tasks.detokenize import check_grids

JSON, NPY = "application/json", "application/x-npy"
HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
"""Version 3 exists for names of fields beyond Latin-1, which no array of integers has."""

MOST_AXES = 4  # [B,K,h,w]
NESTING = f"tokens must be lists in lists, 2 to {MOST_AXES} deep and of one length at each depth."

warnings.filterwarnings("ignore", message="Reading `.npy`", category=UserWarning)  # a crafted header must not write to the log


def parse_tokens(body: bytes, content_type: str, max_images: int) -> Parsed:
    """Take token grids out of the body; how many there are depends on the model, so `read_grids` counts them.

    Raises:
        MalformedRequestError: no body, broken JSON, no `tokens` in it, lists of different lengths.
        MalformedTokensError: a broken container.
        InvalidValueError: tokens that are no integers; an `.npy` that is none, or whose array is not what it says.
        UnsupportedMediaError: none of the three.
    """
    declared = parse_options_header(content_type)[0].decode("latin-1")
    if not body:
        raise MalformedRequestError("The body is empty; send token grids as JSON, as .npy or as a token container.", field="tokens")
    if body.startswith(npy.MAGIC_PREFIX) or declared == NPY:
        return Parsed(tokens=SentTokens(_read_npy(body), NPY), declared=declared)
    if body.startswith(token_format.MAGIC) or declared == token_format.MEDIA_TYPE:
        grids = token_format.unpack(body)
        return Parsed(tokens=SentTokens(grids.tokens, token_format.MEDIA_TYPE, grids.codebook, grids.size), declared=declared)
    if not looks_like_json(body, declared):
        raise UnsupportedMediaError("The body is no token grid; send JSON, .npy or a token container.", field="tokens")
    document = read_json(body, '{"tokens": [[0, 1], [2, 3]]}')
    if (tokens := document.pop("tokens", None)) is None:
        raise MalformedRequestError("There are no `tokens` in the request.", field="tokens")
    return Parsed(tokens=SentTokens(_read_lists(tokens), JSON), fields=document, declared=declared)


def read_grids(sent: SentTokens, named: str | None, codebook: Codebook, max_images: int) -> list[NDArray[np.int32]]:
    """The grids that were sent, each as the engine takes it, after everything about them was checked.

    `named` is the id of the codebook that the request gives beside its body.

    Raises:
        InvalidValueError: another codebook's tokens, or what `check_grids` refuses.
        TooLargeError: more than `max_images` grids.
    """
    for given in (named, sent.codebook):
        if given not in (None, codebook.id):
            raise InvalidValueError(f"The tokens are of the codebook {given}, this model's is {codebook.id}.", field="codebook")
    if sent.size not in (None, codebook.size):
        raise InvalidValueError(f"The container says {sent.size} codes, this model's codebook has {codebook.size}.", field="size")
    return list(check_grids(sent.tokens, codebook, max_images))


def _read_npy(body: bytes) -> NDArray[Any]:
    """The array of an `.npy` file, where it lies. Never unpickles, and takes no more memory than the body."""
    file = BytesIO(body)
    try:
        version = npy.read_magic(file)
        shape, fortran, dtype = HEADER_READERS[version](file)
    except Exception as error:  # NumPy evaluates the header as Python's literals, which fails in as many ways as Python has
        raise InvalidValueError("The body is no .npy file that is read here (version 1 or 2).", field="tokens") from error
    if dtype.kind not in "iu":
        raise InvalidValueError(f"tokens must be integers, not {dtype}.", field="tokens")
    sizes, have = [int(size) for size in shape], len(body) - file.tell()
    if not 2 <= len(sizes) <= MOST_AXES or min(sizes) < 1:
        raise InvalidValueError(f"tokens must have 2 to {MOST_AXES} axes, none of them empty; these are {sizes}.", field="tokens")
    if math.prod(sizes) * dtype.itemsize != have:
        raise InvalidValueError(f"The .npy file says {dtype} {sizes}, but {have} bytes follow.", field="tokens")
    return np.frombuffer(body, dtype, offset=file.tell()).reshape(sizes, order="F" if fortran else "C")


def _read_lists(value: object) -> NDArray[np.int64]:
    """Nested lists of whole numbers, all of one length at each depth; NumPy alone would take `true` and 1.0 for such."""
    try:
        array = np.array(value, dtype=object)
    except ValueError as error:
        raise InvalidValueError(NESTING, field="tokens") from error
    if not 2 <= array.ndim <= MOST_AXES or list in (kinds := set(map(type, array.flat))):
        raise InvalidValueError(NESTING, field="tokens")
    if kinds - {int}:
        names = ", ".join(sorted(kind.__name__ for kind in kinds - {int}))
        raise InvalidValueError(f"tokens must be whole numbers, not {names}.", field="tokens")
    try:
        return array.astype(np.int64)
    except OverflowError as error:
        raise InvalidValueError("tokens has a number of more than 64 bits.", field="tokens") from error
