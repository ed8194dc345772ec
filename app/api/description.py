"""The OpenAPI of routes that read their bodies and write their answers themselves."""

from typing import Any

from pydantic import BaseModel

from app.api import schemas
from app.api.forms import COCO, JSON, NPY
from app.api.openai_errors import ErrorsResponse
from app.api.routes import TaskRoute
from app.token_format import MEDIA_TYPE

BINARY = {"type": "string", "format": "binary"}
COCO_RESULTS = {"type": "array", "items": schemas.CocoResponse.model_json_schema()}
HEADERS = {
    "X-Model": "NAME@VERSION, where the answer is no JSON",
    "X-Codebook": "id of the codebook, where the answer is no JSON",
    "X-PSNR": "dB per image, where it was computed and the answer is no JSON; inf when not a value differs",
    "X-SSIM": "per image, as X-PSNR",
}
ERRORS = (400, 404, 408, 413, 415, 422, 429, 500, 503, 504)
OPENAI_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorsResponse} for status in ERRORS}


def describe_request(route: TaskRoute) -> dict[str, Any]:
    """The parameters and the forms of a body."""
    properties = route.request.model_json_schema()["properties"]
    content = _tokens(properties) if route.takes == "tokens" else _images(properties)
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": schema.get("description", "")}
            for name, schema in properties.items()
        ],
        "requestBody": {"required": True, "content": content},
    }


def describe_responses(route: TaskRoute) -> dict[int | str, dict[str, Any]]:
    """The forms of an answer, and the errors; 406 where there is a choice, and with 422 the answer whose items all failed."""
    statuses = sorted({*ERRORS, 406}) if route.forms else ERRORS
    answer: dict[str, Any] = {"model": route.response}
    if route.forms:
        answer["content"] = {media_type: {"schema": COCO_RESULTS if media_type == COCO else BINARY} for media_type in route.forms}
        answer["description"] = "The form that Accept likes best; JSON when it takes everything"
        names = HEADERS if route.marks is None else ("X-Model",)
        answer["headers"] = {name: {"description": HEADERS[name], "schema": {"type": "string"}} for name in names}
    errors: dict[int | str, dict[str, Any]] = {status: {"model": schemas.ProblemResponse} for status in statuses}
    return {200: answer, **errors, 422: {"model": schemas.ProblemResponse | route.response}}


def describe_document(model: type[BaseModel]) -> dict[str, Any]:
    """A body that is a JSON document. The parts of `model` are written out: an operation has no place for definitions."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def written_out(part: Any) -> Any:
        if isinstance(part, list):
            return [written_out(each) for each in part]
        if not isinstance(part, dict):
            return part
        known = definitions[part["$ref"].rpartition("/")[2]] if "$ref" in part else {}
        return {name: written_out(each) for name, each in (known | part).items() if name != "$ref"}

    return {"requestBody": {"required": True, "content": {JSON: {"schema": written_out(schema)}}}}


def _images(properties: dict[str, Any]) -> dict[str, Any]:
    image = {
        "description": 'base64, data URL or address; as {"base64": ...}, {"url": ...} or a data URL',
        "anyOf": [{"type": "string"}, schemas.Base64Image.model_json_schema(), schemas.UrlImage.model_json_schema()],
    }
    form = _object({"image": {"type": "array", "items": BINARY}, **properties}, required=["image"])
    document = _object({"image": image, "images": {"type": "array", "items": image}, **properties})
    return {"image/*": {"schema": BINARY}, "multipart/form-data": {"schema": form}, JSON: {"schema": document}}


def _tokens(properties: dict[str, Any]) -> dict[str, Any]:
    tokens: dict[str, Any] = {"type": "integer", "minimum": 0}
    for _ in range(2):
        tokens = {"type": "array", "items": tokens}
    batch = {"type": "array", "items": tokens}
    described = {
        "description": "one grid [h][w], or [codebooks][h][w] where the model has several; or a batch of them",
        "anyOf": [tokens, batch, {"type": "array", "items": batch}],
    }
    document = _object({"tokens": described, **properties}, required=["tokens"])
    return {JSON: {"schema": document}, NPY: {"schema": BINARY}, MEDIA_TYPE: {"schema": BINARY}}


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}
