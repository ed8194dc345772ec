"""Forms of an answer beside JSON: image files, `.npy`, the token container, and what their headers tell."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401 -- the writers; else all of Pillow's load

from app import token_format
from app.drawing import Mark, draw
from app.errors import NotAcceptableError
from app.manifest import Entry
from app.masks import Box
from app.tasks.detect import DetectResult
from app.tasks.detokenize import DetokenizeResult
from app.tasks.ground import GroundResult
from app.tasks.reconstruct import ReconstructResult
from app.tasks.tokenize import TokenizeResult
from app.token_format import TokenGrids

JSON, NPY, COCO = "application/json", "application/x-npy", "application/vnd.coco+json"
WEBP_SIDE = 16_383  # pixels
Pictured = DetokenizeResult | ReconstructResult


@dataclass(frozen=True)
class Form:
    """`encode` takes the results of a whole request and its fields. `single`: it holds one result alone.

    `draws`: Pillow's format in which the result is drawn onto its image; what `encode` takes then are the files of that.
    """

    encode: Callable[[Sequence[Any], Any], bytes]
    single: bool = False
    draws: str | None = None


def encode_image(pixels: NDArray[np.uint8], kind: str, quality: int = 90) -> bytes:
    """uint8 [H,W,3] as an image file of Pillow's format `kind`; `quality` 1 to 100 is for JPEG and WEBP."""
    return _save(Image.fromarray(pixels), kind, quality)


def _save(image: Image.Image, kind: str, quality: int) -> bytes:
    file = BytesIO()
    options: dict[str, Any] = {"compress_level": 1} if kind == "PNG" else {"quality": quality}
    image.save(file, kind, **options)
    return file.getvalue()


def encode_drawn(image: Image.Image, result: Any, *, marks: Callable[[Any], Sequence[Mark]], kind: str, quality: int) -> bytes:
    """The `marks` of a result drawn onto its RGB image, as a file of Pillow's format `kind`.

    Raises:
        NotAcceptableError: the image is too large for that format.
    """
    if kind == "WEBP" and max(image.size) > WEBP_SIDE:
        raise NotAcceptableError(f"A WebP has at most {WEBP_SIDE} pixels a side; ask for image/png or image/jpeg.", field="Accept")
    draw(image, marks(result))
    return _save(image, kind, quality)


def base64_png(pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """An image as a member of a JSON document."""
    height, width, _ = pixels.shape
    return embed_png(encode_image(pixels, "PNG"), width, height)


def embed_png(file: bytes, width: int, height: int) -> dict[str, Any]:
    """A PNG of `width` x `height` pixels as a member of a JSON document."""
    return {"base64": base64.b64encode(file).decode(), "media_type": "image/png", "width": width, "height": height}


def detection_marks(result: DetectResult) -> list[Mark]:
    return [
        Mark(found.box, found.label, str(found.class_id), found.class_id, found.score, found.mask) for found in result.detections
    ]


def grounding_marks(result: GroundResult) -> list[Mark]:
    """Phrases that the font cannot write are called by their place, the first of them 1."""
    return [
        Mark(found.box, found.phrase, str(number + 1), number, found.score)
        for number, found in enumerate(result.groundings)
        if found.box is not None
    ]


def rounded(box: Box) -> list[float]:
    """A box to the hundredth of a pixel."""
    return [round(place, 2) for place in box]


def _coco(results: Sequence[DetectResult], asked: Any) -> bytes:
    """What pycocotools' `loadRes` takes: a list of all images' objects; a category's id is the model's class id."""
    rows = []
    for image_id, result in zip(asked.image_id or range(len(results)), results, strict=True):
        for found in result.detections:
            left, top, right, bottom = found.box
            row = {
                "image_id": image_id,
                "category_id": found.class_id,
                "bbox": rounded((left, top, right - left, bottom - top)),
                "score": found.score,
            }
            rows.append(row if found.mask is None else row | {"segmentation": found.mask.rle()})
    return orjson.dumps(rows)


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
    """`X-Model` and, of a tokenizer, `X-Codebook`: what a JSON answer says in its members."""
    model = {"X-Model": f"{entry.manifest.model}@{entry.version}"}
    return model if entry.manifest.codebook is None else model | {"X-Codebook": entry.manifest.codebook.id}


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
DRAWN_FORMS: Mapping[str, Form] = {
    f"image/{kind.lower()}": Form(lambda files, asked: bytes(files[0]), single=True, draws=kind) for kind in ("PNG", "JPEG", "WEBP")
}
DETECTION_FORMS: Mapping[str, Form] = {**DRAWN_FORMS, COCO: Form(_coco)}
