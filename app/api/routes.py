"""The table of task routes: how each task speaks HTTP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from app.api import forms, schemas
from app.api.forms import Form
from app.drawing import Mark
from app.tasks import TASKS
from app.tasks.base import AnyTask
from app.tasks.classify import ClassifyResult
from app.tasks.detect import DetectResult
from app.tasks.detokenize import DetokenizeResult
from app.tasks.embed import EmbedResult
from app.tasks.ground import GroundResult
from app.tasks.reconstruct import ReconstructResult
from app.tasks.similarity import SimilarityResult
from app.tasks.tokenize import TokenizeResult


def _no_headers(results: Sequence[Any]) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class TaskRoute:
    """How one task speaks HTTP.

    `encode` gives the members of one result in JSON, and is `heavy` when that takes milliseconds. `forms` are the other forms of an
    answer by media type, for those whose `Accept` asks for one; `headers` are what their headers tell of the results. `marks` are
    what is drawn of a result onto its image, where it can be.
    """

    task: AnyTask
    request: type[schemas.TaskRequest]
    response: type[schemas.TaskResponse]
    encode: Callable[[Any], dict[str, Any]]
    takes: Literal["images", "tokens", "images or texts"] = "images"
    heavy: bool = False
    forms: Mapping[str, Form] = field(default_factory=dict)
    headers: Callable[[Sequence[Any]], dict[str, str]] = _no_headers
    marks: Callable[[Any], Sequence[Mark]] | None = None

    @property
    def path(self) -> str:
        return f"/v1/{self.task.name}"


def encode_classify(result: ClassifyResult) -> dict[str, Any]:
    return {"predictions": [vars(prediction) for prediction in result.predictions]}


def encode_detect(result: DetectResult) -> dict[str, Any]:
    return {
        "detections": [
            {
                "label": found.label,
                "class_id": found.class_id,
                "score": found.score,
                "box": forms.rounded(found.box),
                **({} if found.mask is None else {"mask": found.mask.rle()}),
            }
            for found in result.detections
        ]
    }


def encode_ground(result: GroundResult) -> dict[str, Any]:
    boxes = [None if found.box is None else forms.rounded(found.box) for found in result.groundings]
    return {"groundings": [vars(found) | {"box": box} for found, box in zip(result.groundings, boxes, strict=True)]}


def encode_tokenize(result: TokenizeResult) -> dict[str, Any]:
    codebook = result.codebook
    return {
        "tokens": result.tokens.tolist(),
        "grid": codebook.grid,
        "codebook": {"id": codebook.id, "size": codebook.size, "count": codebook.count},
        "bits_per_token": codebook.bits,
        "bits_per_pixel": result.bits_per_pixel,
        **({} if result.psnr is None else {"psnr": forms.decibels(result.psnr)}),
    }


def encode_detokenize(result: DetokenizeResult) -> dict[str, Any]:
    return {"reconstruction": forms.base64_png(result.pixels)}


def encode_reconstruct(result: ReconstructResult) -> dict[str, Any]:
    reconstruction = forms.base64_png(result.pixels)
    return {"reconstruction": reconstruction, "psnr": forms.decibels(result.psnr), "ssim": result.ssim}


def encode_embed(result: EmbedResult) -> dict[str, Any]:
    text = {} if result.tokens is None else {"tokens": result.tokens, "truncated": result.truncated}
    return {"embedding": result.vector, **text}


def encode_similarity(result: SimilarityResult) -> dict[str, Any]:
    return {"similarities": result.similarities, "probabilities": result.probabilities}


TASK_ROUTES = (
    TaskRoute(TASKS["classify"], schemas.ClassifyRequest, schemas.ClassifyResponse, encode_classify),
    TaskRoute(
        TASKS["detect"],
        schemas.DetectRequest,
        schemas.DetectResponse,
        encode_detect,
        forms=forms.DETECTION_FORMS,
        marks=forms.detection_marks,
    ),
    TaskRoute(
        TASKS["ground"],
        schemas.GroundRequest,
        schemas.GroundResponse,
        encode_ground,
        forms=forms.DRAWN_FORMS,
        marks=forms.grounding_marks,
    ),
    TaskRoute(
        TASKS["tokenize"],
        schemas.TokenizeRequest,
        schemas.TokenizeResponse,
        encode_tokenize,
        forms=forms.TOKEN_FORMS,
        headers=forms.tokenize_headers,
    ),
    TaskRoute(
        TASKS["detokenize"],
        schemas.DetokenizeRequest,
        schemas.DetokenizeResponse,
        encode_detokenize,
        takes="tokens",
        heavy=True,
        forms=forms.IMAGE_FORMS,
    ),
    TaskRoute(
        TASKS["reconstruct"],
        schemas.ReconstructRequest,
        schemas.ReconstructResponse,
        encode_reconstruct,
        heavy=True,
        forms=forms.IMAGE_FORMS,
        headers=forms.reconstruct_headers,
    ),
    TaskRoute(TASKS["embed"], schemas.EmbedRequest, schemas.EmbedResponse, encode_embed, takes="images or texts", heavy=True),
    TaskRoute(TASKS["similarity"], schemas.SimilarityRequest, schemas.SimilarityResponse, encode_similarity, heavy=True),
)
