"""The models in OpenAI's list shape, and each with its manifest."""

from typing import Any

from fastapi import APIRouter

from app.api import schemas
from app.api.services import Services
from app.catalog import Model, ModelVersion
from app.errors import ModelNotFoundError
from app.tasks import TASKS


def model_router(services: Services) -> APIRouter:
    router = APIRouter(prefix="/v1/models", tags=["models"])

    @router.get("", summary="List the models")
    async def models() -> schemas.ModelsResponse:
        await services.catalog.refresh()
        rows = sorted(services.catalog.models.values(), key=lambda model: model.name)
        return schemas.ModelsResponse(data=[schemas.ModelResponse(**describe(model, services)) for model in rows])

    @router.get("/{name}", summary="One model with its manifest", responses={404: {"model": schemas.ProblemResponse}})
    async def model(name: str) -> schemas.ModelDetailResponse:
        await services.catalog.refresh()
        base, at, number = name.partition("@")
        found = services.catalog.models.get(base)
        if found is None:
            raise ModelNotFoundError(f"There is no model {base!r}; see /v1/models.", field="name")
        named = int(number) if number.isdecimal() else None
        shown = next((version for version in found.versions if version.number == named), None) if at else found.current
        if at and shown is None:
            raise ModelNotFoundError(f"{base} has no version {number!r}; see /v1/models.", field="name")
        manifest = None if shown is None else shown.manifest.model_dump(mode="json")
        return schemas.ModelDetailResponse(**describe(found, services), manifest=manifest)

    return router


def _task(version: ModelVersion) -> str:
    if version.manifest.generation is not None:
        return "chat"
    return next((task.name for task in TASKS.values() if task.role in version.roles), version.manifest.roles[0])


def describe(model: Model, services: Services) -> dict[str, Any]:
    """The members of `schemas.ModelResponse`."""
    current = model.current
    shown = current or next(iter(model.versions), None)
    manifest = None if shown is None else shown.manifest
    task = None if shown is None else _task(shown)
    return {
        "id": model.name,
        "created": 0 if manifest is None else int(manifest.created.timestamp()),
        "task": task,
        "version": None if current is None else current.number,
        "versions": [version.number for version in model.versions],
        "engine": None if manifest is None else manifest.engine.kind,
        "precision": None if manifest is None else manifest.precision,
        "phrases": None if manifest is None or manifest.text is None else manifest.text.phrases,
        "default": task is not None and services.defaults.get(task) == model.name,
        "status": services.catalog.status(model),
        "problems": model.faults,
    }
