"""Forms of an answer beside JSON: image files, `.npy`, the token container, and what their headers tell."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401 -- the writers; else all of Pillow's load

from app import token_format
from app.manifest import Entry
from app.tasks.detokenize import DetokenizeResult
from app.tasks.reconstruct import ReconstructResult
from app.tasks.tokenize import TokenizeResult, codebook_of
from app.token_format import TokenGrids

JSON, NPY = "application/json", "application/x-npy"
Pictured = DetokenizeResult | ReconstructResult


@dataclass(frozen=True)
class Form:
    """`encode` takes the results of a whole request and its fields. `single`: it holds one result alone."""

    encode: Callable[[Sequence[Any], Any], bytes]
    single: bool = False


def encode_image(pixels: NDArray[np.uint8], kind: str, quality: int = 90) -> bytes:
    """uint8 [H,W,3] as an image file of Pillow's format `kind`; `quality` 1 to 100 is for JPEG and WEBP."""
    file = BytesIO()
    options: dict[str, Any] = {"compress_level": 1} if kind == "PNG" else {"quality": quality}
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def base64_png(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """An image as a member of a JSON document."""
    height, width, _ = pixels.shape
    data = base64.b64encode(encode_image(pixels, "PNG")).decode()
    return {"base64": data, "media_type": "image/png", "width": width, "height": height}


def decibels(value: float) -> float | None:
    """For JSON, which has no infinity: null says that not a value differs."""
    return None if math.isinf(value) else value


def tokenize_headers(results: Sequence[TokenizeResult]) -> dict[str, str]:
    """`X-PSNR` where it was asked for: dB, one value per image; `inf` where not a value differs."""
    values = [f"{result.psnr:.2f}" for result in results if result.psnr is not None]
    return {"X-PSNR": ", ".join(values)} if values else {}


def reconstruct_headers(results: Sequence[ReconstructResult]) -> dict[str, str]:
    """`X-PSNR` as above, and `X-SSIM`."""
    psnr, ssim = ([f"{result.psnr:.2f}" for result in results], [f"{result.ssim:.4f}" for result in results])
    return {"X-PSNR": ", ".join(psnr), "X-SSIM": ", ".join(ssim)}


def origin(entry: Entry) -> dict[str, str]:
    """`X-Model` and `X-Codebook`: what a JSON answer says in its members."""
    return {"X-Model": f"{entry.manifest.model}@{entry.version}", "X-Codebook": codebook_of(entry).id}


def _npy(array: NDArray[Any]) -> bytes:
    file = BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _tokens_npy(results: Sequence[TokenizeResult], asked: object) -> bytes:
    return _npy(np.stack([result.tokens for result in results]))


def _tokens_container(results: Sequence[TokenizeResult], asked: object) -> bytes:
    codebook = results[0].codebook
    tokens = np.stack([result.tokens.reshape(codebook.count, *codebook.grid) for result in results])
    return token_format.pack(TokenGrids(tokens, codebook.id, codebook.size))


def _pixels_npy(results: Sequence[Pictured], asked: object) -> bytes:
    return _npy(np.stack([result.pixels for result in results]))


def _image_form(kind: str) -> Form:
    return Form(lambda results, asked: encode_image(results[0].pixels, kind, asked.quality), single=True)


TOKEN_FORMS: Mapping[str, Form] = {NPY: Form(_tokens_npy), token_format.MEDIA_TYPE: Form(_tokens_container)}
IMAGE_FORMS: Mapping[str, Form] = {
    "image/png": _image_form("PNG"),
    "image/jpeg": _image_form("JPEG"),
    "image/webp": _image_form("WEBP"),
    NPY: Form(_pixels_npy),
}
