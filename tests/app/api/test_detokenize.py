"""`POST /v1/detokenize` as a client sees it: every form of tokens in, every form of images out, and nothing bad to the engine."""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from starlette.testclient import TestClient

from app.admission import Ticket
from app.api.schemas import DetokenizeResponse
from app.backends.base import Tensors
from app.backends.onnxruntime import OnnxRuntimeBackend
from app.main import create_app
from app.manifest import Entry
from app.settings import Settings
from app.token_format import MEDIA_TYPE, TokenGrids, pack
from tests.repository import make_repository
from tests.tokenizer_repository import CODEBOOK, CODES, SIZE, add_tokenizer, image_of

NPY, JSON = "application/x-npy", "application/json"
TOKENS = np.random.default_rng(0).integers(0, CODES, (3, 4, 4)).astype(np.int32)
PAIRS = np.random.default_rng(1).integers(0, CODES, (3, 2, 4, 4)).astype(np.int32)
OTHER_CODEBOOK = "beef" * 16


class CountingBackend(OnnxRuntimeBackend):
    """Counts the rows that reach an engine."""

    rows = 0

    async def infer(self, entry: Entry, inputs: Tensors, ticket: Ticket) -> dict[str, NDArray[Any]]:
        self.rows += len(next(iter(inputs.values())))
        return await super().infer(entry, inputs, ticket)


@pytest.fixture(scope="module")
def counting() -> CountingBackend:
    return CountingBackend()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, counting: CountingBackend) -> Iterator[TestClient]:
    """A gateway whose tokenizers have been loaded and tried."""
    repository = make_repository(tmp_path_factory.mktemp("repository"))
    add_tokenizer(repository)
    add_tokenizer(repository, "pairs", codebooks=2)
    settings = Settings(_env_file=None, repository=repository, default_tokenizer="greys", max_images=4, repository_poll=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app.main.make_backend", lambda settings, pool: counting)
        app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        for model, tokens in (("greys", TOKENS), ("pairs", PAIRS)):
            assert client.post(f"/v1/detokenize?model={model}", json={"tokens": tokens[0].tolist()}).status_code == 200
        yield client


@pytest.fixture
def backend(counting: CountingBackend, client: TestClient) -> CountingBackend:
    """With nothing counted yet."""
    counting.rows = 0
    return counting


def as_npy(array: NDArray[Any], **options: Any) -> bytes:
    file = BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def as_container(tokens: NDArray[np.int32], codebook: str = CODEBOOK.id, size: int = CODES) -> bytes:
    return pack(TokenGrids(tokens, codebook, size))


def as_json(tokens: object, **fields: object) -> bytes:
    return json.dumps({"tokens": tokens, **fields}).encode()


def pixels_of(answer: dict[str, Any]) -> NDArray[np.uint8]:
    files = [base64.b64decode(result["reconstruction"]["base64"]) for result in answer["results"]]
    return np.stack([np.asarray(Image.open(BytesIO(file))) for file in files])


ONE_CODEBOOK: list[tuple[str, bytes, int]] = [
    ("json-one", as_json(TOKENS[0].tolist()), 1),
    ("json-batch", as_json(TOKENS.tolist(), model="greys", codebook=CODEBOOK.id), 3),
    ("json-with-an-axis-of-codebooks", as_json(TOKENS[:, None].tolist()), 3),
    ("npy-one", as_npy(TOKENS[0]), 1),
    ("npy-batch", as_npy(TOKENS), 3),
    ("npy-with-an-axis-of-codebooks", as_npy(TOKENS[:, None]), 3),
    ("npy-uint8", as_npy(TOKENS.astype(np.uint8)), 3),
    ("npy-big-endian", as_npy(TOKENS.astype(">i8")), 3),
    ("npy-uint64", as_npy(TOKENS.astype(np.uint64)), 3),
    ("npy-fortran", as_npy(np.asfortranarray(TOKENS)), 3),
    ("container-one", as_container(TOKENS[:1, None]), 1),
    ("container-batch", as_container(TOKENS[:, None]), 3),
]


@pytest.mark.parametrize(("body", "count"), [case[1:] for case in ONE_CODEBOOK], ids=[case[0] for case in ONE_CODEBOOK])
@pytest.mark.parametrize("declared", ["", "application/octet-stream"])
def test_tokens_in_every_form(client: TestClient, backend: CountingBackend, body: bytes, count: int, declared: str) -> None:
    response = client.post("/v1/detokenize", content=body, headers={"Content-Type": declared})
    assert response.status_code == 200, response.text
    answer = response.json()
    DetokenizeResponse.model_validate(answer)
    assert np.array_equal(pixels_of(answer), image_of(TOKENS[:count]))
    assert (answer["model"], answer["task"], answer["warnings"]) == ("greys", "detokenize", [])
    assert answer["results"][0].keys() == {"index", "reconstruction"}
    assert backend.rows == count


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (as_json(PAIRS[0].tolist()), 1),
        (as_json(PAIRS.tolist()), 3),
        (as_npy(PAIRS[0]), 1),
        (as_npy(PAIRS), 3),
        (as_container(PAIRS), 3),
    ],
)
def test_several_codebooks(client: TestClient, body: bytes, count: int) -> None:
    response = client.post(f"/v1/detokenize?model=pairs&codebook={CODEBOOK.id}", content=body)
    assert response.status_code == 200, response.text
    assert np.array_equal(pixels_of(response.json()), image_of(PAIRS[:count]))


def test_what_was_tokenized_comes_back(client: TestClient) -> None:
    photo = BytesIO()
    Image.fromarray(image_of(TOKENS[:1])[0]).save(photo, "PNG")
    for form in (NPY, MEDIA_TYPE):
        tokens = client.post("/v1/tokenize", content=photo.getvalue(), headers={"Accept": form})
        image = client.post("/v1/detokenize", content=tokens.content, headers={"Content-Type": form, "Accept": NPY})
        assert np.array_equal(np.load(BytesIO(image.content)), image_of(TOKENS[:1]))


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("image/png", "PNG"),
        ("image/jpeg", "JPEG"),
        ("image/webp", "WEBP"),
        ("image/*", "PNG"),
        ("image/png;q=0.2, image/jpeg;q=0.9, */*;q=0.1", "JPEG"),
    ],
)
def test_one_grid_to_an_image_file(client: TestClient, accept: str, kind: str) -> None:
    response = client.post("/v1/detokenize", json={"tokens": TOKENS[0].tolist()}, headers={"Accept": accept})
    assert (response.status_code, response.headers["Content-Type"]) == (200, f"image/{kind.lower()}")
    image = Image.open(BytesIO(response.content))
    assert (image.format, image.size) == (kind, (SIZE, SIZE))
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - image_of(TOKENS[:1])[0]).max() <= (0 if kind == "PNG" else 20)
    assert (response.headers["X-Model"], response.headers["X-Codebook"]) == ("greys@1", CODEBOOK.id)


def test_quality_is_that_of_the_file(client: TestClient) -> None:
    for kind in ("jpeg", "webp"):
        sizes = [
            len(
                client.post(
                    f"/v1/detokenize?quality={quality}", content=as_npy(TOKENS[0]), headers={"Accept": f"image/{kind}"}
                ).content
            )
            for quality in (5, 95)
        ]
        assert sizes[0] < sizes[1]


def test_pixels_as_npy(client: TestClient) -> None:
    response = client.post("/v1/detokenize", content=as_npy(TOKENS), headers={"Accept": NPY})
    pixels = np.load(BytesIO(response.content))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, image_of(TOKENS))


def test_a_batch_is_more_than_a_batch_of_the_engine(make_client, repository: Path) -> None:
    add_tokenizer(repository)
    tokens = np.random.default_rng(2).integers(0, CODES, (20, 4, 4))
    answer = make_client().post("/v1/detokenize?model=greys", content=as_npy(tokens), headers={"Accept": NPY})
    assert np.array_equal(np.load(BytesIO(answer.content)), image_of(tokens))


def test_several_grids_do_not_fit_into_one_image(client: TestClient, backend: CountingBackend) -> None:
    problem = client.post("/v1/detokenize", content=as_npy(TOKENS), headers={"Accept": "image/png"}).json()
    assert (problem["status"], problem["field"]) == (406, "Accept")
    assert "ask for application/json or application/x-npy" in problem["detail"]
    assert backend.rows == 0
    assert client.post("/v1/detokenize", content=as_npy(TOKENS), headers={"Accept": "image/png, */*;q=0.1"}).status_code == 200


@pytest.mark.parametrize(("declared", "warned"), [(NPY, False), (JSON, True), ("image/png", True), (MEDIA_TYPE, True)])
def test_a_wrong_content_type_is_reported_not_believed(client: TestClient, declared: str, warned: bool) -> None:
    answer = client.post("/v1/detokenize", content=as_npy(TOKENS), headers={"Content-Type": declared}).json()
    assert np.array_equal(pixels_of(answer), image_of(TOKENS))
    assert [declared in warning and NPY in warning for warning in answer["warnings"]] == [True] * warned


def damaged(change: Callable[[bytearray], None]) -> bytes:
    data = bytearray(as_container(TOKENS[:, None]))
    change(data)
    return bytes(data)


def npy_header(header: str, rest: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + rest


def set_value(tokens: NDArray[Any], value: object) -> list[Any]:
    changed = tokens.tolist()
    changed[0][0] = value
    return changed


HUGE = npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (1000000, 1000000, 1000), }\n", b"\0" * 64)
BAD: list[tuple[str, bytes, str, int, str | None]] = [
    ("empty", b"", JSON, 400, "tokens"),
    ("no-json", b"{", JSON, 400, None),
    ("no-object", b"[[1, 2]]", JSON, 400, None),
    ("no-tokens", b"{}", JSON, 400, "tokens"),
    ("null", as_json(None), JSON, 400, "tokens"),
    ("number", as_json(5), JSON, 422, "tokens"),
    ("text", as_json("5"), JSON, 422, "tokens"),
    ("object", as_json({"a": 1}), JSON, 422, "tokens"),
    ("list-of-nothing", as_json([]), JSON, 422, "tokens"),
    ("batch-of-nothing", as_json([[]]), JSON, 422, "tokens"),
    ("ragged-rows", as_json([*TOKENS[0].tolist()[:3], [1, 2, 3]]), JSON, 422, "tokens"),
    ("ragged-batch", as_json([TOKENS[0].tolist(), TOKENS[1].tolist()[:3]]), JSON, 422, "tokens"),
    ("ragged-depth", as_json([TOKENS[0].tolist(), 1]), JSON, 422, "tokens"),
    ("too-deep", b'{"tokens": ' + b"[" * 200 + b"]" * 200 + b"}", JSON, 422, "tokens"),
    ("nan", as_json(set_value(TOKENS[0], float("nan"))), JSON, 422, "tokens"),
    ("infinity", as_json(set_value(TOKENS[0], float("inf"))), JSON, 422, "tokens"),
    ("float", as_json(set_value(TOKENS[0], 1.0)), JSON, 422, "tokens"),
    ("bool", as_json(set_value(TOKENS[0], True)), JSON, 422, "tokens"),
    ("none", as_json(set_value(TOKENS[0], None)), JSON, 422, "tokens"),
    ("string", as_json(set_value(TOKENS[0], "1")), JSON, 422, "tokens"),
    ("negative", as_json(set_value(TOKENS[0], -1)), JSON, 422, "tokens"),
    ("too-high", as_json(set_value(TOKENS[0], CODES)), JSON, 422, "tokens"),
    ("far-too-high", as_json(set_value(TOKENS[0], 2**32)), JSON, 422, "tokens"),
    ("beyond-64-bits", as_json(set_value(TOKENS[0], 2**70)), JSON, 422, "tokens"),
    ("one-high-in-a-batch", as_json([TOKENS[0].tolist(), set_value(TOKENS[1], 99)]), JSON, 422, "tokens"),
    ("another-grid", as_json(TOKENS[0, :3].tolist()), JSON, 422, "tokens"),
    ("two-codebooks", as_json(PAIRS.tolist()), JSON, 422, "tokens"),
    ("another-codebook", as_json(TOKENS.tolist(), codebook=OTHER_CODEBOOK), JSON, 422, "codebook"),
    ("no-codebook-id", as_json(TOKENS.tolist(), codebook="mine"), JSON, 422, "codebook"),
    ("unknown-field", as_json(TOKENS.tolist(), images=1), JSON, 422, "images"),
    ("quality", as_json(TOKENS.tolist(), quality=0), JSON, 422, "quality"),
    ("too-many", as_json(TOKENS[[0, 1, 2, 0, 1]].tolist()), JSON, 413, "tokens"),
    ("npy-too-many", as_npy(TOKENS[[0, 1, 2, 0, 1]]), NPY, 413, "tokens"),
    ("npy-float", as_npy(TOKENS.astype(np.float32)), NPY, 422, "tokens"),
    ("npy-nan", as_npy(np.full((4, 4), np.nan)), NPY, 422, "tokens"),
    ("npy-bool", as_npy(TOKENS > 3), NPY, 422, "tokens"),
    ("npy-complex", as_npy(TOKENS.astype(complex)), NPY, 422, "tokens"),
    ("npy-date", as_npy(TOKENS.astype("datetime64[s]")), NPY, 422, "tokens"),
    ("npy-record", as_npy(np.zeros((4, 4), [("a", "<i4")])), NPY, 422, "tokens"),
    ("npy-pickled", as_npy(np.array([[len]], object), allow_pickle=True), NPY, 422, "tokens"),
    ("npy-negative", as_npy(TOKENS - 100), NPY, 422, "tokens"),
    ("npy-uint64-too-high", as_npy(np.full((4, 4), 2**64 - 1, np.uint64)), NPY, 422, "tokens"),
    ("npy-another-grid", as_npy(TOKENS[:, :, :3]), NPY, 422, "tokens"),
    ("npy-flat", as_npy(TOKENS.reshape(-1)), NPY, 422, "tokens"),
    ("npy-scalar", as_npy(np.int32(5)), NPY, 422, "tokens"),
    ("npy-without-extent", as_npy(TOKENS[:0]), NPY, 422, "tokens"),
    ("npy-cut", as_npy(TOKENS)[:-1], NPY, 422, "tokens"),
    ("npy-longer", as_npy(TOKENS) + b"\0", NPY, 422, "tokens"),
    ("npy-huge", HUGE, NPY, 422, "tokens"),
    ("npy-long-header", npy_header("{" + " " * 60_000 + "}"), NPY, 422, "tokens"),
    ("npy-deep-header", npy_header("(" * 5000), NPY, 422, "tokens"),
    (
        "npy-python-2",
        npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (3L, 4L, 4L), }", TOKENS.tobytes()[1:]),
        NPY,
        422,
        "tokens",
    ),
    (
        "npy-shape-of-truths",
        npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (True, 4, 4), }", b"\0" * 63),
        NPY,
        422,
        "tokens",
    ),
    (
        "npy-negative-shape",
        npy_header("{'descr': '<i4', 'fortran_order': False, 'shape': (-1, -1), }", b"\0" * 4),
        NPY,
        422,
        "tokens",
    ),
    (
        "npy-many-axes",
        npy_header(f"{{'descr': '<i4', 'fortran_order': False, 'shape': {(1,) * 99}, }}", b"\0" * 4),
        NPY,
        422,
        "tokens",
    ),
    ("npy-version-3", b"\x93NUMPY\x03\x00" + as_npy(TOKENS)[8:], NPY, 422, "tokens"),
    ("npy-in-name-only", b"nonsense", NPY, 422, "tokens"),
    ("container-cut", as_container(TOKENS[:, None])[:-1], MEDIA_TYPE, 422, "length"),
    ("container-damaged", damaged(lambda data: data.__setitem__(-10, data[-10] ^ 1)), MEDIA_TYPE, 422, "crc"),
    ("container-in-name-only", b"nonsense", MEDIA_TYPE, 422, "magic"),
    ("container-another-codebook", as_container(TOKENS[:, None], OTHER_CODEBOOK), MEDIA_TYPE, 422, "codebook"),
    ("container-another-size", as_container(TOKENS[:, None], size=64), MEDIA_TYPE, 422, "size"),
    ("container-another-grid", as_container(TOKENS[:, None, :2]), MEDIA_TYPE, 422, "tokens"),
    ("container-two-codebooks", as_container(PAIRS), MEDIA_TYPE, 422, "tokens"),
    ("container-too-many", as_container(TOKENS[[0, 1, 2, 0, 1], None]), MEDIA_TYPE, 413, "tokens"),
    ("an-image", b"\x89PNG\r\n\x1a\n" + b"\0" * 64, "image/png", 415, "tokens"),
    ("a-form", b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x", 415, "tokens"),
]


@pytest.mark.parametrize(("body", "declared", "status", "field"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_nothing_bad_reaches_the_engine(
    client: TestClient, backend: CountingBackend, body: bytes, declared: str, status: int, field: str | None
) -> None:
    response = client.post("/v1/detokenize", content=body, headers={"Content-Type": declared})
    problem = response.json()
    assert response.headers["Content-Type"] == "application/problem+json"
    assert (response.status_code, problem.get("field")) == (status, field), problem
    assert backend.rows == 0


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("model=pairs", 422, "tokens"),
        ("model=colours", 404, "model"),
        ("model=gone", 404, "model"),
        (f"codebook={OTHER_CODEBOOK}", 422, "codebook"),
        ("codebook=mine", 422, "codebook"),
        ("quality=101", 422, "quality"),
        ("psnr=true", 422, "psnr"),
    ],
)
@pytest.mark.parametrize(
    "body", [as_json(TOKENS.tolist()), as_npy(TOKENS), as_container(TOKENS[:, None])], ids=["json", "npy", "container"]
)
def test_bad_parameters(client: TestClient, backend: CountingBackend, body: bytes, query: str, status: int, field: str) -> None:
    problem = client.post(f"/v1/detokenize?{query}", content=body).json()
    assert (problem["status"], problem["field"]) == (status, field)
    assert backend.rows == 0


def test_stages_without_an_image(client: TestClient) -> None:
    timing = client.post("/v1/detokenize", content=as_npy(TOKENS)).headers["Server-Timing"]
    assert [part.partition(";")[0] for part in timing.split(", ")] == ["read", "parse", "queue", "infer", "finish", "encode"]
