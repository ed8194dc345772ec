"""`GET /status`: a page that draws what `/metrics` says, for a look without Grafana.

It computes in the browser, from the differences between what it is told; the server keeps nothing for it.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
PAGE = "/status"
ASSETS = "/status/assets"
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again: an upgrade never meets the files of the version before
    "X-Content-Type-Options": "nosniff",
}
PAGE_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
}


def install(app: FastAPI) -> None:
    """Add the page and its files; routers cannot carry a mount."""

    @app.get(PAGE, summary="Live figures as charts", include_in_schema=False)
    async def status() -> Response:
        return FileResponse(STATIC / "status.html", headers=PAGE_HEADERS)

    app.mount(ASSETS, _Assets(directory=STATIC), name="status-assets")


class _Assets(StaticFiles):
    """Scripts, styles and the licence of the one that is not ours; answers 304 to those who have them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response
