"""`POST /v1/tokenize` and `POST /v1/reconstruct` as a client sees them, on the embedded engine."""

import shutil
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.api.schemas import ReconstructResponse, TokenizeResponse
from app.fidelity import psnr, ssim
from app.main import create_app
from app.settings import Settings
from app.token_format import MEDIA_TYPE, unpack
from tests.app.api.test_health import counts
from tests.factories import encode, make_image, make_png
from tests.repository import make_repository
from tests.tokenizer_repository import CODEBOOK, SIZE, add_tokenizer, image_of, tokens_of

PIXELS = np.stack([np.asarray(make_image(SIZE, SIZE, seed)) for seed in range(3)])
IMAGES = [encode(Image.fromarray(pixels), "PNG") for pixels in PIXELS]
FLAT = encode(Image.new("RGB", (SIZE, SIZE), (88, 88, 88)), "PNG")
FILES = [("image", image) for image in IMAGES]
NPY = "application/x-npy"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    repository = make_repository(tmp_path_factory.mktemp("repository"))
    add_tokenizer(repository)
    add_tokenizer(repository, "pairs", codebooks=2)
    app = create_app(Settings(_env_file=None, repository=repository, default_tokenizer="greys", repository_poll=0))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def load(content: bytes) -> np.ndarray:
    return np.load(BytesIO(content), allow_pickle=False)


def picture(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


def test_one_image(client: TestClient) -> None:
    response = client.post("/v1/tokenize", content=IMAGES[0])
    assert response.status_code == 200
    answer = response.json()
    TokenizeResponse.model_validate(answer)
    assert (answer["model"], answer["version"], answer["task"], answer["warnings"]) == ("greys", 1, "tokenize", [])
    (result,) = answer["results"]
    assert result["image"]["width"] == SIZE
    assert result["tokens"] == tokens_of(PIXELS[:1])[0].tolist()
    assert result["grid"] == [4, 4]
    assert result["codebook"] == {"id": CODEBOOK.id, "size": 16, "count": 1}
    assert (result["bits_per_token"], result["bits_per_pixel"]) == (4, 4 * 16 / SIZE**2)
    assert "psnr" not in result


def test_several_codebooks(client: TestClient) -> None:
    (result,) = client.post("/v1/tokenize?model=pairs", content=IMAGES[0]).json()["results"]
    assert result["tokens"] == tokens_of(PIXELS[:1], codebooks=2)[0].tolist()
    assert (result["codebook"]["count"], result["bits_per_pixel"]) == (2, 2 * 4 * 16 / SIZE**2)


def test_a_batch_keeps_its_order_and_a_bad_image_fails_alone(client: TestClient) -> None:
    files = [*FILES[:2], ("image", b"not an image"), FILES[2]]
    results = client.post("/v1/tokenize", files=files, data={"psnr": "true"}).json()["results"]
    for result, pixels in zip([*results[:2], results[3]], PIXELS, strict=True):
        assert result["tokens"] == tokens_of(pixels[None])[0].tolist()
        assert result["psnr"] == pytest.approx(psnr(pixels, image_of(tokens_of(pixels[None]))[0]))
    assert results[2]["error"]["status"] == 415
    assert len({result["psnr"] for result in (results[0], results[1], results[3])}) == 3


def test_no_difference_is_null(client: TestClient) -> None:
    assert client.post("/v1/tokenize?psnr=true", content=FLAT).json()["results"][0]["psnr"] is None
    response = client.post("/v1/tokenize?psnr=true", content=FLAT, headers={"Accept": NPY})
    assert response.headers["X-PSNR"] == "inf"


@pytest.mark.parametrize(("model", "codebooks"), [("greys", 1), ("pairs", 2)])
def test_npy(client: TestClient, model: str, codebooks: int) -> None:
    response = client.post(f"/v1/tokenize?model={model}", files=FILES, headers={"Accept": NPY})
    assert (response.status_code, response.headers["Content-Type"]) == (200, NPY)
    tokens = load(response.content)
    assert tokens.dtype == np.int32
    assert np.array_equal(tokens, tokens_of(PIXELS, codebooks))
    assert (response.headers["X-Model"], response.headers["X-Codebook"]) == (f"{model}@1", CODEBOOK.id)
    assert "X-PSNR" not in response.headers


@pytest.mark.parametrize(("model", "codebooks"), [("greys", 1), ("pairs", 2)])
def test_container(client: TestClient, model: str, codebooks: int) -> None:
    query = f"/v1/tokenize?model={model}&psnr=1"
    response = client.post(query, files=FILES, headers={"Accept": f"{MEDIA_TYPE}, {NPY};q=0.5"})
    assert (response.status_code, response.headers["Content-Type"]) == (200, MEDIA_TYPE)
    grids = unpack(response.content)
    assert np.array_equal(grids.tokens, tokens_of(PIXELS, codebooks).reshape(3, codebooks, 4, 4))
    assert (grids.codebook, grids.size) == (CODEBOOK.id, 16)
    expected = [psnr(pixels, image_of(tokens_of(pixels[None], codebooks))[0]) for pixels in PIXELS]
    assert response.headers["X-PSNR"] == ", ".join(f"{value:.2f}" for value in expected)


def test_a_file_has_no_place_for_an_error(client: TestClient) -> None:
    files = [FILES[0], ("image", b"not an image")]
    problem = client.post("/v1/tokenize", files=files, headers={"Accept": NPY}).json()
    assert (problem["status"], problem["code"]) == (415, "unsupported_media")
    assert problem["detail"].startswith("Image 1, counted from 0: ")


@pytest.mark.parametrize(("kind", "tolerance"), [("png", 0), ("jpeg", 4), ("webp", 6)])
def test_reconstruct_to_an_image(client: TestClient, kind: str, tolerance: int) -> None:
    response = client.post("/v1/reconstruct?quality=95", content=IMAGES[0], headers={"Accept": f"image/{kind}"})
    assert (response.status_code, response.headers["Content-Type"]) == (200, f"image/{kind}")
    expected = image_of(tokens_of(PIXELS[:1]))[0]
    assert np.abs(picture(response.content).astype(int) - expected).max() <= tolerance
    assert response.headers["X-PSNR"] == f"{psnr(PIXELS[0], expected):.2f}"
    assert response.headers["X-SSIM"] == f"{ssim(PIXELS[0], expected):.4f}"
    assert response.headers["X-Model"] == "greys@1"


def test_reconstruct_a_batch(client: TestClient) -> None:
    answer = client.post("/v1/reconstruct", files=[*FILES, ("image", FLAT)]).json()
    ReconstructResponse.model_validate(answer)
    for result, pixels in zip(answer["results"], PIXELS, strict=False):
        expected = image_of(tokens_of(pixels[None]))[0]
        assert result["reconstruction"].items() >= {"media_type": "image/png", "width": SIZE, "height": SIZE}.items()
        assert result["psnr"] == pytest.approx(psnr(pixels, expected))
        assert result["ssim"] == pytest.approx(ssim(pixels, expected))
    assert (answer["results"][3]["psnr"], answer["results"][3]["ssim"]) == (None, 1.0)


def test_reconstruct_to_npy(client: TestClient) -> None:
    response = client.post("/v1/reconstruct", files=[*FILES, ("image", FLAT)], headers={"Accept": NPY})
    assert np.array_equal(load(response.content)[:3], image_of(tokens_of(PIXELS)))
    assert response.headers["X-PSNR"].split(", ")[3] == "inf"
    assert response.headers["X-SSIM"].split(", ")[3] == "1.0000"


def test_several_images_do_not_fit_into_one_file(client: TestClient) -> None:
    response = client.post("/v1/reconstruct", files=FILES, headers={"Accept": "image/webp"})
    problem = response.json()
    assert (problem["status"], problem["code"], problem["field"]) == (406, "not_acceptable", "Accept")
    assert "3 images do not fit into one image/webp; ask for application/json or application/x-npy" in problem["detail"]
    fallback = client.post("/v1/reconstruct", files=FILES, headers={"Accept": "image/webp, application/json;q=0.1"})
    assert len(fallback.json()["results"]) == 3


@pytest.mark.parametrize("route", ["tokenize", "reconstruct"])
def test_nothing_of_what_there_is_is_accepted(client: TestClient, route: str) -> None:
    problem = client.post(f"/v1/{route}", content=IMAGES[0], headers={"Accept": "text/html"}).json()
    assert (problem["status"], problem["field"]) == (406, "Accept")
    assert NPY in problem["detail"]


@pytest.mark.parametrize(
    ("route", "query", "status", "field"),
    [
        ("tokenize", "model=colours", 404, "model"),
        ("reconstruct", "model=colours", 404, "model"),
        ("classify", "model=greys", 404, "model"),
        ("tokenize", "psnr=perhaps", 422, "psnr"),
        ("tokenize", "quality=5", 422, "quality"),
        ("reconstruct", "quality=0", 422, "quality"),
        ("reconstruct", "quality=101", 422, "quality"),
        ("reconstruct", "psnr=true", 422, "psnr"),
    ],
)
def test_bad_parameters(client: TestClient, route: str, query: str, status: int, field: str) -> None:
    problem = client.post(f"/v1/{route}?{query}", content=IMAGES[0]).json()
    assert (problem["status"], problem["field"]) == (status, field)


def test_several_tokenizers_and_no_default(make_client, repository: Path) -> None:
    add_tokenizer(repository)
    add_tokenizer(repository, "pairs", codebooks=2)
    client = make_client()
    for route in ("tokenize", "detokenize", "reconstruct"):
        body = IMAGES[0] if route != "detokenize" else b'{"tokens": [[0]]}'
        problem = client.post(f"/v1/{route}", content=body).json()
        assert (problem["status"], problem["code"]) == (400, "model_not_chosen")
        assert "greys, pairs" in problem["detail"]


def test_a_default_of_another_task_is_said(make_client, repository: Path) -> None:
    add_tokenizer(repository)
    problem = make_client(default_tokenizer="colours").post("/v1/tokenize", content=IMAGES[0]).json()
    assert (problem["status"], problem["field"]) == (404, "model")
    assert "colours is not a model for tokenize" in problem["detail"]


@pytest.mark.parametrize("missing", ["tokenize", "detokenize"])
@pytest.mark.parametrize("route", ["tokenize", "detokenize", "reconstruct"])
def test_a_tokenizer_with_half_its_engines(make_client, repository: Path, missing: str, route: str) -> None:
    add_tokenizer(repository)
    shutil.rmtree(repository / f"greys.{missing}")
    client = make_client()
    body = IMAGES[0] if route != "detokenize" else b'{"tokens": [[0]]}'
    problem = client.post(f"/v1/{route}?model=greys", content=body).json()
    assert (problem["status"], problem["code"]) == (503, "model_unavailable")
    assert f"the engines for {missing} are missing" in problem["detail"]


def test_engines_of_different_codebooks_do_not_serve(make_client, repository: Path) -> None:
    add_tokenizer(repository)
    manifest = repository / "greys.detokenize/1/manifest.json"
    manifest.write_text(manifest.read_text().replace(CODEBOOK.id, "beef" * 16))
    problem = make_client().post("/v1/reconstruct?model=greys", content=IMAGES[0]).json()
    assert (problem["status"], problem["code"]) == (503, "model_unavailable")
    assert "different codebooks" in problem["detail"]


def test_an_encoder_alone_tokenizes_but_cannot_come_back(make_client, repository: Path) -> None:
    add_tokenizer(repository, roles=("tokenize",))
    client = make_client()
    assert client.post("/v1/tokenize?model=greys", content=IMAGES[0]).status_code == 200
    for route in ("tokenize?psnr=true&", "reconstruct?", "detokenize?"):
        body = b'{"tokens": [[0]]}' if route.startswith("de") else IMAGES[0]
        problem = client.post(f"/v1/{route}model=greys", content=body).json()
        assert (problem["status"], problem["field"]) == (404, "model")
        assert "detokenize" in problem["detail"]


def test_stages_and_images_are_counted_as_for_every_task(client: TestClient) -> None:
    series = counts(client, "vitrine_request_seconds_count")
    assert all(series["503", "", task] >= 0 for task in ("tokenize", "detokenize", "reconstruct"))
    before = counts(client, "vitrine_images_total")
    timing = client.post("/v1/reconstruct", files=FILES).headers["Server-Timing"]
    assert [part.partition(";")[0] for part in timing.split(", ")] == [
        "read", "parse", "decode", "resize", "queue", "infer", "finish", "encode",
    ]  # fmt: skip
    client.post("/v1/tokenize", content=make_png())
    after = counts(client, "vitrine_images_total")
    assert after["greys", "reconstruct"] - before.get(("greys", "reconstruct"), 0) == 3
    assert after["greys", "tokenize"] - before.get(("greys", "tokenize"), 0) == 1
