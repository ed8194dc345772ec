"""The contract between export and serving: what one published engine is, read from its `manifest.json`.

    model_repository/NAME/VERSION/{model.onnx, manifest.json, golden/, [tokenizer.json]}    NAME: MODEL, or MODEL.ROLE for several

Paths in a manifest are relative to its version directory and never leave it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")

DType = Literal["uint8", "int32", "int64", "float16", "float32"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Role = Literal["classify", "tokenize", "detokenize", "detect", "ground", "image", "text", "vision", "embed", "decoder"]


class ManifestError(Exception):
    """An entry of the repository cannot be used; the message is a sentence for `/v1/models` and the log."""


def _inside(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in path:
        raise ValueError(f"{path!r} must be a relative path inside the version directory")
    return path


RelativePath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(Record):
    """One named tensor; the first axis is the batch and is written as -1, every other axis that varies too."""

    name: str
    dtype: DType
    shape: tuple[int, ...]


class ArtifactFile(Record):
    """A file of the engine with the hash that loading checks."""

    file: RelativePath
    sha256: Sha256
    size: int = Field(ge=0, description="bytes")


class EngineSpec(ArtifactFile):
    kind: Literal["onnx", "tensorrt"]
    external_data: tuple[ArtifactFile, ...] = ()
    opset: int | None = None
    ir_version: int | None = None
    max_batch: int = Field(8, ge=1, description="rows per inference; also `max_batch_size` of config.pbtxt")


class Preprocessing(Record):
    """What the gateway does to an upright RGB image before the engine, and what the graph does after.

    Host side: resize by `policy` to `resize_height` x `resize_width` with an antialiased `interpolation`, then cut the
    central `height` x `width`.

    - `shortest_edge`: keep the aspect ratio, the shorter side becomes `resize_height` (= `resize_width`); the longer side is
      truncated to an integer, as torchvision's `Resize(int)` does.
    - `stretch`: exactly `resize_height` x `resize_width`, aspect ratio not kept.
    - `letterbox`: keep the aspect ratio, fit inside `height` x `width`, pad with `fill`: right and bottom, or with the `anchor`
      `centre` on all sides, the odd pixel right and bottom.
    - `native`: no frame; every image keeps about its own size, as `generation` says. `height` and `width` are the smallest sides.

    In the graph (recorded for people and for verification, not done by the gateway): `(pixel * scale - mean) / std`.
    """

    height: int = Field(ge=1, le=8192)
    width: int = Field(ge=1, le=8192)
    policy: Literal["shortest_edge", "stretch", "letterbox", "native"]
    resize_height: int = Field(ge=1, le=8192)
    resize_width: int = Field(ge=1, le=8192)
    interpolation: Interpolation
    anchor: Literal["corner", "centre"] = "corner"
    fill: tuple[int, int, int] = (0, 0, 0)
    scaled_decoding: bool = Field(False, description="JPEG may be decoded at 1/2, 1/4 or 1/8 when that is still large enough")
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)


class Source(Record):
    """Where the network and its weights came from."""

    library: Literal["timm", "transformers", "open_clip", "diffusers", "python", "onnx", "vitrine"]
    architecture: str
    arguments: dict[str, Any] = {}
    weights: Literal["pretrained", "checkpoint", "random", "embedded"]
    checkpoint: str | None = Field(None, description="file name or hub tag of the weights")
    checkpoint_sha256: Sha256 | None = None
    licence: str | None = None
    paper: str | None = None
    versions: dict[str, str] = Field({}, description="versions of the libraries that exported it")


class Finding(Record):
    """One observation of the TensorRT parser's table on the graph."""

    operator: str
    count: int
    severity: Literal["error", "warning"]
    message: str


class TensorRTReport(Record):
    """Static check of the graph against the operators and limits of the TensorRT parser; not a build."""

    parser: str
    convertible: bool
    findings: tuple[Finding, ...] = ()


class Check(Record):
    """One comparison made by `export/verify.py`: `value` is held against `limit`."""

    name: str
    value: float
    limit: float
    passed: bool
    unit: str = ""
    required: bool = Field(True, description="False: it only decides an option, such as scaled decoding")


class Verification(Record):
    """What agreed with the reference, on what, to what tolerance."""

    reference: str
    images: int
    batch_sizes: tuple[int, ...]
    checks: tuple[Check, ...]
    accuracy: dict[str, float] = Field({}, description="accuracy on a data set, measured through the REST API")

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks if check.required)


class Codebook(Record):
    """The codes that a tokenizer's two engines share: tokens of one are read by the other if their `id` is the same."""

    id: Sha256 = Field(description="of the effective codes, float32 little-endian [count,size,channels]")
    count: int = Field(ge=1, description="codebooks, and so tokens at each position of the grid")
    size: int = Field(ge=2, description="codes in each; a token is 0 to size - 1")
    channels: int = Field(ge=1)
    bits: int = Field(ge=1, description="of one token: the binary logarithm of `size`, rounded up")
    grid: tuple[int, int] = Field(description="height, width in positions")


class MaskCoefficients(Record):
    """Instance masks as the low frequencies of their cosine transform: the output `masks`, float32 [B,queries,count].

    A row's coefficients are the first `count` entries, in JPEG's zigzag order (row, column: 0,0 0,1 1,0 2,0 1,1 0,2 ...), of a
    matrix of `side` x `side` that is 0 elsewhere. The inverse of the orthonormal two-dimensional DCT-II of that matrix, stretched
    to the row's box, shows the object where it is above the middle between its smallest and its largest value.
    """

    encoding: Literal["dct"] = "dct"
    count: int = Field(ge=1)
    side: int = Field(ge=2, le=1024, description="pixels")

    @model_validator(mode="after")
    def _fits(self) -> "MaskCoefficients":
        if self.count > self.side**2:
            raise ValueError("a mask has no more coefficients than pixels")
        return self


class Detection(Record):
    """What a detector's rows mean: `boxes` float32 [B,queries,4], `scores` float32 [B,queries], `classes` int64 [B,queries].

    The best score comes first. A row that holds nothing has the score 0. Boxes are in shares of the network's frame, padding
    included, and may reach beyond it; masks are pasted into the whole box before anything is cut off. Where the
    engine takes phrases, a class is the place of one among them.

    `content`: the engine also takes `content` int32 [B,2], the height and width in pixels of the image inside the padded frame, and
    does not look at the rest.
    """

    queries: int = Field(ge=1, description="rows for one image")
    classes: int = Field(ge=1, description="a row's class is 0 to classes - 1, the place of its label")
    box: Literal["xyxy"] = "xyxy"
    score: Literal["sigmoid", "softmax", "objectness"] = Field(
        description="of each class alone; of a class among all and `no object`; or of the class times that there is an object"
    )
    content: bool = False
    masks: MaskCoefficients | None = None


class Text(Record):
    """How a phrase becomes the tensors `input_ids` and, where the engine takes it, `attention_mask`, int64 [B,length]; done by
    `app/text.py`.

    An engine that looks for several `phrases` at once takes `input_ids` int64 [B,phrases,length] alone; those that are not needed
    are all 0, and nothing is found for them.

    The tokenizer's file is one of Hugging Face's `tokenizers`. Normalisation (lower case, accents, control characters), the split
    into words and the special tokens around them are its own. `clean` is what open_clip does to a text before that: broken
    Unicode and HTML entities are mended and white space becomes one space each; then `lower` case, or `canonicalize`, which also
    drops punctuation.
    """

    tokenizer: ArtifactFile
    length: int = Field(ge=3, le=4096, description="ids of one phrase, special tokens included; shorter ones are padded at the end")
    padding_id: int = Field(0, ge=0)
    phrases: int | None = Field(default=None, ge=1, le=1024, description="how many an engine takes at once for an image; None: one")
    too_long: Literal["refuse", "truncate"] = Field(
        "refuse", description="a phrase of more ids is an error, or loses its last words"
    )
    clean: Literal["lower", "whitespace", "canonicalize"] | None = None


class Embedding(Record):
    """What the vectors of a dual encoder mean: `embedding` float32 [B,dimensions] of unit length, of its images and of its texts.

    How well an image and a text fit is `scale` times the product of their vectors. `softmax` over the texts makes probabilities of
    it; or a `sigmoid` for each text alone, of what it is with the `bias` added.
    """

    dimensions: int = Field(ge=1)
    scale: float = Field(gt=0)
    bias: float = 0.0
    activation: Literal["softmax", "sigmoid"] = "softmax"


class Generation(Record):
    """What a chat model's host must know beside its three engines; `app/generate.py` and `app/chat_text.py` go by it.

    A prompt is the `chat_template` (Jinja, as transformers renders it) filled with messages, in ids of the `tokenizer`; each image
    in it is one `image_token_id`, which becomes as many as the image has merged patches. Images keep their own size but for
    rounding: each side a multiple of `patch_size * merge_size`, all pixels together from `min_pixels` to `max_pixels`.
    """

    tokenizer: ArtifactFile
    chat_template: str
    max_length: int = Field(ge=2, description="tokens of a prompt and its answer together")
    vocabulary: int = Field(ge=2)
    image_token_id: int = Field(ge=0)
    end_token_ids: tuple[int, ...] = Field(min_length=1, description="any of them ends an answer")
    patch_size: int = Field(ge=1, description="pixels")
    temporal_patch_size: int = Field(ge=1, description="frames; a still image is repeated")
    merge_size: int = Field(ge=1, description="patches along each side of what becomes one token")
    window_size: int = Field(ge=1, description="pixels along each side of a window")
    vision_head_dim: int = Field(ge=4)
    vision_rope_theta: float = Field(gt=1)
    min_pixels: int = Field(ge=1)
    max_pixels: int = Field(ge=1)


class GoldenExample(Record):
    """An input that travels with the engine and the raw outputs (`.npz`, by tensor name) that it must give.

    The input is an image that is decoded and resized, a `phrase`, both where the engine takes both, or the `.npz` of its tensors.
    """

    image: RelativePath | None = None
    phrase: str | None = None
    inputs: RelativePath | None = None
    outputs: RelativePath
    tolerance: float = Field(gt=0, description="largest absolute difference allowed in any output")
    outliers: float = Field(default=0.0, ge=0, lt=1, description="share of the values of an output that may differ by more")

    @model_validator(mode="after")
    def _has_one_input(self) -> "GoldenExample":
        if ((self.image is None) and (self.phrase is None)) == (self.inputs is None):
            raise ValueError("give either an image or a phrase, or inputs")
        return self


class Manifest(Record):
    schema_version: int = SCHEMA_VERSION
    model: str = Field(pattern=rf"^{NAME_PATTERN.pattern}$")
    role: Role
    roles: tuple[str, ...] = Field(description="all roles of this build; the model is listed when every one is there")
    build: str = Field(description="build id, the same in every engine of one build")
    created: datetime
    description: str = ""
    engine: EngineSpec
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    preprocessing: Preprocessing
    labels: tuple[str, ...] = ()
    activation: Literal["softmax", "sigmoid"] | None = None
    codebook: Codebook | None = None
    detection: Detection | None = None
    text: Text | None = None
    embedding: Embedding | None = None
    generation: Generation | None = None
    source: Source
    precision: Precision
    parameters: int
    macs: int | None = Field(None, description="multiply-adds for one image")
    tensorrt: TensorRTReport | None = None
    verification: Verification | None = None
    golden: tuple[GoldenExample, ...] = ()

    @model_validator(mode="after")
    def _names_its_codebook(self) -> "Manifest":
        if self.role in ("tokenize", "detokenize") and self.codebook is None:
            raise ValueError(f"an engine for {self.role} needs a codebook")
        return self

    @model_validator(mode="after")
    def _says_what_its_answers_mean(self) -> "Manifest":
        if self.role == "detect" and self.detection is None:
            raise ValueError("an engine for detect needs its detection")
        if self.role == "detect" and self.text is not None and self.text.phrases is None:
            raise ValueError("an engine for detect that takes phrases says how many")
        if self.role in ("ground", "text") and self.text is None:
            raise ValueError(f"an engine for {self.role} needs its text")
        if self.role in ("image", "text") and self.embedding is None:
            raise ValueError("an engine of a dual encoder needs its embedding")
        if self.role in ("vision", "embed", "decoder") and self.generation is None:
            raise ValueError(f"an engine for {self.role} needs its generation")
        return self

    @property
    def entry_name(self) -> str:
        """The directory of the repository: MODEL, or MODEL.ROLE when the model has several engines."""
        return self.model if len(self.roles) == 1 else f"{self.model}.{self.role}"

    @property
    def files(self) -> tuple[ArtifactFile, ...]:
        """What must be there, and be what it was, for the engine to serve."""
        readers = (self.text, self.generation)
        return (self.engine, *self.engine.external_data, *(reader.tokenizer for reader in readers if reader is not None))


@dataclass(frozen=True)
class Entry:
    """One version directory of the repository: `path` is `ROOT/name/version`."""

    name: str
    version: int
    path: Path
    manifest: Manifest

    @property
    def engine_file(self) -> Path:
        return self.path / self.manifest.engine.file

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


def read_entry(path: Path) -> Entry:
    """Read and check one version directory without loading its engine (no hashing).

    Raises:
        ManifestError: manifest missing, corrupt or of a newer schema; a file missing, a link that leaves the directory, or of
            another size; names that do not match the directory.
    """
    manifest_file = path / MANIFEST_FILE
    try:
        document = json.loads(manifest_file.read_bytes())
    except OSError as error:
        raise ManifestError(f"{MANIFEST_FILE} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ManifestError(f"{MANIFEST_FILE} is not valid JSON: {error}") from error
    if not isinstance(document, Mapping):
        raise ManifestError(f"{MANIFEST_FILE} is not a JSON object")
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise ManifestError(f"manifest schema {version} is newer than this gateway reads ({SCHEMA_VERSION}); upgrade Vitrine")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ManifestError(f"{MANIFEST_FILE} is not valid: {where}: {first['msg']}") from error
    entry = Entry(name=path.parent.name, version=int(path.name), path=path, manifest=manifest)
    if manifest.entry_name != entry.name:
        raise ManifestError(f"the manifest is of {manifest.entry_name!r}, but the directory is {entry.name!r}")
    for artifact in manifest.files:
        _check_file(path, artifact)
    return entry


def _check_file(directory: Path, artifact: ArtifactFile) -> None:
    file = directory / artifact.file
    if not file.resolve().is_relative_to(directory.resolve()):
        raise ManifestError(f"{artifact.file} points outside its version directory")
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ManifestError(f"{artifact.file} is missing: {error.strerror}") from error
    if size != artifact.size:
        raise ManifestError(f"{artifact.file} has {size} bytes, the manifest says {artifact.size}; publish it again")


def check_hashes(entry: Entry) -> None:
    """Hash the engine's files and hold them against the manifest.

    Raises:
        ManifestError: a hash differs or a file cannot be read.
    """
    for artifact in entry.manifest.files:
        try:
            with (entry.path / artifact.file).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ManifestError(f"{artifact.file} cannot be read: {error.strerror}") from error
        if digest != artifact.sha256:
            raise ManifestError(f"{artifact.file} does not match its SHA-256 in the manifest; publish it again")
