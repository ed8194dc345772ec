"""The campaigns in this process: every decoder and every parser, asked directly, thousands of inputs a second."""

import json
import random
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from app.api.body import parse_body, read_json
from app.api.chat_schemas import read_chat
from app.api.embeddings import read_embeddings
from app.api.tokens import parse_tokens
from app.decode import DecodeLimits, decode, open_image
from app.errors import InputError
from app.token_format import TokenGrids, pack
from tests.fuzz import files, requests
from tests.fuzz.campaign import REFUSED_SECONDS, Campaign, allowed_seconds
from tests.fuzz.mutation import mutate

MAX_IMAGES = 32
MOST_PIXELS = 4_000_000  # a changed header may ask for the limit again and again, which shows nothing new
EXAMPLES = 100  # of one round of hypothesis
JSON_TYPES = ("application/json", "", "text/plain", "multipart/form-data; boundary=b0undary", "image/jpeg")
NAMES = [
    *sorted({name for _, document in requests.documents().values() for name in document}),
    "url",
    "role",
    "content",
    "type",
    "text",
]


def decoders(campaign: Campaign) -> None:
    """Files of every format, changed: each is decoded or refused as an input error, within its time."""
    valid = files.valid()
    names, others = sorted(valid), list(valid.values())
    limits = DecodeLimits(max_pixels=MOST_PIXELS)
    for number, chance in campaign.inputs():
        name = chance.choice(names)
        data = mutate(valid[name], chance, others)
        smallest = (lambda *_: (24, 16)) if chance.random() < 0.5 else None
        pixels, started = 0, time.thread_time()
        try:
            opened = open_image(data, limits, smallest)
            pixels = opened.size[0] * opened.size[1]
            image, _ = decode(opened)
            outcome = "decoded" if image.mode == "RGB" else "of a wrong mode"
        except InputError as error:
            outcome = error.code
        except BaseException as error:
            campaign.fault(f"{name} {number}: {type(error).__name__}: {error}", data)
            continue
        took = time.thread_time() - started
        campaign.count(outcome, took, f"{name} {number}")
        limit = max(REFUSED_SECONDS, allowed_seconds(pixels, len(data)))
        if outcome == "of a wrong mode" or took > limit:
            campaign.fault(f"{name} {number}: {outcome} in {took:.2f} s, {limit:.2f} s are allowed", data)


def containers(campaign: Campaign) -> None:
    """Token containers, `.npy` files and token lists, changed; a container's checksum is made right again, mostly."""
    grids = TokenGrids(np.arange(48, dtype=np.int32).reshape(1, 3, 4, 4), "c0de" * 16, 1000)
    buffer = struct.pack("<H", 118) + f"{{'descr': '<i8', 'fortran_order': False, 'shape': (4, 4), }}{'':58}\n".encode()
    npy = b"\x93NUMPY\1\0" + buffer + bytes(128)
    lists = b'{"tokens": [[0, 1, 2], [3, 4, 5]], "codebook": "a"}'
    seeds = [pack(grids), npy, lists]

    def read(data: bytes, chance: random.Random) -> object:
        return parse_tokens(
            data, chance.choice(("", "application/json", "application/x-npy", "application/vnd.vitrine.tokens")), 32
        )

    def change(data: bytes, chance: random.Random) -> bytes:
        changed = mutate(data, chance, seeds)
        if changed.startswith(b"VTOK") and chance.random() < 0.8:
            return changed[:-4] + struct.pack("<I", zlib.crc32(changed[:-4]))
        return changed

    _change(campaign, seeds, change, read)


def bodies(campaign: Campaign) -> None:
    """Forms and documents, changed byte by byte, under every content type."""
    form = requests.multipart(
        requests.part("image", requests.IMAGE, "a.jpg"), requests.part("top_k", b"3"), requests.part("top_k", b"4")
    )
    seeds = [form, *(json.dumps(document).encode() for _, document in requests.documents().values()), requests.IMAGE]

    def read(data: bytes, chance: random.Random) -> object:
        kind = chance.choice(
            (requests.FORM, requests.JSON, *JSON_TYPES, mutate(requests.FORM.encode(), chance, seeds).decode("latin-1"))
        )
        return parse_body(data, kind, MAX_IMAGES, needs_image=chance.random() < 0.5)

    _change(campaign, seeds, lambda data, chance: mutate(data, chance, seeds), read)


def documents(campaign: Campaign) -> None:
    """JSON of any shape made of the names that are known here, by hypothesis, read as each route reads its own."""
    text = st.text(max_size=20) | st.sampled_from(
        ["user", "text", "image_url", f"data:image/jpeg;base64,{requests.DATA}", "\ud800"]
    )
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | text
    names = st.sampled_from(NAMES) | st.text(max_size=5)
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(names, inner, max_size=5), max_leaves=25
    )
    readers: dict[str, Callable[[bytes], object]] = {
        "body": lambda data: parse_body(data, "application/json", MAX_IMAGES),
        "tokens": lambda data: parse_tokens(data, "application/json", MAX_IMAGES),
        "chat": lambda data: read_chat(read_json(data, ""), max_images=MAX_IMAGES, max_tokens=100),
        "embeddings": lambda data: read_embeddings(data, MAX_IMAGES),
    }
    good = [document for _, document in requests.documents().values()]

    @st.composite
    def near(draw: st.DrawFn) -> Any:
        """A good document of which one value is another, at any depth; or any value at all."""
        document = json.loads(json.dumps(draw(st.sampled_from(good))))
        place = document
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if draw(st.booleans()) or not isinstance(place[key], (dict, list)) or not place[key]:
                place[key] = draw(values)
                break
            place = place[key]
        return document

    def once(value: Any) -> None:
        data = json.dumps(value).encode()
        for name, read in readers.items():
            _ask(campaign, name, data, lambda read=read: read(data))

    for number, _ in campaign.inputs():
        explore = settings(
            max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
        )
        seed(campaign.seed * 1_000_003 + number)(explore(given(near() | values)(once)))()


def _change(
    campaign: Campaign,
    seeds: list[bytes],
    change: Callable[[bytes, random.Random], bytes],
    read: Callable[[bytes, random.Random], object],
) -> None:
    for number, chance in campaign.inputs():
        data = change(chance.choice(seeds), chance)
        _ask(campaign, str(number), data, lambda data=data, chance=chance: read(data, chance))


def _ask(campaign: Campaign, name: str, data: bytes, read: Callable[[], object]) -> None:
    started = time.thread_time()
    try:
        read()
        outcome = "read"
    except InputError as error:
        outcome = error.code
    except BaseException as error:
        campaign.fault(f"{name}: {type(error).__name__}: {str(error)[:200]}", data)
        return
    took = time.thread_time() - started
    campaign.count(outcome, took, name)
    if took > REFUSED_SECONDS:
        campaign.fault(f"{name}: {outcome} in {took:.2f} s", data)
