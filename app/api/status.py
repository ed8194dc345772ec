"""`GET /status`: a page that draws what `/metrics` says, for a look without Grafana.

It computes in the browser, from the differences between what it is told; the server keeps nothing for it.
"""

from fastapi import FastAPI
from starlette.responses import Response

from app.api.pages import STATIC, Assets, page


def install(app: FastAPI) -> None:
    """Add the page and its files; routers cannot carry a mount."""

    @app.get("/status", summary="Live figures as charts", include_in_schema=False)
    async def status() -> Response:
        return page("status.html")

    app.mount("/status/assets", Assets(directory=STATIC), name="status-assets")
