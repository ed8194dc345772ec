"""What a mixed load asks of a gateway: every task that its models answer, in every form of a body, and what must be refused."""

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from load_tests.images import PHOTOS
from load_tests.k6.shots import Form, Shot, faults, shot
from load_tests.processes import ServerError

FORMS: tuple[Form, ...] = ("raw", "multipart", "json")
TEXTS = ("a red circle", "a person")
ANSWER_TOKENS = 16  # of a chat
JPEG = PHOTOS["500x334"]


def mixed(url: str) -> list[Shot]:
    """Of each model of the gateway at `url` all that it can be asked, and after each of those one request that must be refused.

    Raises:
        ServerError: a model does not serve, or nothing here asks for its task.
    """
    good = []
    for model in json.loads(_exchange(f"{url}/v1/models"))["data"]:
        if model["problems"] or model["task"] not in ASKED:
            raise ServerError(
                f"Nothing can be asked of {model['id']} (task {model['task']}): {model['problems'] or 'not known here'}."
            )
        good += [replace(each, name=f"{model['id']} {each.name}") for each in ASKED[model["task"]](url, model)]
    photos = [each for each in good if each.content_type == JPEG.content_type]
    if not photos:
        raise ServerError(f"No model at {url} takes photos.")
    broken = faults(photos[0].url, JPEG.path)
    return [each for pair in zip(good, cycle(broken), strict=False) for each in pair]


def warm(sent: list[Shot]) -> None:
    """Send every good one once, so that all models are loaded.

    Raises:
        ServerError: one is not answered with 200.
    """
    for each in sent:
        if each.status == 200:
            _exchange(each.url, each.body, each.content_type)


def _classify(url: str, model: dict[str, Any]) -> list[Shot]:
    route = _route(url, "classify", model)
    sizes = [_photo(f"classify {name}", route, PHOTOS[name].path) for name in ("12mp", "png")]
    return [*(_photo(f"classify {form}", route, JPEG.path, form) for form in FORMS), *sizes]


def _detect(url: str, model: dict[str, Any]) -> list[Shot]:
    asked = [("phrases", text) for text in TEXTS if model["phrases"]]
    drawn = _route(url, "detect", model, *asked, ("render", "true"))
    return [_photo("detect", _route(url, "detect", model, *asked), JPEG.path), _photo("detect drawn", drawn, JPEG.path)]


def _ground(url: str, model: dict[str, Any]) -> list[Shot]:
    return [_photo("ground", _route(url, "ground", model, *(("phrase", text) for text in TEXTS)), JPEG.path)]


def _tokens(url: str, model: dict[str, Any]) -> list[Shot]:
    tokenize = _photo("tokenize", _route(url, "tokenize", model), JPEG.path)
    tokens = json.loads(_exchange(tokenize.url, tokenize.body, tokenize.content_type))["results"][0]["tokens"]
    detokenize = Shot("detokenize", _route(url, "detokenize", model), json.dumps({"tokens": tokens}).encode(), "application/json")
    return [tokenize, detokenize, _photo("reconstruct", _route(url, "reconstruct", model), JPEG.path)]


def _embed(url: str, model: dict[str, Any]) -> list[Shot]:
    texts = [("texts", text) for text in TEXTS]
    labels = [("labels", text) for text in TEXTS]
    document = {"model": model["id"], "input": [*TEXTS, _data_url()]}
    return [
        _photo("embed", _route(url, "embed", model), JPEG.path),
        Shot("embed texts", _route(url, "embed", model), json.dumps({"texts": TEXTS}).encode(), "application/json"),
        _photo("similarity", _route(url, "similarity", model, *texts), JPEG.path),
        _photo("classify labels", _route(url, "classify", model, *labels), JPEG.path),
        Shot("embeddings", f"{url}/v1/embeddings", json.dumps(document).encode(), "application/json"),
    ]


def _chat(url: str, model: dict[str, Any]) -> list[Shot]:
    content = [{"type": "image_url", "image_url": {"url": _data_url()}}, {"type": "text", "text": "What is there?"}]
    document = {"model": model["id"], "max_tokens": ANSWER_TOKENS, "messages": [{"role": "user", "content": content}]}
    return [
        Shot(name, f"{url}/v1/chat/completions", json.dumps(document | {"stream": stream}).encode(), "application/json")
        for name, stream in (("chat", False), ("chat stream", True))
    ]


ASKED: dict[str, Callable[[str, dict[str, Any]], list[Shot]]] = {
    "classify": _classify,
    "detect": _detect,
    "ground": _ground,
    "tokenize": _tokens,
    "embed": _embed,
    "chat": _chat,
}
"""By the task that `/v1/models` tells of a model: the requests, of the gateway's address and the model's row."""


def _route(url: str, task: str, model: dict[str, Any], *fields: tuple[str, str]) -> str:
    return f"{url}/v1/{task}?{urlencode([('model', model['id']), *fields])}"


def _photo(name: str, url: str, image: Path, form: Form = "raw") -> Shot:
    return replace(shot(url, image, form), name=name)


def _data_url() -> str:
    return f"data:{JPEG.content_type};base64,{base64.b64encode(JPEG.path.read_bytes()).decode()}"


def _exchange(url: str, body: bytes | None = None, content_type: str = "") -> bytes:
    request = urllib.request.Request(url, body, {"Content-Type": content_type} if content_type else {})  # noqa: S310 -- our own server
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        raise ServerError(f"{url} answers {error.code}: {error.read(500)!r}") from error
    except OSError as error:
        raise ServerError(f"{url} does not answer: {error}") from error
