"""For orchestrators and Prometheus: alive, ready, metrics."""

import asyncio

import prometheus_client
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from app import metrics
from app.api import schemas
from app.api.services import Services
from app.errors import ModelNotChosenError, ModelNotFoundError, ModelUnavailableError


def health_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/livez", summary="The process answers")
    async def livez() -> schemas.HealthResponse:
        return schemas.HealthResponse(status="ok")

    @router.get(
        "/readyz",
        summary="A real inference has gone through every default model",
        responses={503: {"model": schemas.HealthResponse}},
    )
    async def readyz() -> Response:
        reasons = await _reasons_not_ready(services)
        troubles = services.pipeline.backend.troubles()
        body = {"status": "ready" if not reasons else "not ready", "reasons": reasons, "troubles": troubles}
        return JSONResponse(body, 503 if reasons else 200)

    @router.get("/metrics", summary="Prometheus metrics", include_in_schema=False)
    async def prometheus() -> Response:
        backend = services.pipeline.backend
        metrics.BACKEND_UP.labels(backend.name).set(await backend.fault() is None)
        return Response(await asyncio.to_thread(metrics.exposition), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return router


async def _reasons_not_ready(services: Services) -> list[str]:
    """A backend that is away, an empty repository, or a default model that is not loaded. Several models without a default are
    well: each loads when it is named."""
    reasons = [] if (fault := await services.pipeline.backend.fault()) is None else [fault]
    if services.admission.stopping:
        reasons.append("the server is shutting down")
    if not services.catalog.models:
        reasons.append(f"there is no model in {services.catalog.root}; export one with `python -m export`")
    for task, role in services.default_roles().items():
        try:
            model, _ = services.catalog.choose(None, task, role)
        except (ModelNotChosenError, ModelNotFoundError):
            continue
        except ModelUnavailableError as error:
            reasons.append(error.detail)
            continue
        if services.catalog.status(model) != "unloaded" and not any(version.loaded for version in model.versions):
            reasons.append(f"{model.name} is not loaded yet" if model.current else f"{model.name} cannot serve; see /v1/models")
    return reasons
