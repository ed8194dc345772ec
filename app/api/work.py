"""What a native request comes to: the task that answers it, with which engines and options, and what its texts are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.admission import Ticket
from app.api import schemas
from app.api.services import Services
from app.chat_grounding import ChatGrounding
from app.errors import InvalidValueError, VitrineError
from app.manifest import Entry
from app.pipeline import Item, Pipeline
from app.tasks.base import AnyTask
from app.tasks.embed import Embed, EmbedResult
from app.tasks.similarity import Similarity, SimilarityOptions, ZeroShot, ZeroShotOptions

EMBED, SIMILARITY, ZERO_SHOT = Embed(), Similarity(), ZeroShot()


@dataclass(frozen=True)
class Work:
    """`task`, `entries` and `options` are for `runner`. `texts` are answers that are there already; they follow the images'."""

    task: AnyTask
    entries: Sequence[Entry]
    options: Any
    runner: Pipeline | ChatGrounding
    texts: tuple[Item, ...] = ()
    warnings: tuple[str, ...] = ()


async def find_work(task: AnyTask, asked: schemas.TaskRequest, options: Any, services: Services, ticket: Ticket) -> Work:
    """Find the engines, and embed the texts that the request has.

    Raises:
        InvalidValueError: labels for a model that has its own, or none for one that has not; a text that cannot be read.
        TooLargeError: too many texts.
        ModelError, BackendError: the model cannot answer.
    """
    if isinstance(asked, schemas.EmbedRequest):
        entries = await services.pipeline.acquire(EMBED, asked.model, None, ticket)
        found = await services.texts.embed(entries[0], asked.texts, ticket, field="texts") if asked.texts else []
        return Work(EMBED, entries, None, services.pipeline, tuple(_item(one) for one in found))
    if isinstance(asked, schemas.SimilarityRequest):
        entries = await services.pipeline.acquire(SIMILARITY, asked.model, None, ticket)
        vectors, cut = await services.texts.vectors(entries[0], asked.texts, ("{}",), ticket, field="texts")
        return Work(SIMILARITY, entries, SimilarityOptions(vectors), services.pipeline, warnings=_cut_off(asked.texts, cut))
    if isinstance(asked, schemas.ClassifyRequest) and _names_labels(asked, services):
        entries = await services.pipeline.acquire(EMBED, asked.model, None, ticket)
        templates = asked.template or ("{}",)
        vectors, cut = await services.texts.vectors(entries[0], asked.labels, templates, ticket, field="labels")
        zero_shot = ZeroShotOptions(tuple(asked.labels), vectors, asked.top_k)
        return Work(ZERO_SHOT, entries, zero_shot, services.pipeline, warnings=_cut_off(asked.labels, cut))
    runner = services.grounding if services.grounding.takes(task, asked.model) else services.pipeline
    return Work(task, await runner.acquire(task, asked.model, options, ticket), options, runner)


def _item(found: EmbedResult | VitrineError) -> Item:
    return Item(None, error=found) if isinstance(found, VitrineError) else Item(None, result=found)


def _cut_off(texts: Sequence[str], cut: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{texts[number][:100]!r} is too long for the model; its end was not read." for number in cut)


def _names_labels(asked: schemas.ClassifyRequest, services: Services) -> bool:
    """Whether the request says among which labels to classify; the model must agree. One without either is for the default."""
    default = None if asked.labels else services.defaults["classify"]
    name = default if asked.model is None else asked.model
    model = None if name is None else services.catalog.models.get(name.partition("@")[0])
    if asked.template and not asked.labels:
        raise InvalidValueError("A template is for labels, and there are none.", field="template")
    if model is not None and model.answers(ZERO_SHOT.role) and not asked.labels:
        raise InvalidValueError(f"{model.name} has no classes of its own; say in labels what there may be.", field="labels")
    if model is not None and model.answers("classify") and asked.labels:
        raise InvalidValueError(
            f"{model.name} has classes of its own; leave labels out, or name a model that compares images with texts.",
            field="labels",
        )
    return bool(asked.labels)
