"""What the stages of an export hand to one another."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.clean import Cleaning
from app.manifest import (
    ArtifactFile,
    Codebook,
    Detection,
    Embedding,
    Generation,
    Interpolation,
    Manifest,
    Precision,
    Preprocessing,
    Role,
    Source,
    TensorRTReport,
    TensorSpec,
    Text,
    Verification,
)
from export.detect_options import DetectOptions
from export.detector import Detector
from export.dual_encoder import DualEncoder
from export.grounder import Grounder
from export.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
Activation = Literal["softmax", "sigmoid"]
LongPhrases = Literal["refuse", "truncate"]
Reference = Callable[[Tensor], Tensor]
"""The network as its library runs it: normalised float32 [B,3,H,W] RGB -> logits float32 [B,C]."""


class ExportError(Exception):
    """The export cannot go on; the message is one or more sentences that say what to do. Exit code 1."""

    exit_code = 1


class MissingToolError(ExportError):
    """A stage needs software that is not installed here (TensorRT, a source's library). Exit code 2."""

    exit_code = 2


class VerificationError(ExportError):
    """The engine does not agree with its reference; nothing was published. Exit code 3."""

    exit_code = 3

    def __init__(self, message: str, verification: Verification) -> None:
        super().__init__(message)
        self.verification = verification


@dataclass(frozen=True)
class PreprocessingOverrides:
    """What the user says about preprocessing; None leaves what the library's own data config says."""

    input_size: tuple[int, int] | None = None  # height, width
    resize: int | tuple[int, int] | None = None  # shortest edge, or (height, width) to stretch to
    interpolation: Interpolation | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None


@dataclass(frozen=True)
class OnnxInterface:
    """How a user's own ONNX model wants its input and what its output is; only for `onnx/FILE`."""

    layout: Literal["NCHW", "NHWC"] = "NCHW"
    colour: Literal["RGB", "BGR"] | None = None  # None: RGB, or as a detector's head has it
    output: Literal["logits", "probabilities"] | None = None  # None: logits, or as a detector's head has it
    input_name: str | None = None  # needed when the model has several
    output_name: str | None = None  # of a detector several, with commas between them


@dataclass(frozen=True)
class ExportRequest:
    """One command line, parsed."""

    source: str
    repository: Path
    name: str | None = None  # model name; by default made from the source
    weights: Literal["pretrained", "checkpoint", "random", "embedded"] | None = None  # "embedded": inside an ONNX file
    checkpoint: Path | None = None
    num_classes: int | None = None
    labels: Path | None = None
    tokenizer: Path | None = None  # a file or a directory; only for networks that read phrases
    long_phrases: LongPhrases | None = None  # None: refuse
    model_args: dict[str, Any] = field(default_factory=dict)
    preprocessing: PreprocessingOverrides = field(default_factory=PreprocessingOverrides)
    onnx: OnnxInterface = field(default_factory=OnnxInterface)
    detection: DetectOptions | None = None  # given when an ONNX model is a detector
    activation: Activation | None = None  # None: what the source says, else softmax
    engine: Literal["onnx", "tensorrt"] = "onnx"
    precision: Precision = "fp32"
    max_batch: int = 8
    licence: str | None = None
    description: str = ""
    seed: int = 0


@dataclass(frozen=True)
class WeightsReport:
    """How a checkpoint was fitted to the network, for the closing summary."""

    file: str
    sha256: str
    wrapper: str | None  # "state_dict", "model", "ema": the key the tensors lay under
    prefix: str | None  # "module.", "model.": the prefix that was taken off
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """load -> fuse: a classifier as its library builds it, in eval mode, and all that is known about it.

    `network` is a torch module from normalised float32 [B,3,H,W] to logits [B,C], or the user's own ONNX model.
    """

    network: nn.Module | onnx.ModelProto
    preprocessing: Preprocessing
    num_classes: int
    labels: tuple[str, ...]  # num_classes of them, or none
    activation: Activation
    source: Source
    onnx: OnnxInterface | None = None  # given when `network` is an ONNX model
    weights: WeightsReport | None = None

    @property
    def answers(self) -> dict[str, Any]:
        """What the manifest says of a classifier's answers."""
        return {"labels": self.labels, "activation": self.activation}


@dataclass(frozen=True)
class LoadedTokenizer:
    """load -> fuse: a tokenizer in eval mode, and all that is known about it."""

    network: Tokenizer
    preprocessing: Preprocessing
    codebook: Codebook
    source: Source
    weights: WeightsReport | None = None

    @property
    def answers(self) -> dict[str, Any]:
        """What the manifest says of a tokenizer's tokens."""
        return {"codebook": self.codebook}


@dataclass(frozen=True)
class LoadedDetector:
    """load -> fuse: a detector in eval mode, and all that is known about it."""

    network: Detector
    preprocessing: Preprocessing
    detection: Detection
    labels: tuple[str, ...]  # as many as there are classes, or none
    source: Source
    weights: WeightsReport | None = None
    vocabulary: "Vocabulary | None" = None  # of a detector that looks for phrases
    text: Text | None = None

    @property
    def answers(self) -> dict[str, Any]:
        """What the manifest says of a detector's rows, and of its phrases where it looks for some."""
        return {"labels": self.labels, "detection": self.detection, "text": self.text}


def tokenizer_artifact(content: bytes) -> ArtifactFile:
    """What a manifest says of a `tokenizer.json`."""
    return ArtifactFile(file=TOKENIZER_FILE, sha256=hashlib.sha256(content).hexdigest(), size=len(content))


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer. `file` is its `tokenizer.json`, which the gateway runs; `ids` is the library's own way from a phrase to all of
    its ids, special tokens included, neither cut nor padded: the reference of a verification."""

    file: bytes
    size: int
    padding_id: int
    unknown_id: int
    ids: Callable[[str], list[int]]

    def text(self, length: int, *, too_long: LongPhrases = "refuse", phrases: int | None = None) -> Text:
        """What the manifest says of it."""
        tokenizer = tokenizer_artifact(self.file)
        return Text(tokenizer=tokenizer, length=length, padding_id=self.padding_id, phrases=phrases, too_long=too_long)

    def rows(self, phrases: Sequence[str], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask, int64 [phrases,length] each. What is too long loses its end, but not the last special token."""
        all_ids = [self.ids(phrase) for phrase in phrases]
        cut = [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in all_ids]
        padded = [ids + [self.padding_id] * (length - len(ids)) for ids in cut]
        return np.array(padded), np.array([[1] * len(ids) + [0] * (length - len(ids)) for ids in cut])


@dataclass(frozen=True)
class LoadedGrounder:
    """load -> fuse: a grounding network in eval mode, the tokenizer of its phrases, and all that is known about it."""

    network: Grounder
    preprocessing: Preprocessing
    vocabulary: Vocabulary
    long_phrases: LongPhrases
    source: Source
    weights: WeightsReport | None = None

    @property
    def answers(self) -> dict[str, Any]:
        """What the manifest says of the phrases."""
        return {"text": self.vocabulary.text(self.network.length, too_long=self.long_phrases)}


@dataclass(frozen=True)
class CleanedVocabulary:
    """A tokenizer of open_clip. `file` is a `tokenizer.json` that gives the same ids of a text cleaned as `clean` says.

    The reference of a verification is open_clip's own: `rows` gives the ids int64 [texts,length], cut and padded, `count` how many
    a text has before it is cut, special tokens included.
    """

    file: bytes
    size: int
    padding_id: int
    clean: Cleaning
    rows: Callable[[Sequence[str]], NDArray[np.int64]]
    count: Callable[[str], int]


@dataclass(frozen=True)
class LoadedDualEncoder:
    """load -> fuse: a network with a tower for images and one for texts in eval mode, and all that is known about it."""

    network: DualEncoder
    preprocessing: Preprocessing
    vocabulary: CleanedVocabulary
    embedding: Embedding
    source: Source
    weights: WeightsReport | None = None

    @property
    def answers(self) -> dict[str, Any]:
        """What the manifest says of the vectors, and of the texts."""
        text = Text(
            tokenizer=tokenizer_artifact(self.vocabulary.file),
            length=self.network.length,
            padding_id=self.vocabulary.padding_id,
            too_long="truncate",
            clean=self.vocabulary.clean,
        )
        return {"embedding": self.embedding, "text": text}


@dataclass(frozen=True)
class DualReference:
    """What the engines of a dual encoder are held against: the network before any rewriting, and open_clip's tokenizer."""

    network: DualEncoder
    vocabulary: CleanedVocabulary


@dataclass(frozen=True)
class LoadedChat:
    """load -> fuse: a Qwen2.5-VL in eval mode as transformers builds it, and all that is known about it.

    `processor`: the library's own way from a conversation and its images to the network's inputs, for verification. `tokenizer`
    is the file whose hash is in `generation`.
    """

    network: Any  # Qwen2_5_VLForConditionalGeneration
    processor: Any  # Qwen2_5_VLProcessor
    preprocessing: Preprocessing
    generation: Generation
    tokenizer: bytes
    half: bool
    source: Source
    weights: WeightsReport | None = None

    @property
    def answers(self) -> dict[str, Any]:
        """What the manifests say of the conversation."""
        return {"generation": self.generation}


@dataclass(frozen=True)
class ChatReference:
    """What the engines of a chat model are held against: the network before any rewriting, and the library's processor."""

    network: Any
    processor: Any


@dataclass(frozen=True)
class GroundingReference:
    """What a grounding engine is held against: the network before any rewriting, and the library's tokenizer."""

    network: Grounder
    vocabulary: Vocabulary


AnyLoaded = Loaded | LoadedTokenizer | LoadedDetector | LoadedGrounder | LoadedDualEncoder | LoadedChat

FreeAxes = tuple[tuple[str | None, ...], ...]
"""For each input of a graph the names of its axes; None for those of a fixed size. Axes of one name have one size."""


@dataclass(frozen=True)
class Interface:
    """What one engine does: its role, and the names, types and shapes of its inputs and outputs, in the order of the graph's."""

    role: Role
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Fused:
    """fuse -> to_onnx: a graph of the engine contract.

    `reference` is the network before any rewriting, for `verify`. `rewrites` names what was replaced by an exact equivalent.
    `exact_tail`: the graph gives one output more, which the engine does not give; what is computed of it stays float32 in every
    precision. `inner`: values that the graph gives before that, and the engine only holds under these names, for verification.
    `free`: names of the inputs' axes where more than the batch is free. `typed`: the graph computes in its precision as it is.
    """

    graph: nn.Module | onnx.ModelProto
    interface: Interface
    reference: "Reference | Tokenizer | Detector | GroundingReference | DualReference | ChatReference"
    parameters: int
    rewrites: tuple[str, ...] = ()
    exact_tail: bool = False
    inner: tuple[TensorSpec, ...] = ()
    free: FreeAxes | None = None
    typed: bool = False


@dataclass(frozen=True)
class Engine:
    """to_onnx, to_tensorrt -> stage: a file that a backend can run."""

    path: Path
    interface: Interface
    kind: Literal["onnx", "tensorrt"]
    precision: Precision
    opset: int | None
    ir_version: int | None
    parameters: int
    macs: int | None
    tensorrt: TensorRTReport | None
    external_data: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Build:
    """What the engines of one build share."""

    id: str
    created: datetime
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Staged:
    """stage -> verify -> publish: a complete version directory outside the repository root, on the same file system."""

    path: Path  # .../NAME/VERSION-to-be
    manifest: Manifest


@dataclass(frozen=True)
class Published:
    """The end of the line; `rewrites` and `weights` are told again for the closing summary.

    `paths` and `manifests` are those of the build's engines, `path` and `manifest` those of the first.
    """

    name: str
    version: int
    paths: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    rewrites: tuple[str, ...] = ()
    weights: WeightsReport | None = None

    @property
    def path(self) -> Path:
        return self.paths[0]

    @property
    def manifest(self) -> Manifest:
        return self.manifests[0]


def image_tensor(images: torch.Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 [B,H,W,3] -> normalised float32 [B,3,H,W] as `preprocessing` says: (pixel * scale - mean) / std."""
    mean = torch.tensor(preprocessing.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() * preprocessing.scale - mean) / std
