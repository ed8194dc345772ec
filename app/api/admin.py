"""Routes that change what the gateway serves; whoever includes them says what guards them."""

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends

from app.api import schemas
from app.api.models import describe
from app.api.services import Services

PROBLEMS: dict[int | str, dict[str, Any]] = {status: {"model": schemas.ProblemResponse} for status in (401, 403, 404, 503)}


def admin_router(services: Services, guard: Callable[..., Awaitable[object]]) -> APIRouter:
    """`guard` is a dependency of every route: it raises for those who may not."""
    router = APIRouter(prefix="/v1/models", tags=["admin"], dependencies=[Depends(guard)])

    @router.post("/{name}/unload", summary="Take a model out of service and its engines out of memory", responses=PROBLEMS)
    async def unload(name: str) -> schemas.ModelResponse:
        await services.catalog.refresh()
        return schemas.ModelResponse(**describe(services.catalog.withdraw(name), services))

    @router.post("/{name}/load", summary="Load the newest sound version of a model and have it answer", responses=PROBLEMS)
    async def load(name: str) -> schemas.ModelResponse:
        await services.catalog.refresh()
        return schemas.ModelResponse(**describe(await services.catalog.restore(name), services))

    return router
