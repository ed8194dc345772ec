"""A small typed client of the gateway, for the command line, the tests and anyone's Python.

with Client("http://127.0.0.1:8000") as client:
    answer = client.classify(Path("photo.jpg"), top_k=3)
    print(answer.results[0].predictions[0].label)

    grids = client.tokenize(Path("photo.jpg")).grids
    Path("photo.png").write_bytes(client.detokenize(grids).results[0].reconstruction.data)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import Base64Bytes, BeforeValidator, Field, TypeAdapter, ValidationError

from app import token_format
from app.errors import InputError
from app.token_format import TokenGrids

DEFAULT_URL = "http://127.0.0.1:8000"
PHOTO_FAULTS = frozenset(
    (
        "unreadable",
        "too_large",
        "unsupported_media",
        "undecodable_image",
        "malformed_tokens",
        "inference_failed",
        "full",
        "rate_limited",
        "deadline_exceeded",
    )
)
"""Codes of an error that concerns one image: the next may well be answered."""

Photo = Path | bytes
SavedGrids = Path | bytes
T = TypeVar("T")


class ClientError(Exception):
    """The gateway did not answer, or answered with an error; the message is its sentence for people.

    `code` is the server's stable code, or `unreachable`, `timeout`, `unreadable` (a file here), `not_vitrine`; `status` and
    `request_id` are None when no answer came. Token grids that cannot be sent have the code that the server would give.
    """

    def __init__(self, detail: str, *, code: str, status: int | None = None, request_id: str | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.code = code
        self.status = status
        self.request_id = request_id


@dataclass(frozen=True)
class Prediction:
    """One class; `score` is a probability in 0..1."""

    label: str
    class_id: int
    score: float


@dataclass(frozen=True)
class Image:
    """What the gateway received and did to it; sizes in pixels of the upright original."""

    format: str
    width: int
    height: int
    orientation: int
    mode: str
    frames: int
    scaled: int
    conversions: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """Why one image, or a whole request, has no answer."""

    code: str
    status: int
    detail: str


@dataclass(frozen=True)
class ClassifyItem:
    """One image of the request: its predictions, best first, or the `error` it alone met."""

    index: int
    predictions: tuple[Prediction, ...] | None = None
    image: Image | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Classification:
    """The answer to one request, one item per image in its order. `id` is the request id."""

    id: str
    model: str
    version: int
    results: tuple[ClassifyItem, ...]
    warnings: tuple[str, ...] = ()


Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the upright original."""


@dataclass(frozen=True)
class Picture:
    """An image that the gateway made: a file of `media_type`, and its size in pixels."""

    data: Annotated[Base64Bytes, Field(alias="base64")]
    media_type: str
    width: int
    height: int


@dataclass(frozen=True)
class RunLengths:
    """A mask as pycocotools.mask reads it (as `vars(mask)`): `size` is height, width."""

    size: tuple[int, int]
    counts: str


@dataclass(frozen=True)
class DetectedObject:
    """One object; `score` in 0..1, `mask` where it was asked for."""

    label: str
    class_id: int
    score: float
    box: Box
    mask: RunLengths | None = None


@dataclass(frozen=True)
class DetectItem:
    """One image of the request: what was found, best first, and if asked the picture of it; or the `error` it alone met."""

    index: int
    detections: tuple[DetectedObject, ...] | None = None
    rendered: Picture | None = None
    image: Image | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Detection:
    """The answer to one request, one item per image in its order."""

    id: str
    model: str
    version: int
    results: tuple[DetectItem, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class GroundedPhrase:
    """Where a phrase leads; `box` is None where a chat model named none, `score` where the model has none.

    `truncated`: its last words were not read.
    """

    phrase: str
    box: Box | None
    score: float | None
    truncated: bool


@dataclass(frozen=True)
class GroundItem:
    """One image of the request: a box per phrase, in their order, and if asked the picture of them; or the `error` it alone met."""

    index: int
    groundings: tuple[GroundedPhrase, ...] | None = None
    rendered: Picture | None = None
    image: Image | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Grounding:
    """The answer to one request, one item per image in its order."""

    id: str
    model: str
    version: int
    results: tuple[GroundItem, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokenization:
    """The tokens of every image of the request, in its order; if asked, `psnr` of each in dB (infinite: not a value differs)."""

    id: str
    model: str
    version: int
    grids: TokenGrids
    psnr: tuple[float, ...] | None = None


@dataclass(frozen=True)
class DetokenizeItem:
    """One grid of the request: the image that it stands for, or the `error` it alone met."""

    index: int
    reconstruction: Picture | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Detokenization:
    """The answer to one request, one item per grid in its order."""

    id: str
    model: str
    version: int
    results: tuple[DetokenizeItem, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReconstructItem:
    """One image of the request: what comes back through the tokens, or the `error` it alone met.

    `psnr` in dB (infinite: not a value differs) and `ssim`, against the image as the engine gets it.
    """

    index: int
    reconstruction: Picture | None = None
    psnr: Annotated[float | None, BeforeValidator(lambda value: math.inf if value is None else value)] = None
    ssim: float | None = None
    image: Image | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Reconstruction:
    """The answer to one request, one item per image in its order."""

    id: str
    model: str
    version: int
    results: tuple[ReconstructItem, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class EmbedItem:
    """One image or text of the request: its vector of unit length, or the `error` it alone met.

    Of a text, `tokens` is how many it made and `truncated` whether its end was not read; both are None of an image.
    """

    index: int
    embedding: tuple[float, ...] | None = None
    tokens: int | None = None
    truncated: bool | None = None
    image: Image | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Embeddings:
    """The answer to one request, one item per image and then one per text, in their order."""

    id: str
    model: str
    version: int
    results: tuple[EmbedItem, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SimilarityItem:
    """One image of the request against every text, in their order: cosines, and what the model makes of them; or its `error`."""

    index: int
    similarities: tuple[float, ...] | None = None
    probabilities: tuple[float, ...] | None = None
    image: Image | None = None
    error: Problem | None = None


@dataclass(frozen=True)
class Similarities:
    """The answer to one request, one item per image in its order."""

    id: str
    model: str
    version: int
    results: tuple[SimilarityItem, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """One model of the repository. `version` is the one that answers when none is named; `phrases` is how many a detector without
    classes of its own looks for at once, None of other models."""

    id: str
    task: str | None
    version: int | None
    versions: tuple[int, ...]
    engine: str | None
    precision: str | None
    status: str
    default: bool = False
    problems: tuple[str, ...] = ()
    phrases: int | None = None


@dataclass(frozen=True)
class ModelDetail(ModelInfo):
    """One model, with the manifest of the version that was named, else of the one that answers; None when none can."""

    manifest: dict[str, Any] | None = None


@dataclass(frozen=True)
class _ModelList:
    data: tuple[ModelInfo, ...]


_CLASSIFICATION = TypeAdapter(Classification)
_DETECTION = TypeAdapter(Detection)
_GROUNDING = TypeAdapter(Grounding)
_DETOKENIZATION = TypeAdapter(Detokenization)
_RECONSTRUCTION = TypeAdapter(Reconstruction)
_EMBEDDINGS = TypeAdapter(Embeddings)
_SIMILARITIES = TypeAdapter(Similarities)
_MODEL = TypeAdapter(ModelDetail)
_MODELS = TypeAdapter(_ModelList)
_PROBLEM = TypeAdapter(Problem)


class Client:
    """Talks to one gateway over kept-alive connections. Use it as a context manager or call `close`."""

    def __init__(self, url: str = DEFAULT_URL, timeout: float = 60.0, api_key: str | None = None) -> None:
        """`timeout` is in seconds, for each of connecting, sending and waiting for the answer; `api_key` is for one that asks.

        Raises:
            ClientError: `url` is not an http or https address.
        """
        address = _address(url)
        self.url = str(address)
        # A gateway on this machine is not to be looked for behind the environment's proxy.
        local = address.host in ("127.0.0.1", "::1", "localhost")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=address, timeout=timeout, trust_env=not local, headers=headers)

    def classify(
        self,
        photos: Photo | Sequence[Photo],
        *,
        model: str | None = None,
        top_k: int | None = None,
        labels: Sequence[str] = (),
        template: str | Sequence[str] = (),
    ) -> Classification:
        """Classify one photo or several in one request: paths or encoded bytes. One that fails among several is an item's error.

        Args:
            labels: among which to classify, by a model that compares images with texts.
            template: a sentence with `{}` for the label, or several.

        Raises:
            ClientError: a file cannot be read, no answer came, or the whole request was refused.
        """
        templates = [template] if isinstance(template, str) else list(template)
        fields = {"labels": list(labels), "template": templates} if labels or templates else {}
        return self._call(
            _CLASSIFICATION, "POST", "/v1/classify", params=_given(model=model, top_k=top_k), data=fields, files=_files(photos)
        )

    def embed(
        self, photos: Photo | Sequence[Photo] = (), texts: str | Sequence[str] = (), *, model: str | None = None
    ) -> Embeddings:
        """The vectors of photos and of texts in one request. One of them that fails among several is an item's error.

        Raises:
            ClientError: a file cannot be read, no answer came, or the whole request was refused.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        body: dict[str, Any] = (
            {"data": {"texts": several}, "files": files} if (files := _files(photos)) else {"json": {"texts": several}}
        )
        return self._call(_EMBEDDINGS, "POST", "/v1/embed", params=_given(model=model), **body)

    def similarity(self, photos: Photo | Sequence[Photo], texts: str | Sequence[str], *, model: str | None = None) -> Similarities:
        """How well each photo fits each text. A photo that fails among several is an item's error.

        Raises:
            ClientError: a file cannot be read, no answer came, or a text or the whole request was refused.
        """
        fields = {"texts": [texts] if isinstance(texts, str) else list(texts)}
        return self._call(_SIMILARITIES, "POST", "/v1/similarity", params=_given(model=model), data=fields, files=_files(photos))

    def detect(
        self,
        photos: Photo | Sequence[Photo],
        *,
        model: str | None = None,
        threshold: float | None = None,
        max_detections: int | None = None,
        classes: Sequence[str | int] = (),
        phrases: Sequence[str] = (),
        masks: bool = False,
        render: bool = False,
    ) -> Detection:
        """Find objects in one photo or several in one request. One that fails among several is an item's error.

        Args:
            threshold: the lowest score to give.
            classes: names or ids of the only ones to give.
            phrases: what a model without classes of its own is to look for.
            masks: give the masks of instances, too.
            render: give the pictures with boxes, masks and labels drawn onto them, as PNG.

        Raises:
            ClientError: a file cannot be read, no answer came, or the whole request was refused.
        """
        options = _given(model=model, threshold=threshold, max_detections=max_detections, classes=list(classes) or None)
        params = options | _given(phrases=list(phrases) or None, masks=masks or None, render=render or None)
        return self._call(_DETECTION, "POST", "/v1/detect", params=params, files=_files(photos))

    def ground(
        self, photos: Photo | Sequence[Photo], phrases: str | Sequence[str], *, model: str | None = None, render: bool = False
    ) -> Grounding:
        """Find what phrases speak of in one photo or several in one request. One that fails among several is an item's error.

        Args:
            render: give the pictures with the boxes drawn onto them, as PNG.

        Raises:
            ClientError: a file cannot be read, no answer came, or a phrase or the whole request was refused.
        """
        params = _given(model=model, phrase=[phrases] if isinstance(phrases, str) else list(phrases), render=render or None)
        return self._call(_GROUNDING, "POST", "/v1/ground", params=params, files=_files(photos))

    def tokenize(self, photos: Photo | Sequence[Photo], *, model: str | None = None, psnr: bool = False) -> Tokenization:
        """The tokens of one photo or several in one request, which come as a container, about a third of the JSON.

        A container has no place for errors: when one photo of several fails, so does the request.

        Args:
            psnr: turn the tokens into images again and say how close they are.

        Raises:
            ClientError: a file cannot be read, no answer came, or a photo or the whole request was refused.
        """
        response = self._answer(
            "POST",
            "/v1/tokenize",
            params=_given(model=model, psnr=psnr or None),
            files=_files(photos),
            headers={"Accept": token_format.MEDIA_TYPE},
        )
        try:
            name, _, version = response.headers["X-Model"].rpartition("@")
            ratios = tuple(float(ratio) for ratio in response.headers["X-PSNR"].split(",")) if psnr else None
            grids = token_format.unpack(response.content)
            return Tokenization(response.headers["X-Request-ID"], name, int(version), grids, ratios)
        except (KeyError, ValueError, InputError) as error:
            raise _foreign(response) from error

    def detokenize(self, grids: TokenGrids | SavedGrids, *, model: str | None = None) -> Detokenization:
        """The images, as PNG, that token grids stand for: what `tokenize` gave, or a saved container, as a path or its bytes.

        Raises:
            ClientError: the file cannot be read or is no token container, no answer came, or the whole request was refused.
        """
        try:
            container = token_format.pack(grids if isinstance(grids, TokenGrids) else read_grids(grids))
        except InputError as error:
            raise ClientError(error.detail, code=error.code) from error
        headers = {"Content-Type": token_format.MEDIA_TYPE, "Accept": "application/json"}
        return self._call(_DETOKENIZATION, "POST", "/v1/detokenize", params=_given(model=model), content=container, headers=headers)

    def reconstruct(self, photos: Photo | Sequence[Photo], *, model: str | None = None) -> Reconstruction:
        """Photos through the tokens and back, as PNG, and how much is left. One that fails among several is an item's error.

        Raises:
            ClientError: a file cannot be read, no answer came, or the whole request was refused.
        """
        return self._call(_RECONSTRUCTION, "POST", "/v1/reconstruct", params=_given(model=model), files=_files(photos))

    def models(self) -> tuple[ModelInfo, ...]:
        """Every model of the repository, those that cannot serve included.

        Raises:
            ClientError: no answer came.
        """
        return self._call(_MODELS, "GET", "/v1/models").data

    def model(self, name: str) -> ModelDetail:
        """One model, NAME or NAME@VERSION, with its manifest.

        Raises:
            ClientError: there is none of that name (code `model_not_found`), or no answer came.
        """
        return self._call(_MODEL, "GET", f"/v1/models/{quote(name, safe='@')}")

    def ready(self) -> bool:
        """Whether the gateway answers and its default models have computed something."""
        try:
            return self._send("GET", "/readyz").is_success
        except ClientError:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _call(self, shape: TypeAdapter[T], method: str, path: str, **request: Any) -> T:
        response = self._answer(method, path, **request)
        try:
            return shape.validate_json(response.content)
        except ValidationError as error:
            raise _foreign(response) from error

    def _answer(self, method: str, path: str, **request: Any) -> httpx2.Response:
        """What was answered, unless it is a problem document."""
        response = self._send(method, path, **request)
        if response.headers.get("content-type", "").startswith("application/problem+json"):
            raise _refusal(response)
        return response

    def _send(self, method: str, path: str, **request: Any) -> httpx2.Response:
        """The one place where the HTTP library's exceptions become ours."""
        try:
            return self._http.request(method, path, **request)
        except httpx2.ConnectError as error:
            raise ClientError(f"Nothing answers at {self.url}.", code="unreachable") from error
        except httpx2.TimeoutException as error:
            raise ClientError(f"{self.url} did not answer in time.", code="timeout") from error
        except httpx2.HTTPError as error:
            raise ClientError(f"The connection to {self.url} failed: {error}.", code="unreachable") from error


def read_grids(saved: SavedGrids) -> TokenGrids:
    """The grids of a saved container: a path, or its bytes.

    Raises:
        ClientError: the file cannot be read, or it is no token container.
    """
    try:
        return token_format.unpack(_read(saved))
    except InputError as error:
        where = f"{saved}: " if isinstance(saved, Path) else ""
        raise ClientError(f"{where}{error.detail}", code=error.code) from error


def _address(url: str) -> httpx2.URL:
    try:
        address = httpx2.URL(url.rstrip("/"))
    except httpx2.InvalidURL as error:
        raise ClientError(f"{url!r} is not an address: {error}.", code="unreachable") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ClientError(f"{url!r} is not an address such as {DEFAULT_URL}.", code="unreachable")
    return address


def _given(**parameters: object) -> dict[str, object]:
    """Query parameters without those that are left to the gateway."""
    return {name: value for name, value in parameters.items() if value is not None}


def _files(photos: Photo | Sequence[Photo]) -> list[tuple[str, tuple[str, bytes, str]]]:
    several = [photos] if isinstance(photos, Path | bytes) else photos
    return [("image", (_name(photo), _read(photo), "application/octet-stream")) for photo in several]


def _name(photo: Photo) -> str:
    return photo.name if isinstance(photo, Path) else "image"


def _read(photo: Photo) -> bytes:
    if isinstance(photo, bytes):
        return photo
    try:
        return photo.read_bytes()
    except OSError as error:
        raise ClientError(f"{photo} cannot be read: {error.strerror}.", code="unreadable") from error


def _refusal(response: httpx2.Response) -> ClientError:
    try:
        problem = _PROBLEM.validate_json(response.content)
    except ValidationError:
        return _foreign(response)
    request_id = response.headers.get("x-request-id")
    return ClientError(problem.detail, code=problem.code, status=response.status_code, request_id=request_id)


def _foreign(response: httpx2.Response) -> ClientError:
    detail = f"{response.url} answered {response.status_code}, but not as a Vitrine gateway of this version does."
    return ClientError(detail, code="not_vitrine", status=response.status_code)
