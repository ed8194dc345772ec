"""The request and the answers of `POST /v1/chat/completions`, in OpenAI's names; a refusal says what parameter it is about."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError

from app.errors import InvalidValueError, TooLargeError

MAX_MESSAGES = 4096  # and parts of one message
MAX_STOPS = 4  # as OpenAI has it
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "store": (False,),
    "web_search_options": (),
}
"""What no engine is asked for here, with the values that ask for nothing."""
ENGINE_DEPENDENT: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
}
"""What a server behind this one may know and the embedded engine does not, with the values that ask for nothing."""
BEHIND = "only where a server behind this one answers"
TAG = "#"  # before the names of the alternatives of a union, which are no part of a parameter's path
MEMBERS = {"unknown_role": "role", "unknown_part": "type"}
"""The member at fault, by the errors that pydantic tells of the whole."""
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "user")
"""What only OpenAI's own service uses; taken and left alone."""


def _without_nulls(value: object) -> object:
    """OpenAI's clients write null for what is not said."""
    return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(Record):
    type: Literal["text"]
    text: str


class ImageAddress(Record):
    url: str = Field(min_length=1, description="a data URL; http and https only where the server allows it")
    detail: Literal["auto", "low", "high"] = Field("auto", description="taken and left alone: the model decides how much it sees")


class ImagePart(Record):
    type: Literal["image_url"]
    image_url: ImageAddress


def _kind_of_content(value: object) -> str | None:
    return "#text" if isinstance(value, str) else "#parts" if isinstance(value, list) else None


def _type_of_part(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"#{kind}" if kind in ("text", "image_url") else None


Part = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[ImagePart, Tag("#image_url")],
    Discriminator(
        _type_of_part, custom_error_type="unknown_part", custom_error_message="a part is of the type `text` or `image_url`"
    ),
]
Parts = Annotated[list[Part], Field(min_length=1, max_length=MAX_MESSAGES)]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
KIND = Discriminator(
    _kind_of_content, custom_error_type="unknown_content", custom_error_message="content is a string or a list of parts"
)


class UserMessage(Record):
    role: Literal["user"]
    content: Annotated[Annotated[str, Tag("#text")] | Annotated[Parts, Tag("#parts")], KIND]
    name: str | None = None


class InstructionMessage(Record):
    """`developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer"]
    content: Annotated[Annotated[str, Tag("#text")] | Annotated[TextParts, Tag("#parts")], KIND]
    name: str | None = None


class AssistantMessage(Record):
    """An earlier answer; what this server gave can be sent back as it came."""

    role: Literal["assistant"]
    content: Annotated[Annotated[str, Tag("#text")] | Annotated[TextParts, Tag("#parts")], KIND]
    name: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] = []
    tool_calls: Annotated[list[Any], Field(max_length=0)] = []


ROLES = {"user": "#user", "system": "#instruction", "developer": "#instruction", "assistant": "#assistant"}


def _role(value: object) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return ROLES.get(role) if isinstance(role, str) else None


Message = Annotated[
    Annotated[UserMessage, Tag("#user")]
    | Annotated[InstructionMessage, Tag("#instruction")]
    | Annotated[AssistantMessage, Tag("#assistant")],
    Discriminator(
        _role, custom_error_type="unknown_role", custom_error_message=f"a message has one of the roles {', '.join(ROLES)}"
    ),
    BeforeValidator(_without_nulls),
]


def _several(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(Record):
    include_usage: bool = Field(False, description="one more chunk at the end with the tokens of the whole request")
    include_obfuscation: bool = Field(False, description="taken and left alone")


class ChatRequest(Record):
    """What is asked of a model."""

    model: str | None = Field(None, max_length=200, description="NAME or NAME@VERSION; by default the default chat model")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, description="tokens of the answer at most")
    max_tokens: int | None = Field(None, ge=1, description="the older name of `max_completion_tokens`")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="0 always takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="draw among the likeliest tokens that have this much together")
    top_k: int | None = Field(None, ge=0, description="draw among this many tokens at most; 0 for all. Not of OpenAI")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same one draws the same tokens")
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], BeforeValidator(_several)] = Field(
        [], max_length=MAX_STOPS, description="end before any of these strings"
    )
    stream: bool = Field(False, description="server-sent events, a chunk for each piece of the answer")
    stream_options: StreamOptions | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description=BEHIND)
    presence_penalty: float | None = Field(None, ge=-2, le=2, description=BEHIND)
    logit_bias: dict[str, float] | None = Field(None, description=BEHIND)
    logprobs: bool | None = Field(None, description=BEHIND)
    top_logprobs: int | None = Field(None, ge=0, le=20, description=BEHIND)
    reasoning_effort: str | None = Field(None, description=BEHIND)
    response_format: dict[str, Any] | None = Field(None, description=BEHIND)

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the answer at most, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tokens_field(self) -> str:
        """The name under which `most_tokens` was given."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def engine_dependent(self) -> list[str]:
        """The parameters that the embedded engine does not know."""
        given = self.model_fields_set
        return [name for name, neutral in ENGINE_DEPENDENT.items() if name in given and getattr(self, name) not in neutral]

    def image_parts(self) -> Iterator[tuple[str, ImagePart]]:
        """The images in their order, each with the name of its parameter."""
        for number, message in enumerate(self.messages):
            if isinstance(message, UserMessage) and not isinstance(message.content, str):
                for place, part in enumerate(message.content):
                    if isinstance(part, ImagePart):
                        yield f"messages[{number}].content[{place}].image_url.url", part


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str


class ChoiceResponse(BaseModel):
    index: Literal[0]
    message: AnswerMessage
    finish_reason: Literal["stop", "length"] = Field(description="length: as many tokens as asked for, or as there is room for")


class UsageResponse(BaseModel):
    prompt_tokens: int = Field(description="of text and images")
    completion_tokens: int
    total_tokens: int


class SeenImageResponse(BaseModel):
    """The size at which the model saw an image; boxes that it names are in these pixels. Behind a server: the size sent to it."""

    width: int
    height: int


class SeenResponse(BaseModel):
    images: list[SeenImageResponse]


class ChatCompletionResponse(BaseModel):
    """OpenAI's shape, and in `vitrine` what it has no place for."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[ChoiceResponse]
    usage: UsageResponse
    vitrine: SeenResponse


def read_chat(document: Mapping[str, Any], *, max_images: int, max_tokens: int) -> ChatRequest:
    """The request that `document` is.

    Raises:
        InvalidValueError: no message, an unknown role, a part without its image, a value that cannot be used, a parameter that is
            not known or not supported.
        TooLargeError: more than `max_images` images.
    """
    fields = {name: value for name, value in document.items() if value is not None and name not in LABELS}
    for name, neutral in UNSUPPORTED.items():
        if name in fields and fields.pop(name) not in neutral:
            raise unsupported(name, neutral)
    try:
        asked = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from error
    images = sum(1 for _ in asked.image_parts())
    if images > max_images:
        raise TooLargeError(f"{images} images in one request; this server takes {max_images}.", field="messages")
    if asked.most_tokens is not None and asked.most_tokens > max_tokens:
        raise InvalidValueError(
            f"{asked.tokens_field} is {asked.most_tokens}; this server gives at most {max_tokens} tokens.", field=asked.tokens_field
        )
    if asked.stream_options is not None and not asked.stream:
        raise InvalidValueError("stream_options goes with stream: true alone.", field="stream_options")
    return asked


def unsupported(name: str, neutral: tuple[Any, ...]) -> InvalidValueError:
    """The refusal of a parameter that is known but cannot be had here."""
    only = f"; only {' or '.join(json.dumps(each) for each in neutral)} is taken" if neutral else "; leave it out"
    return InvalidValueError(f"{name} is not supported here{only}.", field=name)


def _refusal(error: ValidationError) -> InvalidValueError:
    """The first thing that is wrong, with the path of its parameter as in `messages[0].content[1].image_url.url`."""
    first = error.errors(include_url=False)[0]
    places = [place for place in first["loc"] if not (isinstance(place, str) and place.startswith(TAG))]
    name = "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places).removeprefix(".")
    if member := MEMBERS.get(first["type"]):
        name = f"{name}.{member}"
    if first["type"] == "extra_forbidden":
        return InvalidValueError(f"Unknown parameter {name!r}.", field=name)
    if first["type"] == "missing":
        return InvalidValueError(f"{name} is missing.", field=name)
    if first["type"] == "too_short" and first["ctx"]["actual_length"] == 0:
        return InvalidValueError(f"{name} is empty.", field=name)
    return InvalidValueError(f"{name}: {first['msg']}.", field=name)
