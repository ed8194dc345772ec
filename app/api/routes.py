"""The table of task routes: how each task speaks HTTP."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from app.api import forms, schemas
from app.api.forms import Form
from app.tasks import TASKS
from app.tasks.base import AnyTask
from app.tasks.classify import ClassifyResult
from app.tasks.detokenize import DetokenizeResult
from app.tasks.reconstruct import ReconstructResult
from app.tasks.tokenize import TokenizeResult


def _no_headers(results: Sequence[Any]) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class TaskRoute:
    """How one task speaks HTTP.

    `encode` gives the members of one result in JSON, and is `heavy` when that takes milliseconds. `forms` are the other forms of an
    answer by media type, for those whose `Accept` asks for one; `headers` are what their headers tell of the results.
    """

    task: AnyTask
    request: type[schemas.TaskRequest]
    response: type[schemas.TaskResponse]
    encode: Callable[[Any], dict[str, Any]]
    takes: Literal["images", "tokens"] = "images"
    heavy: bool = False
    forms: Mapping[str, Form] = field(default_factory=dict)
    headers: Callable[[Sequence[Any]], dict[str, str]] = _no_headers

    @property
    def path(self) -> str:
        return f"/v1/{self.task.name}"


def encode_classify(result: ClassifyResult) -> dict[str, Any]:
    return {"predictions": [vars(prediction) for prediction in result.predictions]}


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


TASK_ROUTES = (
    TaskRoute(TASKS["classify"], schemas.ClassifyRequest, schemas.ClassifyResponse, encode_classify),
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
)
