"""What the pages for people share: static files that load nothing from elsewhere, and the headers that hold a browser to it."""

from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again: an upgrade never meets the files of the version before
    "X-Content-Type-Options": "nosniff",
}
POLICY = {
    "default-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "object-src": "'none'",
}


def page(name: str, **policy: str) -> Response:
    """The page `static/NAME`. `policy` is what it needs beyond its own files, as in `style_src="'self' 'unsafe-inline'"`."""
    directives = POLICY | {directive.replace("_", "-"): value for directive, value in policy.items()}
    headers = {
        "Content-Security-Policy": "; ".join(f"{directive} {value}" for directive, value in directives.items()),
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }
    return FileResponse(STATIC / name, headers=HEADERS | headers)


class Assets(StaticFiles):
    """Scripts, styles and the licences of those that are not ours; answers 304 to those who have them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response
