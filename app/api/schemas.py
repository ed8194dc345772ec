"""The shapes of requests and answers, as OpenAPI shows them."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from app.errors import InvalidValueError, MalformedRequestError, TooLargeError
from app.tasks.classify import ClassifyOptions
from app.tasks.detect import DetectOptions
from app.tasks.ground import GroundOptions
from app.tasks.tokenize import TokenizeOptions

T = TypeVar("T")

Several = Annotated[list[T], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
"""A field that may come several times, or as a list in JSON."""


class Base64Image(BaseModel):
    base64: str = Field(description="the encoded image file, in base64")


class UrlImage(BaseModel):
    url: str = Field(description="a data URL; http and https only where the server allows it")


class TaskRequest(BaseModel):
    """Fields that every task takes: as query parameters, form fields or members of a JSON body."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="NAME or NAME@VERSION; by default the task's default model", max_length=200)

    def options(self) -> Any:
        """What the task is told; nothing where it has no options."""
        return None

    def check(self, images: int, limit: int) -> None:
        """Hold the fields against the number of images, and what they make of it against the server's `limit`.

        Raises:
            InvalidValueError, TooLargeError: they do not go together.
        """


class ClassifyRequest(TaskRequest):
    top_k: int | None = Field(None, ge=1, description="how many classes to give; by default 5")
    labels: Several[str] = Field([], description="among which to classify, by a model that compares images with texts; repeat it")
    template: Several[str] = Field(
        [], description="a sentence with {} for the label, as in 'a photo of a {}'; of several, the vectors' mean counts"
    )

    def options(self) -> ClassifyOptions:
        return ClassifyOptions(top_k=self.top_k)


class EmbedRequest(TaskRequest):
    texts: Several[str] = Field([], description="texts to embed, beside images or without; repeat it for several")

    def check(self, images: int, limit: int) -> None:
        if not images and not self.texts:
            raise MalformedRequestError("There is nothing to embed; send an image or several, texts, or both.", field="texts")


class SimilarityRequest(TaskRequest):
    texts: Several[str] = Field(min_length=1, description="what to compare each image with; repeat it for several")


class DrawnRequest(TaskRequest):
    """Of a task whose answer can be drawn onto the image."""

    render: bool = Field(False, description="add the picture with the answer drawn onto it, a PNG in base64, to a JSON answer")
    quality: int = Field(90, ge=1, le=100, description="of a JPEG or WebP answer")


class DetectRequest(DrawnRequest):
    threshold: float = Field(0.5, ge=0, le=1, description="lowest score to give")
    max_detections: int | None = Field(None, ge=1, description="how many to give at most; by default all from the threshold on")
    classes: Several[str | int] = Field([], description="names or ids of the only classes to give; repeat it for several")
    phrases: Several[str] = Field([], description="what a model without classes of its own is to look for; repeat it for several")
    masks: bool = Field(False, description="give the masks of instances too, in COCO's compressed run lengths")
    format: Literal["json", "coco"] = Field("json", description="coco: a list of results that pycocotools loads as it is")
    image_id: Several[int] = Field([], description="COCO's ids of the images, one for each; by default 0, 1, 2 ...")

    def options(self) -> DetectOptions:
        return DetectOptions(self.threshold, self.max_detections, tuple(self.classes), self.masks, tuple(self.phrases))

    def check(self, images: int, limit: int) -> None:
        if self.image_id and len(self.image_id) != images:
            raise InvalidValueError(f"There are {len(self.image_id)} ids for {images} images; give one for each.", field="image_id")


class GroundRequest(DrawnRequest):
    phrase: Several[str] = Field(min_length=1, description="what to look for in each image; repeat it for several")

    def options(self) -> GroundOptions:
        return GroundOptions(tuple(self.phrase))

    def check(self, images: int, limit: int) -> None:
        rows = images * len(self.phrase)
        if rows > limit:
            detail = f"Phrases times images are {rows} inferences in one request; this server takes {limit}."
            raise TooLargeError(detail, field="phrase")


class TokenizeRequest(TaskRequest):
    psnr: bool = Field(False, description="turn the tokens into an image again and say how close it is to the engine's input")

    def options(self) -> TokenizeOptions:
        return TokenizeOptions(psnr=self.psnr)


class ReconstructRequest(TaskRequest):
    quality: int = Field(90, ge=1, le=100, description="of a JPEG or WebP answer")


class DetokenizeRequest(ReconstructRequest):
    codebook: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="id of the codebook that the tokens are of; refused when it is not the model's"
    )


class ImageResponse(BaseModel):
    """What arrived and what was done to it."""

    format: str
    width: int = Field(description="pixels, upright")
    height: int
    orientation: int = Field(description="EXIF orientation that was undone; 1 is none")
    mode: str = Field(description="colour mode of the file")
    frames: int
    scaled: int = Field(description="the JPEG was decoded at 1/scaled of its size")
    conversions: list[str]


class ProblemResponse(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = None
    request_id: str | None = None


class PredictionResponse(BaseModel):
    label: str
    class_id: int
    score: float


class ClassifyItem(BaseModel):
    """One image: `predictions`, or `error` when this image alone could not be answered."""

    index: int
    image: ImageResponse | None = None
    predictions: list[PredictionResponse] | None = None
    error: ProblemResponse | None = None


class TaskResponse(BaseModel):
    id: str = Field(description="request id, also in X-Request-ID")
    task: str
    model: str
    version: int
    warnings: list[str] = Field(description="remarks on the request, such as a wrong Content-Type")


class ClassifyResponse(TaskResponse):
    results: list[ClassifyItem]


class PictureResponse(BaseModel):
    """An image that the server made."""

    base64: str
    media_type: Literal["image/png"]
    width: int = Field(description="pixels")
    height: int


# Of one schema for all of their items: few generators of clients, and not Schemathesis, know prefixItems.
BoxResponse = Annotated[
    tuple[float, float, float, float],
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}),
]
HeightAndWidth = Annotated[
    tuple[int, int], WithJsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2})
]


class RunLengthsResponse(BaseModel):
    """COCO's compressed run lengths, as pycocotools.mask reads them."""

    size: HeightAndWidth = Field(description="height, width of the image")
    counts: str


class DetectionResponse(BaseModel):
    label: str
    class_id: int
    score: float
    box: BoxResponse = Field(description="left, top, right, bottom in pixels of the upright original")
    mask: RunLengthsResponse | None = Field(None, description="only when asked for")


class DetectItem(BaseModel):
    """One image: what was found, best first, or `error` when this image alone could not be answered."""

    index: int
    image: ImageResponse | None = None
    detections: list[DetectionResponse] | None = None
    rendered: PictureResponse | None = Field(None, description="only when asked for")
    error: ProblemResponse | None = None


class DetectResponse(TaskResponse):
    results: list[DetectItem]


class CocoResponse(BaseModel):
    """One row of COCO's results: an object in an image."""

    image_id: int
    category_id: int = Field(description="the model's class id")
    bbox: BoxResponse = Field(description="left, top, width, height in pixels of the upright original")
    score: float
    segmentation: dict[str, Any] | None = Field(None, description="size and counts of compressed run lengths, only when asked for")


class GroundingResponse(BaseModel):
    phrase: str
    box: BoxResponse | None = Field(
        description="left, top, right, bottom in pixels of the upright original; null where a chat model names none"
    )
    score: float | None = Field(description="null where the model has no confidence")
    truncated: bool = Field(description="the phrase was too long, and its last words were not read")


class GroundItem(BaseModel):
    """One image: a box for each phrase, in their order, or `error` when this image alone could not be answered."""

    index: int
    image: ImageResponse | None = None
    groundings: list[GroundingResponse] | None = None
    rendered: PictureResponse | None = Field(None, description="only when asked for")
    error: ProblemResponse | None = None


class GroundResponse(TaskResponse):
    results: list[GroundItem]


class CodebookResponse(BaseModel):
    """The codes that the tokens index; the same in every answer of one build of a model."""

    id: str = Field(description="SHA-256 of the codes")
    size: int = Field(description="a token is 0 to size - 1")
    count: int = Field(description="codebooks, and so tokens at each position")


class TokenizeItem(BaseModel):
    """One image: its tokens, or `error` when this image alone could not be answered."""

    index: int
    image: ImageResponse | None = None
    tokens: list[list[int]] | list[list[list[int]]] | None = Field(
        None, description="[h][w], or [count][h][w] where the model has several codebooks"
    )
    grid: HeightAndWidth | None = Field(None, description="height, width in positions")
    codebook: CodebookResponse | None = None
    bits_per_token: int | None = Field(None, description="the binary logarithm of the codebook's size, rounded up")
    bits_per_pixel: float | None = Field(None, description="of the engine's input")
    psnr: float | None = Field(None, description="dB, only when asked for; null when not a value differs")
    error: ProblemResponse | None = None


class TokenizeResponse(TaskResponse):
    results: list[TokenizeItem]


class DetokenizeItem(BaseModel):
    index: int
    reconstruction: PictureResponse | None = None
    error: ProblemResponse | None = None


class DetokenizeResponse(TaskResponse):
    results: list[DetokenizeItem]


class ReconstructItem(DetokenizeItem):
    image: ImageResponse | None = None
    psnr: float | None = Field(None, description="dB against the engine's input; null when not a value differs")
    ssim: float | None = Field(None, description="of Wang et al. 2004, the mean over the channels; 1 for the same image")


class ReconstructResponse(TaskResponse):
    results: list[ReconstructItem]


class EmbedItem(BaseModel):
    """An image or a text: its vector, or `error` when it alone could not be answered. Images come first."""

    index: int
    image: ImageResponse | None = None
    embedding: list[float] | None = Field(None, description="of unit length")
    tokens: int | None = Field(None, description="of a text, marks of beginning and end included")
    truncated: bool | None = Field(None, description="the text was too long, and its end was not read")
    error: ProblemResponse | None = None


class EmbedResponse(TaskResponse):
    results: list[EmbedItem]


class SimilarityItem(BaseModel):
    """One image against every text, in their order, or `error` when this image alone could not be answered."""

    index: int
    image: ImageResponse | None = None
    similarities: list[float] | None = Field(None, description="cosines")
    probabilities: list[float] | None = Field(
        None, description="what the model makes of them: of each text among all, or of each for itself"
    )
    error: ProblemResponse | None = None


class SimilarityResponse(TaskResponse):
    results: list[SimilarityItem]


class ModelResponse(BaseModel):
    """One row of the list, in the shape of OpenAI's with what a vision server adds."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="seconds since 1970")
    owned_by: str = "vitrine"
    task: str | None = Field(description="null when no version of it could be read")
    version: int | None = Field(description="the version that answers when none is named")
    versions: list[int]
    engine: str | None
    precision: str | None
    phrases: int | None = Field(None, description="how many different phrases a detector without classes of its own takes at once")
    default: bool
    status: Literal["ready", "available", "failed", "unloaded"] = Field(
        description="available: loads on first use; unloaded: by an administrator"
    )
    problems: list[str]


class ModelsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelResponse]


class ModelDetailResponse(ModelResponse):
    manifest: dict[str, Any] | None = Field(description="of the version that is named, else of the one that answers")


class HealthResponse(BaseModel):
    status: str
    reasons: list[str] = []
    troubles: list[str] = []
